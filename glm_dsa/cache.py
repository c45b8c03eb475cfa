"""What a layer remembers of the tokens so far: latent and rotary key on every layer, indexer keys on full layers.

One `LayerCache` holds all of it, so that growing, rewinding and copying act on every part together.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

STEP = 256  # tokens by which the buffers grow


class LayerCache:
    """The cache of one layer.

    latent      [B, T, R]     the normalized KV latent
    k_rope      [B, T, D]     the rotary key, one for all heads
    index_keys  [B, T, D_I]   the indexer's keys; only where `has_indexer` (never on shared layers)

    Rows of a batch may be left-padded: `left_padding` counts the pads of each row, and positions start after them.
    `start` is the position of the first token (0, but for tests of far positions).
    """

    def __init__(self, has_indexer: bool, left_padding: list[int] | None = None, start: int = 0) -> None:
        self.has_indexer = has_indexer
        self.left_padding = None if left_padding is None else mx.array(left_padding)
        self.start = start
        self.length = 0
        self.index_length = 0
        self.latent: mx.array | None = None
        self.k_rope: mx.array | None = None
        self.index_keys: mx.array | None = None

    @property
    def offset(self) -> int | mx.array:
        """Position of the next token: an int, or one for each row of a left-padded batch."""
        offset = self.start + self.length
        return offset if self.left_padding is None else offset - self.left_padding

    def append(self, latent: mx.array, k_rope: mx.array) -> tuple[mx.array, mx.array]:
        """Stores S new tokens, [B, S, R] and [B, S, D]; returns all T of them."""
        end = self.length + latent.shape[1]
        self.latent = _store(self.latent, latent, self.length)
        if self.index_keys is not None:
            # Keys that no selection reads yet (T <= index_topk, later draft steps) would stay an ever longer graph.
            self.latent = mx.depends(self.latent, self.index_keys)
        self.k_rope = _store(self.k_rope, k_rope, self.length)
        self.length = end
        return self.latent[:, :end], self.k_rope[:, :end]

    def append_index_keys(self, keys: mx.array) -> mx.array:
        """Stores S new indexer keys, [B, S, D_I]; returns all T of them. Raises where the layer has no indexer."""
        if not self.has_indexer:
            raise ValueError(
                "this layer's cache holds no indexer keys: a shared layer reuses a selection, it makes none"
            )
        end = self.index_length + keys.shape[1]
        self.index_keys = _store(self.index_keys, keys, self.index_length)
        self.index_length = end
        return self.index_keys[:, :end]

    def make_mask(self, queries: int, **_: Any) -> mx.array | None:
        """Which keys each of the next `queries` positions may see, bool [1 or B, 1, S, T]; None where it is all."""
        return causal_mask(queries, self.length, self.left_padding)

    def is_trimmable(self) -> bool:
        return True

    def trim(self, tokens: int) -> int:
        """Forgets the last `tokens` tokens in every part. Returns how many there were to forget."""
        tokens = max(0, min(tokens, self.length))
        self.length -= tokens
        if self.has_indexer:
            self.index_length = min(self.index_length, self.length)
        return tokens

    def to_quantized(self, **_: Any) -> None:
        """mlx-lm asks for this under --kv-bits. Raises: ignoring it in silence is what stock mlx-lm does here."""
        raise ValueError(
            "this cache keeps latents in the model's dtype; KV quantization (--kv-bits) is not supported yet"
        )

    def size(self) -> int:
        return self.length

    def empty(self) -> bool:
        return self.latent is None

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.latent, self.k_rope, self.index_keys) if part is not None)

    @property
    def state(self) -> tuple[Any, ...]:
        return (
            self.latent, self.k_rope, self.index_keys, self.left_padding,
            self.has_indexer, self.start, self.length, self.index_length,
        )  # fmt: skip

    @state.setter
    def state(self, value: tuple[Any, ...]) -> None:
        self.latent, self.k_rope, self.index_keys, self.left_padding, *rest = value
        has_indexer, start, length, index_length = rest
        self.has_indexer = bool(has_indexer)
        self.start, self.length, self.index_length = int(start), int(length), int(index_length)

    @classmethod
    def from_state(cls, state: tuple[Any, ...]) -> LayerCache:
        cache = cls.__new__(cls)
        cache.state = state
        return cache


def causal_mask(queries: int, offset: int, left_padding: mx.array | None = None) -> mx.array | None:
    """mask[s, t] = t <= offset + s, and t is no pad. bool [1 or B, 1, S, T]; None for one query without padding."""
    if queries == 1 and left_padding is None:
        return None
    keys = mx.arange(offset + queries)
    mask = keys <= (offset + mx.arange(queries))[:, None]  # [S, T]
    mask = mask[None, None]
    return mask if left_padding is None else mask & (keys >= left_padding[:, None, None, None])


def _store(buffer: mx.array | None, new: mx.array, at: int) -> mx.array:
    end = at + new.shape[1]
    if buffer is None or buffer.shape[1] < end:
        size = -(-end // STEP) * STEP
        grown = mx.zeros((new.shape[0], size, new.shape[2]), new.dtype)
        if buffer is not None:
            grown[:, :at] = buffer[:, :at]
        buffer = grown
    buffer[:, at:end] = new
    return buffer
