"""Linear maps that are not `nn.Linear`: one per attention head, one per expert. With their quantized forms.

Parameter names and shapes are those of mlx-lm's `MultiLinear` and `SwitchLinear`, so that its checkpoints load.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn


class _Stacked(nn.Module):
    """A stack of N matrices, weight [N, out, in]."""

    def __init__(self, count: int, outputs: int, inputs: int) -> None:
        super().__init__()
        bound = inputs**-0.5
        self.weight = mx.random.uniform(low=-bound, high=bound, shape=(count, outputs, inputs))


class _QuantizedStacked(nn.Module):
    """Packed as `mx.quantize` packs; `global_scale` (nvfp4 only): a float32 scale for each matrix besides."""

    plain_class = _Stacked

    def __init__(self, weight: mx.array, group_size: int, bits: int, mode: str, global_scale: bool = False) -> None:
        super().__init__()
        self.group_size, self.bits, self.mode = group_size, bits, mode
        if global_scale:
            self.global_scale = mx.abs(weight).max(axis=(-2, -1)).astype(mx.float32)
            packed = [
                mx.quantize(w, **self.packing(), global_scale=g) for w, g in zip(weight, self.global_scale, strict=True)
            ]
            self.weight = mx.stack([parts[0] for parts in packed])
            self.scales = mx.stack([parts[1] for parts in packed])
        else:
            self.weight, self.scales, *biases = mx.quantize(weight, **self.packing())
            if biases:
                self.biases = biases[0]
        self.freeze()

    def packing(self) -> dict[str, Any]:
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def dequantized(self) -> _Stacked:
        """The unpacked module that this one stands for."""
        biases, scale = self.get("biases"), self.get("global_scale")
        if scale is None:
            weight = mx.dequantize(self.weight, self.scales, biases, **self.packing())
        else:
            parts = zip(self.weight, self.scales, scale, strict=True)
            weight = mx.stack([mx.dequantize(w, s, None, **self.packing(), global_scale=g) for w, s, g in parts])
        plain = self.plain_class(*weight.shape)
        plain.weight = weight
        return plain


class QuantizedMultiLinear(_QuantizedStacked):
    def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
        return mx.quantized_matmul(
            x, self["weight"], self["scales"], self.get("biases"), transpose=transpose, **self.packing()
        )


class MultiLinear(_Stacked):
    """One map for each head: [B, H, S, in] -> [B, H, S, out]; `transpose=False` runs it the other way round."""

    def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
        return x @ (self.weight.swapaxes(-1, -2) if transpose else self.weight)

    def to_quantized(self, group_size: int = 64, bits: int = 4, mode: str = "affine") -> QuantizedMultiLinear:
        return QuantizedMultiLinear(self.weight, group_size, bits, mode)


class QuantizedSwitchLinear(_QuantizedStacked):
    def __call__(self, x: mx.array, experts: mx.array, sorted_indices: bool = False) -> mx.array:
        return mx.gather_qmm(
            x, self["weight"], self["scales"], self.get("biases"), rhs_indices=experts, transpose=True,
            sorted_indices=sorted_indices, global_scale=self.get("global_scale"), **self.packing(),
        )  # fmt: skip


class SwitchLinear(_Stacked):
    """One map for each expert: x [..., 1, in], experts int [...] -> [..., 1, out]."""

    def __call__(self, x: mx.array, experts: mx.array, sorted_indices: bool = False) -> mx.array:
        weight, dtype = self.weight, x.dtype
        if weight.dtype != mx.float32 and mx.default_device() == mx.Device(mx.cpu):
            # mlx 0.32 on CPU: "GatherMM ... only supports float32". Exact, since float32 holds every 16-bit value.
            x, weight = x.astype(mx.float32), weight.astype(mx.float32)
        out = mx.gather_mm(x, weight.swapaxes(-1, -2), rhs_indices=experts, sorted_indices=sorted_indices)
        return out.astype(dtype)

    def to_quantized(
        self, group_size: int = 64, bits: int = 4, mode: str = "affine", global_scale: bool = False
    ) -> QuantizedSwitchLinear:
        return QuantizedSwitchLinear(self.weight, group_size, bits, mode, global_scale)


QuantizedMultiLinear.plain_class = MultiLinear
QuantizedSwitchLinear.plain_class = SwitchLinear
