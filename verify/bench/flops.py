"""Multiplications and bytes of each part of a layer, on paper, and counted in the graph that mlx runs.

Bytes are those that must come from memory: weights once a call, cached vectors as often as they are read. What stays in a
cache (scores, gathered latents between their two uses) is not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any
from unittest.mock import patch

import mlx.core as mx

from glm_dsa import ModelArgs
from glm_dsa.attention import ABSORBED, EXPANDED, GATHERED


@dataclass(frozen=True)
class Count:
    """Multiplications (each with its addition: 2 operations), and bytes, of one call of S tokens."""

    multiplications: float = 0.0
    bytes: float = 0.0

    @property
    def operations(self) -> float:
        return 2 * self.multiplications

    def __add__(self, other: Count) -> Count:
        return Count(self.multiplications + other.multiplications, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Count:
        return Count(self.multiplications * times, self.bytes * times)


@dataclass(frozen=True)
class Sizes:
    """Bytes a value: of weights (0.4375: 3.5 bit), of cached latents, of cached index keys."""

    weights: float = 4.0
    latents: float = 4.0
    index_keys: float = 4.0


def projections(a: ModelArgs, queries: int, sizes: Sizes, absorbed: bool = True) -> Count:
    """The linear maps around attention; W_uk and W_uv too, where they act on queries (absorbed, gathered)."""
    heads, nope, rope = a.num_attention_heads, a.qk_nope_head_dim, a.qk_rope_head_dim
    weights = a.hidden_size * a.q_lora_rank + a.q_lora_rank * heads * (nope + rope)
    weights += a.hidden_size * (a.kv_lora_rank + rope) + heads * a.v_head_dim * a.hidden_size
    up = heads * a.kv_lora_rank * (nope + a.v_head_dim)
    return Count(queries * (weights + up * absorbed), (weights + up) * sizes.weights)


def indexer(a: ModelArgs, queries: int, context: int, sizes: Sizes, block: int | None = None) -> Count:
    """Of a full layer. block: queries that one reading of the keys serves (all, unless given)."""
    heads, width = a.index_n_heads, a.index_head_dim
    weights = a.q_lora_rank * heads * width + a.hidden_size * (width + heads)
    if context <= a.index_topk:  # only the key is made
        key = a.hidden_size * width
        return Count(queries * key, key * sizes.weights)
    readings = -(-queries // (block or queries))
    scored = queries * context * heads * (width + 1)  # and the sum over heads
    return Count(queries * weights + scored, weights * sizes.weights + readings * context * width * sizes.index_keys)


def attention(a: ModelArgs, form: str, queries: int, context: int, sizes: Sizes) -> Count:
    """Scores and sums of one form, over all heads."""
    heads, latent, rope = a.num_attention_heads, a.kv_lora_rank, a.qk_rope_head_dim
    if form == EXPANDED:
        pair = a.qk_nope_head_dim + rope + a.v_head_dim
        rebuilt = context * latent * (a.qk_nope_head_dim + a.v_head_dim)
        return Count(heads * (queries * context * pair + rebuilt), context * (latent + rope) * sizes.latents)
    seen = min(a.index_topk, context) if form == GATHERED else context
    read = queries * seen if form == GATHERED else context
    return Count(2 * heads * queries * seen * (latent + rope), read * (latent + rope) * sizes.latents)


def feed_forward(a: ModelArgs, layer: int, queries: int, sizes: Sizes) -> Count:
    """Dense, or router, chosen experts and shared expert. Of the experts' bytes, those that some of the tokens chose (if
    they choose evenly)."""
    if not a.is_sparse(layer):
        weights = 3 * a.hidden_size * a.intermediate_size
        return Count(queries * weights, weights * sizes.weights)
    expert, router = 3 * a.hidden_size * a.moe_intermediate_size, a.hidden_size * a.n_routed_experts
    chosen = a.num_experts_per_tok
    touched = a.n_routed_experts * (1 - (1 - chosen / a.n_routed_experts) ** queries)
    used = queries * (expert * (chosen + a.n_shared_experts) + router)
    return Count(used, (expert * (touched + a.n_shared_experts) + router) * sizes.weights)


def head(a: ModelArgs, queries: int, sizes: Sizes) -> Count:
    weights = a.hidden_size * a.vocab_size
    return Count(queries * weights, weights * sizes.weights)


def layer_parts(
    a: ModelArgs, layer: int, queries: int, context: int, form: str, sizes: Sizes, block: int | None = None
) -> dict[str, Count]:
    return {
        "projections": projections(a, queries, sizes, absorbed=form in (ABSORBED, GATHERED)),
        "indexer": indexer(a, queries, context, sizes, block) if a.runs_indexer(layer) else Count(),
        "attention": attention(a, form, queries, context, sizes),
        "feed-forward": feed_forward(a, layer, queries, sizes),
    }


# -- counted


def counted(function: Callable[..., Any], *inputs: mx.array) -> int:
    """Multiplications of all matrix products in the graph of `function`, as mlx would run it."""
    total = 0

    def note(node: dict[str, Any]) -> None:
        nonlocal total
        if node["type"] != "primitive":
            return
        name, given, out = node["name"], node["inputs"], node["outputs"][0][1]
        if name in ("Matmul", "AddMM"):
            total += prod(out) * given[0][1][-1]
        elif name == "GatherMM":
            total += prod(out) * given[1][1][-2]
        elif name == "ScaledDotProductAttention":
            queries, keys, values = (g[1] for g in given[:3])
            total += prod(queries[:-1]) * keys[-2] * (keys[-1] + values[-1])
        elif "MM" in name or "Matmul" in name or "Conv" in name:
            raise ValueError(f"{name}: how many multiplications it does is not known here")

    with patch.object(
        mx, "contiguous", lambda array: array
    ):  # mlx 0.32: "Unable to get state for primitive Contiguous"
        mx.export_function(note, function, *inputs)
    return total
