"""Rotary position embedding, in both layouts, for any position.

Angles are computed once for each forward pass, in float32 as in HF and the trainer, from frequencies that are exact to the
last bit of float32 (HF's own are off by a bit or two). `mx.fast.rope` is not used: on Metal it calls the fast-math cosine, which
promises nothing at the angles of a long context.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import mlx.core as mx

from .config import INTERLEAVED, ModelArgs


class Rotation(NamedTuple):
    """cos and sin of each position's angles, [S, D/2] or [B, S, D/2], float32."""

    cos: mx.array
    sin: mx.array


class RotaryEmbedding:
    """Positions -> `Rotation`. Holds the frequencies; no parameters."""

    def __init__(self, args: ModelArgs) -> None:
        frequencies, self.magnitude = rope_frequencies(args.qk_rope_head_dim, args.rope_theta, args.rope_scaling)
        self.frequencies = mx.array(frequencies, dtype=mx.float32)  # [D/2]

    def __call__(self, positions: mx.array) -> Rotation:
        """positions: int, [S] or [B, S]."""
        angles = positions.astype(mx.float32)[..., None] * self.frequencies  # [..., S, D/2]
        return Rotation(mx.cos(angles) * self.magnitude, mx.sin(angles) * self.magnitude)


def rotate(x: mx.array, rotation: Rotation, layout: str) -> mx.array:
    """Turns each pair of x by its position's angle: (a, b) -> (a cos - b sin, b cos + a sin).

    x: [B, S, H, D], D as wide as the rotation. Pairs are neighbours (interleaved) or lie D/2 apart (half-split);
    the result keeps the layout of x and its dtype. Su et al., RoFormer, eq. 34.
    """
    cos, sin = rotation.cos[..., None, :], rotation.sin[..., None, :]  # [.., S, 1, D/2]
    if layout == INTERLEAVED:
        a, b = x[..., 0::2], x[..., 1::2]
        turned = mx.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).flatten(-2)
    else:
        a, b = mx.split(x, 2, axis=-1)
        turned = mx.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return turned.astype(x.dtype)


def rope_frequencies(width: int, theta: float, scaling: dict | None) -> tuple[list[float], float]:
    """Angle per position for each pair, and the factor on cos and sin (1 but for YaRN; arXiv 2309.00071)."""
    plain = [theta ** (-2 * i / width) for i in range(width // 2)]
    if scaling is None:
        return plain, 1.0
    factor = scaling["factor"]
    stretched = [f / factor for f in plain]
    if scaling["rope_type"] == "linear":
        return stretched, 1.0

    trained = scaling["original_max_position_embeddings"]

    def pair_that_turns(times: float) -> float:
        return width * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(scaling.get("beta_fast") or 32), pair_that_turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001  # a ramp needs some width
    ramp = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(width // 2)]
    frequencies = [p * (1 - r) + s * r for p, s, r in zip(plain, stretched, ramp, strict=True)]

    magnitude = scaling.get("attention_factor")
    if magnitude is None:
        mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        named = bool(mscale and all_dim)
        magnitude = yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim) if named else yarn_mscale(factor, 1.0)
    return frequencies, magnitude


def yarn_mscale(factor: Any, mscale: Any) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(args: ModelArgs) -> float:
    """qk_head_dim^-1/2, times mscale^2 for a scaled RoPE with `mscale_all_dim` (DeepSeek-V2, YaRN)."""
    scale = args.qk_head_dim**-0.5
    all_dim = (args.rope_scaling or {}).get("mscale_all_dim")
    return scale * yarn_mscale(args.rope_scaling["factor"], all_dim) ** 2 if args.rope_scaling and all_dim else scale
