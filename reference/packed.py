"""What a packed matrix means: mlx's formats, read from their definitions. No mlx: this is what its own unpacking is held to.

Codes of `bits` bits follow one another in a stream of little-endian bits, through the bytes of a row. By mode

    affine   code q (unsigned)        w = scale * q + bias          scale, bias: a float for each group
    mxfp4    code is a float, e2m1    w = 2^(scale - 127) * q       scale: a byte for each group of 32 (OCP MX v1.0)
    mxfp8    code is a float, e4m3    w = 2^(scale - 127) * q       as above
    nvfp4    code is a float, e2m1    w = scale * q [* global / (448 * 6)]    scale: a float e4m3 for each group of 16
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FLOAT_MODES = {(4, 16): "nvfp4", (4, 32): "mxfp4", (8, 32): "mxfp8"}  # (bits, group size): all others are affine
AFFINE_BITS, AFFINE_GROUPS = (2, 3, 4, 5, 6, 8), (16, 32, 64, 128)


@dataclass(frozen=True)
class Packing:
    bits: int
    group_size: int
    mode: str

    @classmethod
    def of(cls, words: Sequence[int], scales: torch.Tensor, width: int) -> Packing:
        """From the words' shape and the scales of a matrix whose rows hold `width` values. Raises ValueError where they do
        not fit."""
        bits, left = divmod(32 * words[-1], width)
        group_size, over = divmod(width, scales.shape[-1])
        is_float = scales.dtype == torch.uint8
        mode = FLOAT_MODES.get((bits, group_size)) if is_float else "affine"
        fits = mode is not None and (is_float or (bits in AFFINE_BITS and group_size in AFFINE_GROUPS))
        if left or over or not fits:
            raise ValueError(
                f"words {list(words)} and scales {list(scales.shape)} {scales.dtype} do not pack rows of {width}"
            )
        return cls(bits, group_size, mode or "")


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """words uint32 [.., W * bits / 32] -> codes uint8 [.., W]."""
    stream = words.contiguous().view(torch.uint8)
    if bits == 8:
        return stream
    if 8 % bits == 0:
        codes = torch.empty(*stream.shape[:-1], stream.shape[-1] * 8 // bits, dtype=torch.uint8)
        for i in range(8 // bits):  # written in place: twice as fast as stacking
            codes[..., i :: 8 // bits] = (stream >> (bits * i)) & (2**bits - 1)
        return codes
    eights = stream.unflatten(-1, (-1, bits))  # 8 codes in `bits` bytes
    together = sum(eights[..., i].long() << (8 * i) for i in range(bits))
    return torch.stack([(together >> (bits * i)) & (2**bits - 1) for i in range(8)], -1).to(torch.uint8).flatten(-2)


def dequantize(
    words: torch.Tensor,
    scales: torch.Tensor,
    biases: torch.Tensor | None,
    packing: Packing,
    global_scale: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """-> [.., W] of `dtype`, computed in it. `global_scale` (nvfp4 only): float32, one for each matrix."""
    codes = unpack(words, packing.bits).unflatten(-1, (-1, packing.group_size))
    if packing.mode == "affine":
        assert biases is not None
        values = codes.to(dtype).mul_(scales.to(dtype)[..., None]).add_(biases.to(dtype)[..., None])
        return values.flatten(-2)
    if packing.mode == "mxfp8":
        values = codes.view(torch.float8_e4m3fn).to(dtype)
    else:
        table = torch.tensor([*E2M1, *(-x for x in E2M1)], dtype=dtype)
        values = table[codes.int()]
    if packing.mode == "nvfp4":
        scale = scales.view(torch.float8_e4m3fn).to(dtype)
        if global_scale is not None:
            scale = scale * (global_scale.to(dtype) / (448 * 6)).reshape(
                *global_scale.shape, *[1] * (scale.dim() - global_scale.dim())
            )
    else:
        scale = torch.pow(torch.tensor(2.0, dtype=dtype), scales.to(dtype) - 127)
    return (values * scale[..., None]).flatten(-2)
