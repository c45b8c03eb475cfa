"""How a tensor is kept in an MLX build, and what that takes: plain values, or words with a scale for each group of them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from ..weights import AFFINE_BITS, AFFINE_GROUPS, MODES

AFFINE = "affine"
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
FIXED = {mode: packing for packing, mode in MODES.items()}  # mode: its one (bits, group size)


@dataclass(frozen=True)
class Format:
    """Plain values of `dtype`; or, with `bits`, packed by `mx.quantize` along the last axis. `dtype` is then that of affine
    scales and biases (the other modes keep scales of one byte)."""

    dtype: str
    bits: int = 0
    group_size: int = 0
    mode: str = AFFINE

    @property
    def is_packed(self) -> bool:
        return self.bits > 0

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Of a tensor of this shape, scales and biases included."""
        values = prod(shape)
        if not self.is_packed:
            return values * BYTES[self.dtype]
        scale = 2 * BYTES[self.dtype] if self.mode == AFFINE else 1
        return values * self.bits // 8 + values // self.group_size * scale

    def packing(self) -> dict[str, int | str]:
        """As `mx.quantize` takes it, and config.json says it."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def __str__(self) -> str:
        if not self.is_packed:
            return NAMES[self.dtype]
        mode = "" if self.mode == AFFINE else f" {self.mode}"
        return f"{self.bits} bit{mode}, groups of {self.group_size}"


def packed(dtype: str, bits: int | None, group_size: int | None, mode: str | None) -> Format:
    """The format asked for, what is not said filled in (affine; 4 bit in groups of 64). Raises ValueError."""
    mode = AFFINE if mode is None else mode
    if mode != AFFINE:
        if not isinstance(mode, str) or mode not in FIXED:
            raise ValueError(f"mode {mode!r}: expected one of {AFFINE}, {', '.join(sorted(FIXED))}")
        due = FIXED[mode]
        for name, value, its in (("bits", bits, due[0]), ("group_size", group_size, due[1])):
            if value is not None and (type(value) is not int or value != its):
                raise ValueError(f"{name} = {value} and mode {mode!r} conflict: {mode} has {its}")
        return Format(dtype, *due, mode)
    bits, group_size = 4 if bits is None else bits, 64 if group_size is None else group_size
    for name, value, allowed in (("bits", bits, AFFINE_BITS), ("group_size", group_size, AFFINE_GROUPS)):
        if type(value) is not int or value not in allowed:
            raise ValueError(f"{name} = {value!r}: expected one of {', '.join(map(str, allowed))}")
    return Format(dtype, bits, group_size)
