"""Those that came afterwards, at the end: the diagnosis withholds each fifth of the catalogue by its order."""

from __future__ import annotations

from collections.abc import Iterator

from ..edits import Edit
from ..fault import OPERATIONS, Fault
from . import lossy_choices, norms, sixteen_bit

# fmt: off


def faults() -> Iterator[Fault]:
    yield Fault("filter-drops-announced-padding", "cache", "rows are filtered before the pads have come, and come without them",
                (Edit("cache.LayerCache._rows", "min(self.length, *(padding[row] for row in rows))",
                      "min(padding[row] for row in rows)"),), OPERATIONS, "batch", "left padding, filtered before the first token")
    yield from lossy_choices.faults()
    yield from norms.faults()
    yield from sixteen_bit.faults()
