"""Rotary embedding: both layouts, near and far positions, and the scalings, against HF's functions and float64."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as half_split
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as interleaved

from glm_dsa import ModelArgs
from glm_dsa.rope import RotaryEmbedding, rotate, softmax_scale
from reference import checkpoints, equations, hf
from reference.capture import reinterleave
from verify.claims import half
from verify.core import bounds, compare
from verify.engines.definition import to_numpy

CLAIM = "rope, both layouts"
POSITIONS = (0, 17, 2_047, 32_768, 202_744, 999_992, 1_048_568)
YARN = {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}
SCALINGS = {
    "theta 1e6": {"rope_theta": 1000000, "rope_type": "default"},
    "theta 8e6": {"rope_theta": 8000000, "rope_type": "default"},
    "linear": {"rope_theta": 1000000, "rope_type": "linear", "factor": 4.0},
    "yarn": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0},
    "yarn with mscale": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
    "yarn, other betas": {**YARN, "beta_fast": 12.0, "beta_slow": 2.0},
    "yarn, not truncated": {**YARN, "truncate": False},
    "yarn, attention factor": {**YARN, "attention_factor": 1.3},
    "yarn, mscale alone": {**YARN, "mscale": 1.0},
    "yarn, trained on 131072": {**YARN, "original_max_position_embeddings": 131072},
    "yarn, factor 1": {**YARN, "factor": 1.0},
    "yarn, factor 1.5": {**YARN, "factor": 1.5},
    "yarn, ramp from before the first pair": {**YARN, "original_max_position_embeddings": 64},
    "yarn, ramp to behind the last pair": {**YARN, "original_max_position_embeddings": 131072, "beta_slow": 1e-4},
    "yarn, ramp of no width": {**YARN, "beta_fast": 8.0, "beta_slow": 8.0, "truncate": False},
}


def config_of(scaling: str) -> dict:
    return checkpoints.tiny(
        rope_parameters=dict(SCALINGS[scaling]), qk_rope_head_dim=64, qk_head_dim=76, index_head_dim=128
    )


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("layout", ["interleaved", "half-split"])
@pytest.mark.parametrize("theta", ["theta 1e6", "theta 8e6"])
def test_rotation(judge, theta, layout, position):
    """Eight positions at a time, so that a bound that is wide at 1M does not cover a fault at 17."""
    config = config_of(theta)
    at = position + np.arange(8)[None]
    x = np.random.default_rng(position).standard_normal((1, 8, 4, 64)).astype(np.float32)
    truth = equations.rope(x.astype(np.float64), at, config, layout)
    ref = rotated_by_hf(config, x, at, layout)
    ours = to_numpy(rotate(mx.array(x), RotaryEmbedding(ModelArgs.from_dict(config))(mx.array(at)), layout))
    explained = max(1e-6, (position + 8) * 2.0**-21)  # an angle p * f is off by an ulp or two of p
    bound = bounds.bound(compare.values(ref, truth).error, ref, 0, explained=explained)
    judge.values(f"{theta} {layout}", f"position {position}", ours, ref, bound)


def rotated_by_hf(config, x, at, layout):
    """By the functions that HF's two indexers call; in the order of x."""
    q = torch.from_numpy(x)
    cos, sin = interleaved.GlmMoeDsaRotaryEmbedding(hf.config_for(config))(q, torch.from_numpy(at))
    if layout == "half-split":
        return half_split.apply_rotary_pos_emb(q, q, cos, sin, unsqueeze_dim=2)[0].numpy()
    turned, _ = interleaved.apply_rotary_pos_emb_interleave(q, q, cos, sin, unsqueeze_dim=2)
    return reinterleave(turned.numpy(), 64)


@pytest.mark.parametrize("dtype", half.DTYPES)
@pytest.mark.parametrize("layout", ["interleaved", "half-split"])
def test_turning_16_bit_values(judge, layout, dtype):
    """By angles in float32, and rounded once: on pairs of which the turn leaves next to nothing in one value."""
    config, at = config_of("theta 1e6"), POSITIONS[1] + np.arange(8)[None]
    near = np.random.default_rng(at[0, 0]).uniform(0.99, 1.01, (1, 8, 4, 64))
    # turned forward, (cos, -sin) of an angle is (1, 0)
    x, exact = half.rounded(equations.rope(near * _first_of_pairs(layout), -at, config, layout), dtype)
    ours = rotate(x, RotaryEmbedding(ModelArgs.from_dict(config))(mx.array(at)), layout)
    float32 = (2 * at.max() + 8) * bounds.HALF_ULP  # of an angle, its cosine, two products and a sum
    judge.holds(f"{layout}, {dtype}", "position 17", ours.dtype == half.DTYPES[dtype], f"the dtype stays ({ours.dtype})")
    off = half.roundings(ours, equations.rope(exact, at, config, layout), 2 * float32, dtype)
    judge.at_most(f"{layout}, {dtype}", "position 17", off, 1.0, "turned in float32, rounded once")


def _first_of_pairs(layout):
    """1 at the first of each pair of 64 values, 0 at the second."""
    return (np.arange(64) % 2 == 0) if layout == "interleaved" else np.arange(64) < 32


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("width", [64, 16])
def test_frequencies(judge, scaling, width):
    config = config_of(scaling) | {"qk_rope_head_dim": width, "qk_head_dim": 12 + width}
    built = hf.config_for(config)
    rope_type = built.rope_parameters["rope_type"]
    if rope_type == "default":
        theirs, magnitude = interleaved.GlmMoeDsaRotaryEmbedding.compute_default_rope_parameters(built)
    else:
        theirs, magnitude = ROPE_INIT_FUNCTIONS[rope_type](built, torch.device("cpu"))
    args = ModelArgs.from_dict(config)
    ours = RotaryEmbedding(args)
    truth, true_magnitude = equations.rope_frequencies(config)
    judge.holds(
        scaling,
        "magnitude",
        abs(ours.magnitude - magnitude) < 1e-6 and abs(true_magnitude - magnitude) < 1e-6,
        f"factor on cos and sin {magnitude:.6g}",
    )
    relative = np.abs(to_numpy(ours.frequencies) / truth - 1).max()
    judge.holds(scaling, "frequencies", relative <= 2.0**-23, f"exact to the last bit of float32 ({relative:.1e})")
    hf_relative = np.abs(theirs.double().numpy() / truth - 1).max()
    judge.holds(scaling, "frequencies", hf_relative <= 2.0**-20, f"HF and the equations agree ({hf_relative:.1e})")
    for name, applied, plain in zip(("cos", "sin"), ours(mx.array([1])), (np.cos(truth), np.sin(truth)), strict=True):
        apart = np.abs(to_numpy(applied)[0] - magnitude * plain).max()
        judge.holds(scaling, "magnitude", apart < 1e-6, f"it is applied to {name}")
    scale = interleaved.yarn_apply_mscale(built.rope_parameters, args.qk_head_dim**-0.5)
    own = softmax_scale(args)
    judge.holds(
        scaling, "softmax scale", abs(own / scale - 1) < 1e-12, f"expected {scale:.6g}, YaRN's mscale included, got {own:.6g}"
    )
