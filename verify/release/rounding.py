"""What rounding to a format does to rows: the yardstick by which damage is told from it.

A row is rounded as mlx does, and so are the same row a little larger (the steps of a float format fall elsewhere then) and the
row with its peaks cut (MX's own rule for exponents, where mlx's is to cut nothing): sound packings differ by as much.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import torch

from glm_dsa import weights
from reference.packed import Packing

HALF_ULP = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 0.0, "F64": 0.0}
TINY = {"F16": 2.0**-24}  # fp16's smallest number
PHASES = {"mxfp4": 4, "nvfp4": 4, "mxfp8": 16, "fp8": 16}  # of an octave: twice as many as a format has steps there
TYPICAL = {"mxfp4": 0.12, "nvfp4": 0.11, "mxfp8": 0.028, "fp8": 0.028}  # relative rms of rounding, on normal weights
LARGEST = {"mxfp4": (6.0, 2), "mxfp8": (448.0, 8)}  # number of its values, and its exponent
SMALLEST_E4M3 = 2.0**-9


@dataclass(frozen=True)
class Form:
    """How a matrix is stored: a dtype, or packed, its scales in a dtype of their own."""

    dtype: str
    packed: Packing | None = None
    scales: torch.dtype = torch.bfloat16

    @property
    def is_rounded(self) -> bool:
        """In groups with scales: of an error per value nothing is known."""
        return self.packed is not None or self.dtype == "F8_E4M3"

    @property
    def mode(self) -> str:
        return self.packed.mode if self.packed else "fp8"

    def group(self, width: int) -> int:
        return self.packed.group_size if self.packed else min(weights.FP8_BLOCK, width)

    def floor(self, theirs: torch.Tensor) -> torch.Tensor:
        """What scales that are too small for their dtype cost the groups of a matrix [R, W], rms: [R, G], or [1] of all alike."""
        if self.packed and self.mode == "affine" and self.scales == torch.float16:
            return torch.tensor([TINY["F16"] * 2.0**self.packed.bits])
        if self.mode == "nvfp4":  # without a scale of the whole matrix, groups below 6 * 2^-10 are zero
            groups = theirs.unflatten(-1, (-1, self.group(theirs.shape[-1])))
            scale = groups.abs().amax(-1) / 6
            lost = (SMALLEST_E4M3 / 2 / scale).clamp(max=1.0) * (scale < SMALLEST_E4M3 * 8)
            return lost.nan_to_num(0.0) * groups.square().mean(-1).sqrt()
        if self.mode == "fp8":  # a block's smallest steps are those of its largest value
            return _peaks(theirs).repeat_interleave(weights.FP8_BLOCK, 0)[: len(theirs)] / 448 * SMALLEST_E4M3 / 2
        return torch.zeros(1)


class Yard(NamedTuple):
    """Of each row: the least and the greatest slope that rounding gives it, and the largest error, relative."""

    low: torch.Tensor
    high: torch.Tensor
    error: torch.Tensor


def yard(rows: torch.Tensor, form: Form) -> Yard:
    """rows: float32 [.., W] of an original; -> [..] each."""
    square = rows.square().sum(-1).clamp(min=1e-38)
    slopes, errors = [], []
    for each in roundings(rows, form):
        slopes.append((each * rows).sum(-1) / square)
        errors.append(((each - rows).square().sum(-1) / square).sqrt())
    slope, error = torch.stack(slopes), torch.stack(errors)
    return Yard(slope.amin(0), slope.amax(0), error.amax(0))


def roundings(rows: torch.Tensor, form: Form) -> Iterator[torch.Tensor]:
    """rows [R, W], whole groups: as sound packings round them, one after the other."""
    yield rounded(rows, form)
    phases = PHASES.get(form.mode, 0)
    for i in range(phases):
        phase = 2.0 ** (i / phases)
        if phase > 1:
            yield rounded(rows, form, phase)
        if form.mode in LARGEST:
            most, exponent = LARGEST[form.mode]
            groups = (rows * phase).unflatten(-1, (-1, form.group(rows.shape[-1])))
            peak = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30)
            cut = most * 2.0 ** (peak.log2().floor() - exponent)
            yield rounded(groups.clamp(-cut, cut).flatten(-2), form) / phase


def rounded(x: torch.Tensor, form: Form, phase: float = 1.0) -> torch.Tensor:
    """What mlx's packing, or FP8, makes of x [R, W]. phase: by how much larger it is to be when its values meet the steps."""
    if form.packed is None:
        block = weights.FP8_BLOCK
        blocks = torch.nn.functional.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
        scale = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-12) * phase / 448
        return ((blocks / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2)[..., : x.shape[-1]]
    own: Any = {"group_size": form.packed.group_size, "bits": form.packed.bits, "mode": form.packed.mode}
    words, *others = mx.quantize(mx.array((x * phase).numpy()).astype(mx.bfloat16), **own)  # scales in bf16, as usual
    floats: Any = [p.astype(mx.float32) if mx.issubdtype(p.dtype, mx.floating) else p for p in others]
    return torch.from_numpy(np.array(mx.dequantize(words, *floats, **own).astype(mx.float32))) / phase


def _peaks(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each block of FP8, [R, W] -> [R / 128, W / 128], the last ones smaller."""
    block = weights.FP8_BLOCK
    whole = torch.nn.functional.pad(x.abs(), (0, -x.shape[-1] % block, 0, -len(x) % block))
    return whole.unflatten(0, (-1, block)).unflatten(-1, (-1, block)).amax((1, 3))
