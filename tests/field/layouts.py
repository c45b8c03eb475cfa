"""Steps that lay a checkpoint's tensors out as other tools do."""

from __future__ import annotations

import re
from typing import Any

import mlx.core as mx
import numpy as np
import torch

from .makers import Draft, Header, Step, layer


def prefixed(prefix: str) -> Step:
    """Before every tensor, and before the modules that the key quantization names."""

    def step(draft: Draft) -> None:
        draft.rename(lambda name: prefix + name)
        said = draft.config.get("quantization")
        if isinstance(said, dict):
            draft.config["quantization"] = {prefix + k if isinstance(v, dict) else k: v for k, v in said.items()}

    return step


def joined(tensors: list, axis: int):
    """Along an axis; headers too."""
    if isinstance(tensors[0], Header):
        shape = list(tensors[0].shape)
        shape[axis] = sum(t.shape[axis] for t in tensors)
        return Header(tensors[0].dtype, tuple(shape))
    return torch.cat([_plain(t) for t in tensors], axis).view(tensors[0].dtype)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32) if tensor.dtype == torch.uint32 else tensor  # torch joins no unsigned words


def fused_experts(draft: Draft) -> None:
    """transformers' own: one gate_up_proj [E, 2 I, hidden] and one down_proj [E, hidden, I] a layer."""
    mlps = {m[1] for n in draft.tensors if (m := re.match(r"(.*\.mlp\.experts)\.\d+\.", n))}
    for mlp in sorted(mlps):
        one = draft.pop(re.escape(mlp) + r"\.\d+\.")
        count = len(one) // 3
        pairs = [torch.cat([one[f"{mlp}.{e}.{p}_proj.weight"] for p in ("gate", "up")]) for e in range(count)]
        draft.tensors[f"{mlp}.gate_up_proj"] = torch.stack(pairs)
        draft.tensors[f"{mlp}.down_proj"] = torch.stack([one[f"{mlp}.{e}.down_proj.weight"] for e in range(count)])


def fused_switch(draft: Draft) -> None:
    """omlx's: gate_proj and up_proj of an MLX build's stacked experts in one, packed or not."""
    for name in [n for n in draft.tensors if ".switch_mlp.gate_proj." in n]:
        up = name.replace("gate_proj", "up_proj")
        draft.tensors[name.replace("gate_proj", "gate_up_proj")] = joined([draft.tensors.pop(n) for n in (name, up)], 1)


def fused_indexer(draft: Draft) -> None:
    """omlx's: the indexer's wk and weights_proj in one, packed or not."""
    for name in [n for n in draft.tensors if ".indexer.wk." in n]:
        parts = [draft.tensors.pop(n) for n in (name, name.replace(".wk.", ".weights_proj."))]
        draft.tensors[name.replace(".wk.", ".wk_weights_proj.")] = joined(parts, 0)


def apart(file: str, rename: tuple[str, str] | None = None) -> Step:
    """The MTP layer's tensors in a file of their own, which no index lists."""

    def step(draft: Draft) -> None:
        count = draft.config["num_hidden_layers"]
        own = draft.pop(rf"layers\.{count}\.")
        draft.beside[file] = {n if rename is None else re.sub(*rename, n): t for n, t in own.items()}

    return step


def copies_in_mtp(draft: Draft) -> None:
    """A copy of embedding and head in the MTP layer."""
    mtp = f"model.layers.{draft.config['num_hidden_layers']}"
    draft.tensors[f"{mtp}.embed_tokens.weight"] = draft.tensors["model.embed_tokens.weight"].clone()
    draft.tensors[f"{mtp}.shared_head.head.weight"] = draft.tensors["lm_head.weight"].clone()


def pruned(count: int, in_mtp: bool = True) -> Step:
    """The last experts of every layer taken away, and config.json says so; the MTP layer's kept where not `in_mtp`."""

    def step(draft: Draft) -> None:
        last = draft.config["num_hidden_layers"]
        draft.config["n_routed_experts"] = count
        for name in list(draft.tensors):
            if not in_mtp and layer(name) == last:
                continue
            expert = re.search(r"\.experts\.(\d+)\.", name)
            if expert and int(expert[1]) >= count:
                del draft.tensors[name]
            elif re.search(r"\.mlp\.gate\.|\.switch_mlp\.", name):
                tensor = draft.tensors[name]
                draft.tensors[name] = (
                    Header(tensor.dtype, (count, *tensor.shape[1:]))
                    if isinstance(tensor, Header)
                    else tensor[:count].clone()
                )

    return step


def duplicated_indexers(draft: Draft) -> None:
    """A copy of the full layer's indexer on each layer that shares it."""
    own: dict[str, Any] = {}
    for i in range(draft.config["num_hidden_layers"]):
        prefix = f"model.layers.{i}.self_attn.indexer."
        found = {n.removeprefix(prefix): t for n, t in draft.tensors.items() if n.startswith(prefix)}
        own = found or own
        draft.tensors |= {prefix + n: t if isinstance(t, Header) else t.clone() for n, t in own.items()}


def shuffled_indexers(draft: Draft) -> None:
    """Queries and keys of every indexer put out of order: it selects as by chance, and no layout is better."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in draft.tensors.items():
        if ".indexer.wk.weight" in name or ".indexer.wq_b.weight" in name:
            values = tensor.flatten()
            draft.tensors[name] = values[torch.randperm(values.numel(), generator=generator)].view(tensor.shape)


def swapped(one: str, other: str) -> Step:
    """Two tensors, each in the other's place."""

    def step(draft: Draft) -> None:
        draft.tensors[one], draft.tensors[other] = draft.tensors[other].clone(), draft.tensors[one].clone()

    return step


def float64(pattern: str) -> Step:
    def step(draft: Draft) -> None:
        draft.tensors |= {n: t.double() for n, t in draft.pop(pattern).items()}

    return step


def fused_the_other_way(draft: Draft) -> None:
    """gate_up_proj as [E, hidden, 2 I]."""
    fused_experts(draft)
    draft.tensors |= {n: t.swapaxes(1, 2).contiguous() for n, t in draft.pop("gate_up_proj").items()}


def prefixed_in_part(draft: Draft) -> None:
    draft.rename(lambda name: f"language_model.{name}" if layer(name) in (0, 1) else name)


def drafter_alone(draft: Draft) -> None:
    """The MTP layer and nothing else, under a type of its own."""
    draft.tensors = draft.pop(rf"layers\.{draft.config['num_hidden_layers']}\.")
    draft.config["model_type"] = "glm_moe_dsa_mtp"


def tables_of_angles(draft: Draft) -> None:
    for i in range(draft.config["num_hidden_layers"]):
        draft.tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(32)


def packed_kv_b(draft: Draft) -> None:
    """Builds from before embed_q: kv_b_proj packed as it is, in 8 bit."""
    for name in [n for n in draft.tensors if n.endswith("kv_b_proj.weight")]:
        parts = mx.quantize(mx.array(draft.tensors.pop(name).float().numpy()), 64, 8)
        for part, array in zip(("weight", "scales", "biases"), parts, strict=True):
            draft.tensors[name.replace("weight", part)] = torch.from_numpy(np.array(array))
