"""Tensor parallelism: each process holds its share of the heads, and of the inner width of every MLP and expert.

What there is one of for each token (latent, rotary key, the indexer, the router) is held and computed by all alike: so
they cache, select and route the same, and only sums of outputs are exchanged, two a layer.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_inplace, shard_linear

from .errors import GlmDsaError
from .moe import MLP, MixtureOfExperts

SPLIT, SUMMED = (
    "all-to-sharded",
    "sharded-to-all",
)  # mlx's names: rows of the weight divided; columns, and outputs summed


def shard(layers: list[Any], group: mx.distributed.Group | None = None) -> None:
    """Divides decoder layers among the processes of `group`. Raises `GlmDsaError`, having changed nothing, where heads, inner
    widths or packed groups cannot be divided by so many."""
    group = group or mx.distributed.init()
    count, rank = group.size(), group.rank()
    for i, layer in enumerate(layers):
        attention = layer.self_attn
        _check(f"layers.{i}: {attention.heads} heads", attention.heads, count)
        for name, module in _summed(layer):
            columns = (module.scales if "scales" in module else module.weight).shape[-1]
            _check(
                f"layers.{i}.{name}: {columns} {'packed groups' if 'scales' in module else 'columns'}", columns, count
            )
    for layer in layers:
        attention = layer.self_attn
        attention.heads //= count
        attention.q_b_proj = shard_linear(attention.q_b_proj, SPLIT, group=group)
        attention.o_proj = shard_linear(attention.o_proj, SUMMED, group=group)
        own = slice(rank * attention.heads, (rank + 1) * attention.heads)
        for per_head in (attention.embed_q, attention.unembed_out):
            per_head.apply(lambda part, own=own: mx.contiguous(part[own]))
        if isinstance(layer.mlp, MLP):
            layer.mlp.gate_proj = shard_linear(layer.mlp.gate_proj, SPLIT, group=group)
            layer.mlp.up_proj = shard_linear(layer.mlp.up_proj, SPLIT, group=group)
            layer.mlp.down_proj = shard_linear(layer.mlp.down_proj, SUMMED, group=group)
        else:  # which sums routed and shared experts in one exchange
            layer.mlp.group = group
            for experts in (layer.mlp.switch_mlp, layer.mlp.shared_experts):
                _shard_stacked(experts.gate_proj, -2, group)
                _shard_stacked(experts.up_proj, -2, group)
                _shard_stacked(experts.down_proj, -1, group)


def _shard_stacked(module: nn.Module, axis: int, group: mx.distributed.Group) -> None:
    """Rows (-2) or columns (-1) of each matrix; a scale of the whole matrix (nvfp4) stays."""
    shard_inplace(module, lambda path, part: None if part.ndim < 2 else part.ndim + axis, group=group)


def _summed(layer: Any) -> list[tuple[str, nn.Module]]:
    """The modules whose columns are divided."""
    found: list[tuple[str, nn.Module]] = [("self_attn.o_proj", layer.self_attn.o_proj)]
    if isinstance(layer.mlp, MixtureOfExperts):
        found += [(f"mlp.{n}.down_proj", layer.mlp[n].down_proj) for n in ("switch_mlp", "shared_experts")]
    else:
        found.append(("mlp.down_proj", layer.mlp.down_proj))
    return found


def _check(what: str, size: int, count: int) -> None:
    if size % count:
        raise GlmDsaError(f"{what} cannot be divided among {count} processes; use a number that divides {size}")
