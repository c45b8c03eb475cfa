"""Vectors by token, as a cache keeps them: in the model's dtype, or packed by `mx.quantize` and unpacked on read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from .errors import CacheError

STEP, SHARE = 256, 64  # buffers grow by so many tokens, or by one for so many that they hold: growing copies them
BITS, GROUP_SIZES = (2, 3, 4, 5, 6, 8), (32, 64, 128)  # what mx.quantize packs


@dataclass(frozen=True)
class KvQuantization:
    """How latents and rotary keys are packed: `bits` a value, a scale and a bias for each `group_size` values.

    `start`: the first token that is packed; earlier ones stay in the model's dtype. In a cache made with it, every token
    from it on is attended as packed, by its own query too, however the prompt was cut.
    """

    bits: int = 8
    group_size: int = 64
    start: int = 0

    def check(self, latent: int, rope: int) -> None:
        """Raises `CacheError` where no group of values could be formed within the latent, or within the rotary key."""
        for name, value, allowed in (("bits", self.bits, BITS), ("group size", self.group_size, GROUP_SIZES)):
            if type(value) is not int or value not in allowed:
                raise CacheError(f"KV quantization: {name} {value!r}; expected one of {', '.join(map(str, allowed))}")
        if type(self.start) is not int or self.start < 0:
            raise CacheError(f"KV quantization: start {self.start!r}; expected the number of a token, from 0 on")
        for name, width in (("latent (kv_lora_rank)", latent), ("rotary key (qk_rope_head_dim)", rope)):
            if width % self.group_size:
                raise CacheError(
                    f"KV quantization: groups of {self.group_size} do not divide this model's {name} of {width}; "
                    f"{fitting(latent, rope)}"
                )

    def pack(self, values: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """[.., W] -> words [.., W * bits / 32], scales and biases [.., W / group_size] of the values' dtype."""
        return mx.quantize(values, group_size=self.group_size, bits=self.bits)

    def unpack(self, words: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
        return mx.dequantize(words, scales, biases, group_size=self.group_size, bits=self.bits)

    def rounded(self, values: mx.array) -> mx.array:
        """What is read back of values that were packed."""
        return self.unpack(*self.pack(values))

    def bytes_per_token(self, width: int, itemsize: int) -> int:
        """Of a vector of `width` values, where the model's dtype has `itemsize` bytes."""
        return width * self.bits // 8 + 2 * itemsize * (width // self.group_size)

    def __str__(self) -> str:
        since = f", from token {self.start} on" if self.start else ""
        return f"{self.bits} bit in groups of {self.group_size}{since}"


def fitting(latent: int, rope: int) -> str:
    sizes = [str(g) for g in GROUP_SIZES if latent % g == 0 and rope % g == 0]
    return f"groups of {' or '.join(sizes)} do" if sizes else "no groups that MLX packs do: keep this cache unquantized"


class Columns:
    """Arrays [B, T, ..] that grow, shift and split together, a column for each token."""

    def __init__(self, arrays: Sequence[mx.array] = ()) -> None:
        self.buffers = list(arrays)
        self.length = arrays[0].shape[1] if arrays else 0

    def append(self, *new: mx.array) -> None:
        end = self.length + new[0].shape[1]
        if not self.buffers or self.buffers[0].shape[1] < end:
            step = STEP * max(1, end // (SHARE * STEP))
            size = -(-end // step) * step
            grown = [mx.zeros((n.shape[0], size, *n.shape[2:]), n.dtype) for n in new]
            for buffer, old in zip(grown, self.read(), strict=False):  # nothing is read before the first token
                buffer[:, : self.length] = old
            self.buffers = grown
        for buffer, part in zip(self.buffers, new, strict=True):
            buffer[:, self.length : end] = part
        self.length = end

    def read(self) -> list[mx.array]:
        return [buffer[:, : self.length] for buffer in self.buffers]

    def take(self, columns: mx.array) -> list[mx.array]:
        """int [B, S, K] -> of each array [B, S, K, ..]. Copies nothing but what is taken."""
        batch, size = self.buffers[0].shape[:2]
        rows = columns if batch == 1 else columns + mx.arange(0, batch * size, size, dtype=columns.dtype)[:, None, None]
        return [mx.take(buffer.reshape(batch * size, *buffer.shape[2:]), rows, axis=0) for buffer in self.buffers]

    def trim(self, columns: int) -> None:
        self.length -= columns

    def between(self, begin: int, end: int) -> Columns:
        """Columns of its own: a strided view would be copied whole by each `take`."""
        return Columns([mx.contiguous(buffer[:, begin:end]) for buffer in self.buffers] if end > begin else [])

    def rows(self, indices: mx.array) -> Columns:
        return Columns([part[indices] for part in self.read()])

    def placed(self, front: int, length: int) -> Columns:
        """`length` columns, beginning `front` columns before these (behind, if negative); zeros where these do not reach."""
        if not self.length or length <= 0:
            return Columns()
        kept = self.between(max(-front, 0), min(self.length, length - front))
        behind = length - max(front, 0) - kept.length
        pads = [(0, 0), (max(front, 0), behind)]
        return Columns([mx.pad(part, pads + [(0, 0)] * (part.ndim - 2)) for part in kept.buffers])

    @staticmethod
    def stacked(parts: Sequence[tuple[Columns, int]], length: int) -> Columns:
        """One under the other: (columns, how many rows they are), each `length` long, or empty and filled with zeros."""
        like = next((columns for columns, _ in parts if columns.length), None)
        if like is None or not length:
            return Columns()
        blocks = [
            columns.read()
            if columns.length
            else [mx.zeros((rows, length, *b.shape[2:]), b.dtype) for b in like.buffers]
            for columns, rows in parts
        ]
        return Columns([mx.concatenate(list(same), axis=0) for same in zip(*blocks, strict=True)])

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)


class LatentStore:
    """[latent | rotary key] of each token, [B, T, W]: plain before its row's `first` column, packed from there on.

    In a batch the rows are packed from different columns on (start + pads). Then `plain` holds the columns before the last
    of them, `packed` those from the earliest on; between the two, each row means one of both, and the other is void.
    """

    def __init__(self, quantization: KvQuantization | None = None, first: Sequence[int] = (0,)) -> None:
        self.quantization = quantization
        self.first = list(first)  # of each row, or of all; of no meaning without quantization
        self.plain, self.packed = Columns(), Columns()

    @classmethod
    def of(cls, values: mx.array) -> LatentStore:
        """Of tokens that no cache keeps, [B, T, W]."""
        store = cls()
        store.plain = Columns([values])
        return store

    @property
    def span(self) -> tuple[int, int]:
        """The column at which `packed` begins, and that before which `plain` ends."""
        return min(self.first), max(self.first)

    @property
    def length(self) -> int:
        return self.span[0] + self.packed.length if self.packed.length else self.plain.length

    def append(self, values: mx.array) -> None:
        """values [B, S, W]."""
        if self.quantization is None:
            self.plain.append(values)
            return
        before, (begin, end) = self.length, self.span
        if before < end:
            self.plain.append(values[:, : end - before])
        if before + values.shape[1] > begin:
            self.packed.append(*self.quantization.pack(values[:, max(begin - before, 0) :]))

    def read(self) -> mx.array:
        """All tokens, [B, T, W]."""
        if not self.packed.length:
            return self.plain.read()[0]
        assert self.quantization is not None
        unpacked, (begin, end) = self.quantization.unpack(*self.packed.read()), self.span
        if not end:
            return unpacked
        plain, end = self.plain.read()[0], min(end, self.length)
        is_packed = mx.arange(begin, end) >= mx.array(self.first)[:, None]  # [B or 1, columns of either kind]
        either = mx.where(is_packed[..., None], unpacked[:, : end - begin], plain[:, begin:end])
        return mx.concatenate([plain[:, :begin], either, unpacked[:, end - begin :]], axis=1)

    def take(self, tokens: mx.array) -> mx.array:
        """The tokens chosen, int [B, S, K] -> [B, S, K, W]. Only these are unpacked."""
        if not self.packed.length:
            return self.plain.take(tokens)[0]
        assert self.quantization is not None
        tokens, (begin, end) = tokens.astype(mx.int32), self.span
        unpacked = self.quantization.unpack(*self.packed.take(mx.maximum(tokens - begin, 0)))
        if not end:
            return unpacked
        plain = self.plain.take(mx.minimum(tokens, self.plain.length - 1))[0]
        return mx.where((tokens >= mx.array(self.first)[:, None, None])[..., None], unpacked, plain)

    def trim(self, tokens: int) -> None:
        left = self.length - tokens
        self.plain.trim(max(self.plain.length - left, 0))
        self.packed.trim(min(self.packed.length, tokens))

    def rows(self, chosen: list[int], spare: int) -> LatentStore:
        """These rows, without their first `spare` columns."""
        every = self.first if len(self.first) > 1 else self.first * (max(chosen) + 1)
        store = LatentStore(self.quantization, [max(every[row] - spare, 0) for row in chosen])
        indices, length = mx.array(chosen), self.length - spare
        plain = length if self.quantization is None else min(store.span[1], length)
        store.plain = self.plain.rows(indices).placed(-spare, plain)
        front = self.span[0] - spare - store.span[0]
        store.packed = self.packed.rows(indices).placed(front, max(length - store.span[0], 0))
        return store

    @staticmethod
    def stacked(parts: Sequence[tuple[LatentStore, int]], first: Sequence[int], length: int) -> LatentStore:
        """One under the other, ending together: (store, how many rows it has); of one quantization."""
        out = LatentStore(parts[0][0].quantization, first)
        begin, end = out.span
        plain = length if out.quantization is None else min(end, length)
        plains, packs = [], []
        for store, rows in parts:
            by = length - store.length
            plains.append((store.plain.placed(by, plain), rows))
            packs.append((store.packed.placed(by + store.span[0] - begin, max(length - begin, 0)), rows))
        out.plain = Columns.stacked(plains, plain)
        out.packed = Columns() if out.quantization is None else Columns.stacked(packs, max(length - begin, 0))
        return out

    @property
    def nbytes(self) -> int:
        return self.plain.nbytes + self.packed.nbytes
