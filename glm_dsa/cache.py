"""What a layer remembers of the tokens so far: latent and rotary key on every layer, indexer keys on full layers.

One `LayerCache` holds all of it, so that growing, rewinding, copying, saving, batching and quantizing act on every part
together, or fail before they change anything. It has the methods that mlx-lm asks of a cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import mlx.core as mx

from .errors import CacheError
from .mask import CausalMask
from .store import Columns, KvQuantization, LatentStore

FORMAT = "glm-dsa cache 1"  # of `state`, and so of saved prompt caches


@dataclass(frozen=True)
class Widths:
    """Values a token: latent, rotary key, and the indexer's key (0 on layers that share a selection)."""

    latent: int
    rope: int
    index: int = 0


class LayerCache:
    """The cache of one layer.

    latents     [B, T, R + D]   the normalized KV latent, and the rotary key that all heads share; packed if quantized
    index_keys  [B, T, D_I]     the indexer's keys, never packed; only where the layer has an indexer of its own

    Rows of a batch may be left-padded: `left_padding` counts the pads of each row, and positions start after them.
    `start` is the position of the first token (0, but for tests of far positions). `model` says whose cache it is.
    """

    def __init__(
        self,
        widths: Widths,
        quantization: KvQuantization | None = None,
        left_padding: Sequence[int] | None = None,
        start: int = 0,
        model: str = "",
    ) -> None:
        self.widths = widths
        if quantization is not None:
            quantization.check(self.widths.latent, self.widths.rope)
        if start < 0 or (left_padding is not None and (not left_padding or min(left_padding) < 0)):
            raise CacheError(
                f"a cache from position {start} on, with padding {left_padding}: neither can be negative or empty"
            )
        self.quantization = quantization
        self.left_padding = None if left_padding is None else list(left_padding)
        self.right_padding: list[int] | None = None
        self.start = start
        self.model = model
        self.latents = LatentStore(quantization, self._first())
        self.index_keys = Columns()

    @property
    def has_indexer(self) -> bool:
        return self.widths.index > 0

    @property
    def length(self) -> int:
        """Columns in use: tokens, and the pads before them."""
        return self.latents.length

    @property
    def batch(self) -> int | None:
        """Rows; None as long as nothing says how many."""
        if self.left_padding is not None:
            return len(self.left_padding)
        buffers = self.latents.plain.buffers or self.latents.packed.buffers
        return buffers[0].shape[0] if buffers else None

    @property
    def dtype(self) -> mx.Dtype | None:
        """Of what is cached, and of scales and biases where it is packed; None before the first token."""
        held = self.latents.plain.buffers or self.latents.packed.buffers[1:]
        return held[0].dtype if held else None

    @property
    def offset(self) -> int | mx.array:
        """Position of the next token: an int, or one for each row of a left-padded batch."""
        offset = self.start + self.length
        return offset if self.left_padding is None else offset - mx.array(self.left_padding)

    # -- appending and reading

    def append(self, joined: mx.array) -> LatentStore:
        """Stores [latent | rotary key] of S new tokens, [B, S, R + D]; returns the store of all T."""
        self._check_fits(joined, self.widths.latent + self.widths.rope, self.dtype, "latent and rotary key")
        if self.index_keys.length:
            # Keys that no selection reads yet (T <= index_topk, later draft steps) would stay an ever longer graph.
            joined = mx.depends(joined, self.index_keys.buffers[0])
        self.latents.append(joined)
        return self.latents

    def append_index_keys(self, keys: mx.array) -> mx.array:
        """Stores S new indexer keys, [B, S, D_I]; returns all T of them. Raises where the layer has no indexer."""
        if not self.has_indexer:
            raise CacheError(
                "this layer's cache holds no indexer keys: a shared layer reuses a selection, it makes none"
            )
        held = self.index_keys.buffers
        self._check_fits(keys, self.widths.index, held[0].dtype if held else None, "indexer key")
        self.index_keys.append(keys)
        return self.index_keys.read()[0]

    def mask(self, queries: int) -> CausalMask:
        """Which keys each of the next `queries` tokens may see."""
        return CausalMask(self.length, queries, None if self.left_padding is None else tuple(self.left_padding))

    def make_mask(self, queries: int, **_: Any) -> mx.array | None:
        """The same as mlx-lm asks for it: bool [1 or B, 1, S, T], or None where it is all."""
        return self.mask(queries).whole()

    # -- rewinding and quantizing

    def is_trimmable(self) -> bool:
        return True

    def trim(self, tokens: int) -> int:
        """Forgets the last `tokens` tokens in every part; returns how many. Raises where there are not so many."""
        there = max(self.length - max(self.left_padding or [0]), 0)
        if not 0 <= tokens <= there:
            where = " in its shortest row" if self.left_padding else ""
            raise CacheError(f"trim({tokens}): this cache holds {there} tokens{where}")
        self._check_settled("trim")
        self.latents.trim(tokens)
        self.index_keys.trim(max(self.index_keys.length - self.latents.length, 0))
        return tokens

    def to_quantized(self, group_size: int = 64, bits: int = 8, start: int = 0) -> LayerCache:
        """Packs latents and rotary keys from token `start` on, in place; returns itself.

        mlx-lm calls this after each chunk and step under --kv-bits, once its --quantized-kv-start is reached: on a cache
        that is packed already it changes nothing. Raises `CacheError` where that one was packed otherwise.
        """
        if self.quantization is not None:
            if (self.quantization.bits, self.quantization.group_size) != (bits, group_size):
                raise CacheError(
                    f"KV quantization to {bits} bit in groups of {group_size} was asked for, but this cache is packed "
                    f"already, {self.quantization}; ask for the same, or make the cache anew"
                )
            return self
        quantization = KvQuantization(bits, group_size, start)
        quantization.check(self.widths.latent, self.widths.rope)
        self._check_settled("to_quantized")
        self.quantization, plain = quantization, self.latents
        self.latents = LatentStore(quantization, self._first())
        if plain.length:
            self.latents.append(plain.read())
        return self

    # -- batches

    @classmethod
    def merge(cls, caches: Sequence[LayerCache]) -> LayerCache:
        """The rows of all caches as one left-padded batch. Raises `CacheError` where they are not of one kind."""
        cls._check_alike(caches)
        length, rows = max(c.length for c in caches), [c.batch or 1 for c in caches]
        twin = caches[0]._twin(
            pad + length - c.length
            for c, count in zip(caches, rows, strict=True)
            for pad in c.left_padding or [0] * count
        )
        latents = [(c.latents, count) for c, count in zip(caches, rows, strict=True)]
        twin.latents = LatentStore.stacked(latents, twin.latents.first, length)
        keys = [(c.index_keys.placed(length - c.length, length), n) for c, n in zip(caches, rows, strict=True)]
        twin.index_keys = Columns.stacked(keys, length)
        return twin

    def extend(self, other: LayerCache) -> None:
        """Adds the rows of another cache below these."""
        self._become(self.merge([self, other]))

    def filter(self, rows: Sequence[int] | mx.array) -> None:
        """Keeps only these rows, in this order, and no more pads than the longest of them needs. Pads that were announced
        and have not come yet are still to come."""
        self._check_settled("filter")
        self._become(self._rows(rows.tolist() if isinstance(rows, mx.array) else list(rows)))  # type: ignore[arg-type]

    def extract(self, row: int) -> LayerCache:
        """One row as a cache of its own, without padding; of announced pads that have not come, it expects none."""
        self._check_settled("extract")
        single = self._rows([row])
        single.left_padding = None
        single.latents.first = single._first()
        # Lazy, it would keep the whole batch in memory, where `nbytes` tells of one row.
        mx.eval(single.latents.plain.buffers, single.latents.packed.buffers, single.index_keys.buffers)
        return single

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Announces padding of what is appended next. Right padding is rolled to the left by `finalize`."""
        del lengths  # follows from the padding
        if left_padding is None and right_padding is None:
            return
        self._check_settled("prepare")
        paddings = [list(map(int, padding)) for padding in (left_padding, right_padding) if padding is not None]
        rows = self.batch if self.batch is not None else len(paddings[0])
        if any(len(padding) != rows or min(padding) < 0 for padding in paddings):
            raise CacheError(f"padding {paddings}; this batch has {rows} rows")
        if left_padding is not None and self.length:
            raise CacheError("left padding can only be announced before the first token")
        if self.left_padding is None:
            self.left_padding = [0] * rows
        if left_padding is not None:
            self.left_padding = [a + int(b) for a, b in zip(self.left_padding, left_padding, strict=True)]
            self.latents.first = self._first()
        if right_padding is not None and max(right_padding) > 0:
            self.right_padding = [int(p) for p in right_padding]

    def finalize(self) -> None:
        """Moves right padding, if there was any, in front of each row."""
        if self.right_padding is None:
            return
        rows = [self._rows([i]) for i in range(len(self.right_padding))]
        for row, pads in zip(rows, self.right_padding, strict=True):
            row.trim(pads)
        self._become(self.merge(rows))

    def size(self) -> int:
        return self.length

    def empty(self) -> bool:
        return self.length == 0

    @property
    def nbytes(self) -> int:
        """What the buffers take, with the columns that they have in reserve."""
        return self.latents.nbytes + self.index_keys.nbytes

    # -- saving: mlx-lm rebuilds a cache from its class and this alone

    @property
    def state(self) -> tuple[Any, ...]:
        """Everything, as arrays, numbers, strings, lists of numbers and None. Columns in reserve are left out."""
        q = self.quantization
        parts = [*_parts(self.latents.plain, 1), *_parts(self.latents.packed, 3), *_parts(self.index_keys, 1)]
        return (
            FORMAT, self.model, list(astuple(self.widths)), None if q is None else [q.bits, q.group_size, q.start],
            self.left_padding, self.right_padding, self.start, *parts,
        )  # fmt: skip

    @state.setter
    def state(self, value: Sequence[Any]) -> None:
        parts = value if isinstance(value, (list, tuple)) else ()
        if not parts or not isinstance(parts[0], str) or parts[0] != FORMAT:
            found = parts[0] if parts and isinstance(parts[0], str) else "something else"
            raise CacheError(
                f"this cache was saved as {found!r}, expected {FORMAT!r}: it comes from another version of "
                "this definition. Make the prompt cache anew"
            )
        try:
            _, model, widths, packing, left, right, start, plain, words, scales, biases, keys = parts
            numbers = [start, *widths, *(packing or ()), *(left or ()), *(right or ())]
            if not isinstance(model, str) or not all(type(n) is int and 0 <= n < 1 << 31 for n in numbers):
                raise ValueError(f"model {model!r}, numbers {numbers}")
            quantization = None if packing is None else KvQuantization(*packing)
            fresh = LayerCache(Widths(*widths), quantization, left, start, model)
            fresh.right_padding = right
            # [:]: handles of our own, since buffers are written in place
            fresh.latents.plain = Columns([] if plain is None else [plain[:]])
            fresh.latents.packed = Columns([] if words is None else [words[:], scales[:], biases[:]])
            fresh.index_keys = Columns([] if keys is None else [keys[:]])
            fresh._check_whole()
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise CacheError(f"this saved cache is damaged ({error}); make the prompt cache anew") from None
        self._become(fresh)

    @classmethod
    def from_state(cls, state: Sequence[Any]) -> LayerCache:
        cache = cls.__new__(cls)
        cache.state = state
        return cache

    def __repr__(self) -> str:
        kind = "in the model's dtype" if self.quantization is None else str(self.quantization)
        rows = "" if self.left_padding is None else f"{len(self.left_padding)} rows, "
        return f"LayerCache({rows}{self.length} tokens, {kind}, {self.nbytes:,} bytes)"

    # -- helpers

    def _first(self) -> list[int]:
        """The column from which each row is packed; one for all where that is the first, or nothing is padded."""
        start = 0 if self.quantization is None else self.quantization.start
        return [start + pads for pads in self.left_padding or [0]] if start else [0]

    def _twin(self, left_padding: Iterable[int]) -> LayerCache:
        """Another cache of the same kind, holding nothing."""
        return LayerCache(self.widths, self.quantization, list(left_padding), self.start, self.model)

    def _become(self, other: LayerCache) -> None:
        self.__dict__.update(other.__dict__)

    def _rows(self, rows: list[int]) -> LayerCache:
        there = self.batch or 1
        if not rows or any(isinstance(row, bool) or not 0 <= row < there for row in rows):
            raise CacheError(f"rows {rows} of a batch of {there}")
        padding = self.left_padding or [0] * there
        spare = min(self.length, *(padding[row] for row in rows))
        twin = self._twin(padding[row] - spare for row in rows)
        if self.length:
            twin.latents = self.latents.rows(rows, spare)
            twin.index_keys = self.index_keys.rows(mx.array(rows)).placed(-spare, self.length - spare)
        return twin

    def _check_fits(self, new: mx.array, width: int, dtype: mx.Dtype | None, what: str) -> None:
        is_other = dtype is not None and new.dtype != dtype
        if is_other or new.shape[-1] != width or self.batch not in (None, new.shape[0]):
            raise CacheError(
                f"{what} {list(new.shape)} {new.dtype} for a cache of {self.batch or 'any number of'} rows, width "
                f"{width}, {dtype or 'any dtype'}: it belongs to another model, dtype or batch"
            )

    def _check_whole(self) -> None:
        """Raises ValueError where the parts are not of one shape, as `append` would have left them."""
        width, q, rows, length = self.widths.latent + self.widths.rope, self.quantization, self.batch, self.length
        begin, end = self.latents.span
        due: list[tuple[Columns, int, list[int]]] = [(self.index_keys, length * self.has_indexer, [self.widths.index])]
        if q is None:
            due += [(self.latents.plain, length, [width]), (self.latents.packed, 0, [])]
        else:
            packed = [width * q.bits // 32, width // q.group_size, width // q.group_size]
            due += [
                (self.latents.plain, min(end, length), [width]),
                (self.latents.packed, max(length - begin, 0), packed),
            ]
        for columns, tokens, widths in due:
            shapes = [(rows, tokens, w) for w in widths] if tokens else []
            if [buffer.shape for buffer in columns.buffers] != shapes:
                raise ValueError(f"expected tensors of {shapes}, got {[b.shape for b in columns.buffers]}")
        words, scales = self.latents.packed.buffers[:1], self.latents.packed.buffers[1:]
        kinds = [b.dtype for b in (*words, *self.latents.plain.buffers, *scales, *self.index_keys.buffers)]
        latents = {b.dtype for b in (*self.latents.plain.buffers, *scales)}
        are_floats = all(mx.issubdtype(kind, mx.floating) for kind in kinds[len(words) :])
        if not are_floats or len(latents) > 1 or any(w.dtype != mx.uint32 for w in words):
            raise ValueError(f"tensors of {', '.join(map(str, kinds))}")
        for padding in (self.left_padding, self.right_padding):
            if padding is not None and len(padding) != rows:  # it may be announced, and longer than what has come
                raise ValueError(f"padding {padding} of {rows} rows")

    def _check_settled(self, what: str) -> None:
        if self.right_padding is not None:
            raise CacheError(f"{what}: right padding was announced and not yet finalized")

    @staticmethod
    def _check_alike(caches: Sequence[LayerCache]) -> None:
        if not caches:
            raise CacheError("a batch of no caches")
        for cache in caches:
            if not isinstance(cache, LayerCache):
                raise CacheError(f"a batch of LayerCache and {type(cache).__name__}: expected caches of one kind")
            cache._check_settled("merge")
            if cache.has_indexer and cache.index_keys.length != cache.length:
                raise CacheError(
                    f"{cache.length} latents beside {cache.index_keys.length} indexer keys: an earlier run was cut short"
                )
        for what, kinds in (
            ("quantization", [c.quantization or "none" for c in caches]),
            ("widths", [c.widths for c in caches]),
            ("model", [c.model for c in caches]),
            ("first position", [c.start for c in caches]),
            ("dtype", [c.dtype for c in caches if c.length]),
        ):
            if len(set(kinds)) > 1:
                raise CacheError(
                    f"caches of different {what} cannot be one batch: {', '.join(sorted(set(map(str, kinds))))}"
                )


def _parts(columns: Columns, count: int) -> list[mx.array | None]:
    return list(columns.read()) if columns.length else [None] * count


def cache_bytes(widths: Widths, itemsize: int, quantization: KvQuantization | None = None) -> tuple[int, int]:
    """Bytes a token of one layer, in a model whose dtype has `itemsize` bytes: (latent and rotary key, indexer key).

    Of tokens before the quantization's start, the first is (latent + rope) * itemsize instead.
    """
    width = widths.latent + widths.rope
    return (
        width * itemsize if quantization is None else quantization.bytes_per_token(width, itemsize),
        widths.index * itemsize,
    )
