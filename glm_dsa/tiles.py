"""How much is worked on at once. Memory is set by these tiles, whatever the context; results do not depend on them."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

# Values of the largest array in a tile. On a CPU it is to stay in the cache (2 MB); a GPU is to be kept busy (256 MB).
ELEMENTS = {mx.DeviceType.cpu: 1 << 19, mx.DeviceType.gpu: 1 << 26}


def elements() -> int:
    return ELEMENTS[mx.default_device().type]


def transposed(x: mx.array) -> mx.array:
    """[.., a, b] -> [.., b, a], as the right side of a product: on a CPU a copy, since a view takes twice as long."""
    turned = x.swapaxes(-1, -2)
    return mx.contiguous(turned) if mx.default_device().type == mx.DeviceType.cpu else turned


def ranges(end: int, size: int) -> Iterator[range]:
    """0 .. end in pieces of `size`."""
    for start in range(0, end, size):
        yield range(start, min(start + size, end))
