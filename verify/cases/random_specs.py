"""Random small checkpoints, of every architecture and convention that the definition knows: `pytest verify/ --random N`."""

from __future__ import annotations

from typing import Any

import numpy as np

from reference import checkpoints

from . import Spec

LAYOUTS = ("interleaved", "half-split")


def random_specs(count: int, seed: int = 0) -> list[Spec]:
    """The i-th one is the same for any count. Their weights follow --seed, as those of the gate's own cases do."""
    return [_spec(i, np.random.default_rng([seed, i])) for i in range(count)]


def _spec(number: int, random: np.random.Generator) -> Spec:
    def pick(*options: Any) -> Any:
        return options[int(random.integers(len(options)))]

    layers, groups = pick(2, 3, 4), pick(1, 1, 2, 4)
    nope, rope = pick(8, 12, 20, 32), pick(8, 16, 32)
    experts = pick(8, 12, 16, 24)
    top_groups = pick(*range(1, groups + 1))
    changes: dict[str, Any] = {
        "num_hidden_layers": layers,
        "first_k_dense_replace": pick(*range(layers)),
        "hidden_size": pick(48, 64, 80, 96),
        "intermediate_size": pick(64, 96),
        "num_attention_heads": (heads := pick(2, 3, 4)),
        "num_key_value_heads": heads,
        "q_lora_rank": pick(32, 48),
        "kv_lora_rank": pick(32, 48, 64),
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "qk_head_dim": nope + rope,
        "v_head_dim": pick(12, 20, 24),
        "attention_bias": pick(False, False, True),
        "n_routed_experts": experts,
        "num_experts_per_tok": min(pick(1, 2, 4), experts // groups * top_groups),
        "moe_intermediate_size": pick(16, 32),
        "n_shared_experts": pick(1, 1, 2),
        "n_group": groups,
        "topk_group": top_groups,
        "norm_topk_prob": pick(True, True, False),
        "routed_scaling_factor": pick(1.0, 1.8, 2.5),
        "rms_norm_eps": pick(1e-6, 1e-5, 1e-2),
        "tie_word_embeddings": pick(False, False, True),
        "vocab_size": pick(97, 160, 300),
        "num_nextn_predict_layers": pick(0, 1, 1),
    }
    theta = pick(10_000, 1_000_000, 8_000_000)
    overrides: dict[str, Any] = {"latent_norm_eps": pick(None, None, 1e-5)}
    bias = pick(0.0, 0.0, -1.2)
    if number % 6 == 5:
        overrides["main_rope"] = pick(None, "half-split")
        config = checkpoints.glm_4_7(**changes | {"qk_head_dim": None, "rope_theta": theta})
        return Spec(f"random-{number}", config, _given(overrides), bias)
    types = ["full", *(pick("full", "shared", "shared") for _ in range(layers - 1))]
    changes |= pick(
        {}, {"indexer_types": types}, {"index_topk_freq": pick(2, 3), "index_skip_topk_offset": pick(1, 2, 3)}
    )
    changes["index_share_for_mtp_iteration"] = pick(True, False)
    changes["index_topk"] = pick(8, 12, 16)
    changes["index_n_heads"] = pick(1, 2, 4, 8, 16, 24, 32, 64)  # few make exact ties: the ReLU leaves scores of 0
    changes["index_head_dim"] = rope + pick(0, 8, 24)
    yarn = {
        "factor": pick(4.0, 40.0),
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": pick(0.7, 1.0),
    }
    scaling = pick({}, {}, {"rope_type": "linear", "factor": 4.0}, {"rope_type": "yarn", **yarn})
    changes["rope_parameters"] = {"rope_theta": theta, "rope_type": "default"} | scaling
    overrides["indexer_rope"] = pick(*LAYOUTS)
    overrides["mtp_zero_first_embedding"] = pick(None, True) if changes["num_nextn_predict_layers"] else None
    prompts = pick("random", "random", "repeated", "constant")
    return Spec(f"random-{number}", checkpoints.tiny(**changes), _given(overrides), bias, prompts=prompts)


def _given(overrides: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in overrides.items() if value is not None}
