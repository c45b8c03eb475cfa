"""Which keys a query may see, kept as numbers: written out for all queries and keys a mask would grow with S times T."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class CausalMask:
    """For `queries` new tokens in the columns from `first` on: each sees the columns up to its own, but for the pads.

    pads: how many columns at the left of each row are padding; None where there is none.
    """

    first: int
    queries: int
    pads: tuple[int, ...] | None = None

    @property
    def keys(self) -> int:
        return self.first + self.queries

    def tile(self, rows: range, columns: range) -> mx.array | None:
        """bool [1 or B, s, t] for some of the queries and keys; None where each of these sees each."""
        if columns.stop <= self.first + rows.start + 1 and columns.start >= max(self.pads or (0,)):
            return None
        return self.sees(rows, mx.arange(columns.start, columns.stop))

    def picked(self, rows: range, columns: mx.array) -> mx.array | None:
        """bool [B, s, K] for the columns chosen by each of some queries, int [B, s, K].

        None where no row is padded and each sees K keys or more: a selection has masked keys only for want of others.
        """
        if self.pads is None and columns.shape[-1] <= self.first + rows.start + 1:
            return None
        return self.sees(rows, columns)

    def sees(self, rows: range, columns: mx.array) -> mx.array:
        """columns int [t] or [B, s, t] -> bool [1 or B, s, t]."""
        own = mx.arange(self.first + rows.start, self.first + rows.stop)[:, None]
        seen = mx.expand_dims(columns <= own, 0) if columns.ndim == 1 else columns <= own
        return seen if self.pads is None else seen & (columns >= mx.array(self.pads)[:, None, None])

    def whole(self) -> mx.array | None:
        """bool [1 or B, 1, S, T], as attention over all keys takes it; None where every query sees all."""
        mask = self.tile(range(self.queries), range(self.keys))
        return None if mask is None else mask[:, None]
