"""Stage names, in the order in which the model computes them. One spelling: trace key, report key, command line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from glm_dsa.text import ranges

LAYER = re.compile(r"layers\.(\d+)\.(.*)")

IN_LAYER = (
    "eh_proj",
    "input_layernorm",
    "self_attn.q_latent",
    "self_attn.indexer.k",
    "self_attn.indexer.q",
    "self_attn.indexer.weights",
    "self_attn.indexer.scores",
    "self_attn.indexer.topk",
    "self_attn.selection",
    "self_attn.q_rope",
    "self_attn.kv_latent",
    "self_attn.k_rope",
    "self_attn.heads",
    "self_attn.output",
    "post_attention_layernorm",
    "mlp.gate.logits",
    "mlp.gate.topk",
    "mlp.gate.weights",
    "mlp.experts",
    "mlp.shared_experts",
    "mlp.output",
    "mlp_output",
    "output",
    "shared_head",
)
NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_latent", "self_attn.kv_latent", "norm")
SELECTIONS = ("self_attn.indexer.topk", "self_attn.selection")
ROUTING, ROUTING_LOGITS, ROUTING_WEIGHTS = "mlp.gate.topk", "mlp.gate.logits", "mlp.gate.weights"


def choices(stages: Mapping[str, Any], is_sparse: bool) -> dict[str, Any]:
    """Selections and routings, to be put in the place of others' own. Where every key is selected there is nothing to
    hand on but routings."""
    return {s: v for s, v in stages.items() if s.endswith(".topk") and (is_sparse or s.endswith(ROUTING))}


def of_rows(choices: Mapping[str, Any], rows: slice, topk: int) -> dict[str, Any]:
    """Of a whole prompt's choices, those of the tokens `rows`, to be handed to a call that has seen no later ones.

    The reference's early rows list masked keys of the future, which the call does not have: any masked key will do. Up to
    index_topk there is nothing to select."""
    cut = {stage: choice[:, rows] for stage, choice in choices.items()}
    return {
        stage: np.minimum(choice, rows.stop - 1) if is_selection(stage) else choice
        for stage, choice in cut.items()
        if rows.stop > topk or not is_selection(stage)
    }


def is_selection(stage: str) -> bool:
    return kind(stage) in SELECTIONS


def layer_of(stage: str) -> int | None:
    match = LAYER.fullmatch(stage)
    return int(match[1]) if match else None


def kind(stage: str) -> str:
    """The stage without its layer: `self_attn.indexer.scores`."""
    match = LAYER.fullmatch(stage)
    return match[2] if match else stage


def order(stage: str) -> tuple[int, int]:
    match = LAYER.fullmatch(stage)
    if match is None:
        return {"embed": (-1, 0), "norm": (1 << 20, 0), "logits": (1 << 20, 1)}[stage]
    return int(match[1]), IN_LAYER.index(match[2])


def in_order(stages: Iterable[str]) -> list[str]:
    return sorted(stages, key=order)


def compact(numbers: Iterable[int]) -> str:
    """{1, 2, 3, 5} -> "1-3, 5"."""
    return ranges(sorted(set(numbers)), ", ")


def layers_of(stages: Iterable[str]) -> str:
    """What to say of stages inside layers: "layers 0-4"; nothing of others."""
    layers = {layer for stage in stages if (layer := layer_of(f"{stage}.")) is not None}
    return f"layer{'s' if len(layers) > 1 else ''} {compact(layers)}" if layers else ""

MODULE_OUTPUTS = {  # a module's output -> the stage that it is
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    "self_attn.q_a_layernorm": "self_attn.q_latent",
    "self_attn.kv_a_layernorm": "self_attn.kv_latent",
    "self_attn.o_proj": "self_attn.output",
    "self_attn": "self_attn.output",
    "mlp.shared_experts": "mlp.shared_experts",
    "mlp": "mlp_output",
    "": "output",
    "norm": "norm",
    "lm_head": "logits",
}
INDEXER, ROUTER, EXPERTS = "self_attn.indexer", "mlp.gate", "mlp.experts"  # modules of more outputs than one


def kind_of(path: str) -> str:
    """`layers.3.self_attn.o_proj` -> `self_attn.o_proj`; a layer itself -> ""."""
    return kind(path + "." if path.count(".") == 1 else path).rstrip(".")


ROPE = "rope"
# What is to blame for a stage that is wrong by itself. RoPE's stages are those of attention and indexer too.
COMPONENTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("embedding", ("embed",)),
    (ROPE, ("self_attn.q_rope", "self_attn.k_rope", "self_attn.indexer.k", "self_attn.indexer.q")),
    ("indexer", tuple(f"self_attn.indexer.{part}" for part in ("k", "q", "weights", "scores", "topk"))),
    ("IndexShare", ("self_attn.selection",)),
    ("MLA", tuple(f"self_attn.{part}" for part in ("q_latent", "q_rope", "kv_latent", "k_rope", "heads", "output"))),
    ("router", ("mlp.gate.logits", "mlp.gate.topk", "mlp.gate.weights")),
    ("MoE", ("mlp.experts", "mlp.shared_experts", "mlp.output", "mlp_output")),
    ("decoder layer", ("input_layernorm", "post_attention_layernorm", "output")),
    ("MTP", ("eh_proj", "shared_head")),
    ("head", ("norm", "logits")),
)


def component(kinds: set[str]) -> str:
    """To blame for stages that are wrong by themselves. RoPE: where queries and keys of attention and indexer are, and only
    they."""
    if {"self_attn.q_rope", "self_attn.k_rope"} <= kinds <= set(dict(COMPONENTS)[ROPE]):
        return ROPE
    names = [name for name, own in COMPONENTS if name != ROPE and kinds & set(own)]
    return " and ".join(names) or "unknown"
