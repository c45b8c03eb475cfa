"""Linear maps that are not `nn.Linear`: one per attention head, one per expert. With their quantized forms.

Parameter names and shapes are those of mlx-lm's `MultiLinear` and `SwitchLinear`, so that its checkpoints load.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


class _Stacked(nn.Module):
    """A stack of N matrices, weight [N, out, in]; quantizes as `nn.Linear` does."""

    def __init__(self, count: int, outputs: int, inputs: int) -> None:
        super().__init__()
        bound = inputs**-0.5
        self.weight = mx.random.uniform(low=-bound, high=bound, shape=(count, outputs, inputs))

    quantized: type[_QuantizedStacked]

    def to_quantized(self, group_size: int = 64, bits: int = 4, mode: str = "affine") -> _QuantizedStacked:
        return self.quantized(self.weight, group_size, bits, mode)


class _QuantizedStacked(nn.Module):
    def __init__(self, weight: mx.array, group_size: int, bits: int, mode: str) -> None:
        super().__init__()
        self.group_size, self.bits, self.mode = group_size, bits, mode
        self.weight, self.scales, *biases = mx.quantize(weight, group_size, bits, mode=mode)
        if biases:
            self.biases = biases[0]
        self.freeze()

    def packing(self) -> dict:
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


class QuantizedMultiLinear(_QuantizedStacked):
    def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
        return mx.quantized_matmul(
            x, self["weight"], self["scales"], self.get("biases"), transpose=transpose, **self.packing()
        )


class MultiLinear(_Stacked):
    """One map for each head: [B, H, S, in] -> [B, H, S, out]; `transpose=False` runs it the other way round."""

    quantized = QuantizedMultiLinear

    def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
        return x @ (self.weight.swapaxes(-1, -2) if transpose else self.weight)


class QuantizedSwitchLinear(_QuantizedStacked):
    def __call__(self, x: mx.array, experts: mx.array, sorted_indices: bool = False) -> mx.array:
        return mx.gather_qmm(
            x, self["weight"], self["scales"], self.get("biases"), rhs_indices=experts, transpose=True,
            sorted_indices=sorted_indices, **self.packing(),
        )  # fmt: skip


class SwitchLinear(_Stacked):
    """One map for each expert: x [..., 1, in], experts int [...] -> [..., 1, out]."""

    quantized = QuantizedSwitchLinear

    def __call__(self, x: mx.array, experts: mx.array, sorted_indices: bool = False) -> mx.array:
        weight, dtype = self.weight, x.dtype
        if weight.dtype != mx.float32 and mx.default_device() == mx.Device(mx.cpu):
            # mlx 0.32 on CPU: "GatherMM ... only supports float32". Exact, since float32 holds every 16-bit value.
            x, weight = x.astype(mx.float32), weight.astype(mx.float32)
        out = mx.gather_mm(x, weight.swapaxes(-1, -2), rhs_indices=experts, sorted_indices=sorted_indices)
        return out.astype(dtype)
