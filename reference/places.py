"""Where a checkpoint keeps each tensor, by HF's name or mlx-lm's, out of what tools make of either.

Read here: names behind `language_model.` or `model.language_model.`; all experts of a layer in one tensor (transformers' own
modules); gate above up, wk above weights_proj (omlx, vLLM); an MTP layer under `mtp.*`, in the model's files or beside them.
Left out, as HF does: an MTP layer that config.json does not name, or that has more experts than the model; copies of embedding
and head in one that shares the model's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

BLOCK = 128  # FP8: rows and columns that share a scale
FUSED = {  # of matrices that lie one above the other: which, the upper one first
    "gate_up_proj": ("gate_proj", "up_proj"),
    "wk_weights_proj": ("wk", "weights_proj"),
}
HEAD_GLUE = {"enorm", "hnorm", "eh_proj", "shared_head", "embed_tokens"}
HEAD_LAYER = {"input_layernorm", "post_attention_layernorm", "self_attn", "mlp"}


class Place(NamedTuple):
    """Where a tensor is: in a file under a name, or one expert of that, or rows `first` to `last` of a matrix."""

    file: Path
    name: str
    expert: int | None = None
    rows: tuple[int, int] | None = None


def places(files: Sequence[Path], heads: Sequence[Path], config: dict[str, Any]) -> dict[str, Place]:
    """{tensor: where it is}. heads: files beside the model that may hold its MTP layer.

    Raises ValueError where two stored tensors are one and the same.
    """
    layer = f"model.layers.{config['num_hidden_layers']}." if "num_hidden_layers" in config else None
    stored = {name: (file, shape) for file in files for name, shape in shapes_in(file)}
    beside = {name: (file, shape) for file in heads for name, shape in shapes_in(file)}
    own, apart = ([_plain(n, layer).startswith(layer or "?") for n in names] for names in (stored, beside))
    if all(apart) and not any(own):
        stored |= beside
    meant = {name: _plain(name, layer) for name in stored}
    keys = {plain: stored[name][1] for name, plain in meant.items()}
    out: dict[str, Place] = {}
    for name, plain in meant.items():
        file, shape = stored[name]
        for one, place in _several(plain, Place(file, name), shape, keys):
            if one in out:
                raise ValueError(f"{file.parent}: {name} and {out[one].name} both hold {one}")
            out[one] = place
    if layer and f"{layer}eh_proj.weight" in out:
        for name in _without_place(layer, keys, config):
            out.pop(name, None)
        if (
            not config.get("num_nextn_predict_layers")
            or keys.get(f"{layer}mlp.gate.weight", [0])[0] > config["n_routed_experts"]
        ):
            out = {name: place for name, place in out.items() if not name.startswith(layer)}
    return out


def shapes_in(file: Path) -> list[tuple[str, list[int]]]:
    """(name, shape) of each tensor of a file, as they are stored."""
    with safe_open(file, "pt") as shard:
        return [(name, shard.get_slice(name).get_shape()) for name in shard.keys()]  # noqa: SIM118


def _plain(name: str, layer: str | None) -> str:
    """Without a prefix, and a head's tensors under the name of their layer."""
    words = name.split(".")
    if words[:2] == ["model", "language_model"]:
        words = ["model", *words[2:]]
    if words[0] == "language_model":
        words = words[1:]
    if words[0] != "mtp" or layer is None:
        return ".".join(words)
    rest = words[2:] if words[1:2] == ["0"] else words[1:]
    rest = rest[1:] if rest[:1] == ["block"] else rest
    if rest in (["norm", "weight"], ["shared_head_norm", "weight"]):
        rest = ["shared_head", "norm", "weight"]
    return layer + ".".join(rest) if len(rest) > 1 and rest[0] in HEAD_GLUE | HEAD_LAYER else ".".join(words)


def _several(name: str, place: Place, shape: list[int], shapes: dict[str, list[int]]) -> Iterator[tuple[str, Place]]:
    """What one stored tensor holds: experts, matrices one above the other, or itself."""
    stacked = re.fullmatch(r"(model\.layers\.\d+\.mlp\.experts)\.(gate_up_proj|down_proj)(_scale_inv)?", name)
    fused = re.fullmatch(r"(model\.layers\.\d+\..*)\.(gate_up_proj|wk_weights_proj)\.(\w+)", name)
    if stacked is not None:
        ending = f"weight{stacked[3] or ''}"
        half = shape[1] // 2
        for expert in range(shape[0]):
            own = f"{stacked[1]}.{expert}"
            if stacked[2] == "down_proj":
                yield f"{own}.down_proj.{ending}", place._replace(expert=expert)
            else:
                yield f"{own}.gate_proj.{ending}", place._replace(expert=expert, rows=(0, half))
                yield f"{own}.up_proj.{ending}", place._replace(expert=expert, rows=(half, shape[1]))
    elif fused is not None:
        upper, lower = FUSED[fused[2]]
        border, end = shape[-2] // 2, shape[-2]
        if fused[2] == "wk_weights_proj":
            border = shapes[f"{fused[1]}.k_norm.weight"][0]
            border = border // BLOCK if fused[3].endswith("_scale_inv") else border
        yield f"{fused[1]}.{upper}.{fused[3]}", place._replace(rows=(0, border))
        yield f"{fused[1]}.{lower}.{fused[3]}", place._replace(rows=(border, end))
    else:
        yield name, place


def _without_place(layer: str, shapes: dict[str, list[int]], config: dict[str, Any]) -> Iterator[str]:
    """Copies of embedding and head in an MTP layer that shares the model's."""
    if config.get("model_type") != "glm4_moe_lite":  # which has its own
        copies = (f"{layer}embed_tokens.", f"{layer}shared_head.head.")
        yield from (name for name in shapes if name.startswith(copies))
