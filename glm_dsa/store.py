"""Vectors by token, as a cache keeps them: in the model's dtype, or packed by `mx.quantize` and unpacked on read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from .errors import CacheError

STEP = 256  # tokens by which buffers grow
BITS, GROUP_SIZES = (2, 3, 4, 5, 6, 8), (32, 64, 128)  # what mx.quantize packs


@dataclass(frozen=True)
class KvQuantization:
    """How latents and rotary keys are packed: `bits` a value, a scale and a bias for each `group_size` values.

    `start`: the first token that is packed. Earlier ones stay in the model's dtype, and from it on every token is
    attended as quantized, by itself and by later ones, however the prompt was cut.
    """

    bits: int = 8
    group_size: int = 64
    start: int = 0

    def check(self, latent: int, rope: int) -> None:
        """Raises `CacheError` where no group of values could be formed within the latent, or within the rotary key."""
        for name, value, allowed in (("bits", self.bits, BITS), ("group size", self.group_size, GROUP_SIZES)):
            if value not in allowed or isinstance(value, bool):
                raise CacheError(f"KV quantization: {name} {value!r}; one of {', '.join(map(str, allowed))} is due")
        if not isinstance(self.start, int) or self.start < 0:
            raise CacheError(f"KV quantization: start {self.start!r}; the number of a token, from 0 on, is due")
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
    return f"groups of {' or '.join(sizes)} do" if sizes else "none that MLX packs does: keep this cache unquantized"


class Columns:
    """Arrays [B, T, ..] that grow, shift and split together, a column for each token."""

    def __init__(self, arrays: Sequence[mx.array] = ()) -> None:
        self.buffers = list(arrays)
        self.length = arrays[0].shape[1] if arrays else 0

    def append(self, *new: mx.array) -> None:
        end = self.length + new[0].shape[1]
        if not self.buffers or self.buffers[0].shape[1] < end:
            size = -(-end // STEP) * STEP
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
        return Columns([buffer[:, begin:end] for buffer in self.buffers] if end > begin else [])

    def rows(self, indices: mx.array) -> Columns:
        return Columns([part[indices] for part in self.read()])

    def shifted(self, by: int) -> Columns:
        """With `by` empty columns more in front, or -by fewer columns there."""
        if by <= 0:
            return self.between(-by, self.length)
        return Columns([mx.pad(part, [(0, 0), (by, 0)] + [(0, 0)] * (part.ndim - 2)) for part in self.read()])

    @staticmethod
    def concatenated(parts: Sequence[Columns]) -> Columns:
        """One behind the other, along T."""
        filled = [part.read() for part in parts if part.length]
        return Columns([mx.concatenate(list(same), axis=1) for same in zip(*filled, strict=True)])

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
    """[latent | rotary key] of each token, [B, T, W]: plain in the first `boundary` columns, packed behind them.

    For one sequence the boundary is its quantization's start. In a batch, whose rows start at different columns, it is
    the last of the rows' starts; rows that start earlier keep there what unpacking would give, so that each token is
    attended as its own position demands.
    """

    def __init__(self, quantization: KvQuantization | None = None, boundary: int = 0) -> None:
        self.quantization = quantization
        self.boundary = boundary  # of no meaning without quantization
        self.plain, self.packed = Columns(), Columns()

    @classmethod
    def of(cls, values: mx.array) -> LatentStore:
        """Of tokens that no cache keeps, [B, T, W]."""
        store = cls()
        store.plain = Columns([values])
        return store

    @property
    def length(self) -> int:
        return self.plain.length + self.packed.length

    def append(self, values: mx.array, first_packed: mx.array | None = None) -> None:
        """values [B, S, W]; `first_packed` int [B, 1]: the column at which each row's start lies, where not all at
        the boundary."""
        if self.quantization is None:
            self.plain.append(values)
            return
        plain = min(max(self.boundary - self.length, 0), values.shape[1])
        if plain:
            head = values[:, :plain]
            if first_packed is not None:
                is_packed = mx.arange(self.length, self.length + plain) >= first_packed  # [B, S]
                head = mx.where(is_packed[..., None], self.quantization.rounded(head), head)
            self.plain.append(head)
        if plain < values.shape[1]:
            self.packed.append(*self.quantization.pack(values[:, plain:]))

    def read(self) -> mx.array:
        """All tokens, [B, T, W]."""
        if not self.packed.length:
            return self.plain.read()[0]
        assert self.quantization is not None
        unpacked = self.quantization.unpack(*self.packed.read())
        return mx.concatenate([self.plain.read()[0], unpacked], axis=1) if self.plain.length else unpacked

    def take(self, tokens: mx.array) -> mx.array:
        """The tokens chosen, int [B, S, K] -> [B, S, K, W]. Only these are unpacked."""
        if not self.packed.length:
            return self.plain.take(tokens)[0]
        assert self.quantization is not None
        behind = tokens.astype(mx.int32) - self.plain.length
        unpacked = self.quantization.unpack(*self.packed.take(mx.maximum(behind, 0)))
        if not self.plain.length:
            return unpacked
        plain = self.plain.take(mx.minimum(tokens, self.plain.length - 1))[0]
        return mx.where((behind < 0)[..., None], plain, unpacked)

    def trim(self, tokens: int) -> None:
        packed = min(tokens, self.packed.length)
        self.packed.trim(packed)
        self.plain.trim(tokens - packed)

    def widened(self, boundary: int) -> LatentStore:
        """A store of the same values whose boundary lies further right: what lies between is unpacked."""
        store = LatentStore(self.quantization, boundary)
        store.plain, store.packed = self.plain, self.packed
        between = min(boundary - self.plain.length, self.packed.length)
        if self.quantization is not None and between > 0:
            unpacked = self.quantization.unpack(*self.packed.between(0, between).buffers)
            store.plain = Columns.concatenated([self.plain, Columns([unpacked])])
            store.packed = self.packed.between(between, self.packed.length)
        return store

    def shifted(self, by: int) -> LatentStore:
        store = LatentStore(self.quantization, self.boundary + by if self.boundary else 0)
        store.plain, store.packed = self.plain, self.packed
        if self.plain.length + by > 0 and self.plain.length:
            store.plain = self.plain.shifted(by)
        else:
            store.plain, store.packed = Columns(), self.packed.shifted(by + self.plain.length)
        return store

    def rows(self, indices: mx.array) -> LatentStore:
        store = LatentStore(self.quantization, self.boundary)
        store.plain, store.packed = self.plain.rows(indices), self.packed.rows(indices)
        return store

    @staticmethod
    def stacked(parts: Sequence[tuple[LatentStore, int]], length: int, boundary: int) -> LatentStore:
        """One under the other: (store, how many rows it has), each `length` long or empty; of one quantization.

        `boundary` lies at or behind each store's own.
        """
        out = LatentStore(parts[0][0].quantization, boundary)
        wide = [(store.widened(boundary), rows) for store, rows in parts]
        plain = length if out.quantization is None else min(boundary, length)
        out.plain = Columns.stacked([(store.plain, rows) for store, rows in wide], plain)
        out.packed = Columns.stacked([(store.packed, rows) for store, rows in wide], length - plain)
        return out

    @property
    def nbytes(self) -> int:
        return self.plain.nbytes + self.packed.nbytes
