"""mlx-lm's LoRA around our stacked experts."""

from __future__ import annotations

from typing import Any

from mlx_lm.tuner.lora import LoRASwitchLinear

from ..linear import QuantizedSwitchLinear, SwitchLinear


class LoRAExperts(LoRASwitchLinear):
    """mlx-lm's low-rank update of stacked experts, around ours. (Its own asks for the classes and attributes of its own.)"""

    @staticmethod
    def from_base(linear: Any, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> LoRAExperts:
        experts, outputs, inputs = linear.weight.shape
        if isinstance(linear, QuantizedSwitchLinear):
            inputs = inputs * 32 // linear.bits
        lora = LoRAExperts(inputs, outputs, experts, r=r, dropout=dropout, scale=scale)
        lora.linear = linear
        return lora

    def fuse(self, dequantize: bool = False) -> Any:
        linear = self.linear
        plain = linear.dequantized() if isinstance(linear, QuantizedSwitchLinear) else linear
        fused = SwitchLinear(*plain.weight.shape)
        fused.weight = plain.weight + (self.scale * self.lora_b @ self.lora_a).astype(plain.weight.dtype)
        if linear is plain or dequantize:
            return fused
        return fused.to_quantized(**linear.packing(), global_scale="global_scale" in linear)


def to_lora(self: Any, r: int, scale: float, dropout: float) -> LoRAExperts:
    return LoRAExperts.from_base(self, r, dropout, scale)
