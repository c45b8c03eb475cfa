"""A packed build and what it was packed from, in memory side by side: their modules exchanged, their bytes counted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from glm_dsa import ModelArgs, checkpoint
from glm_dsa.model import Model

from ..core import stages
from ..engines.spec import Side

Array = np.ndarray
FULL_BYTES = 2  # of a weight that is not packed: 16 bit
MODULES: tuple[tuple[str, tuple[str, ...]], ...] = (  # by the end of a module's path
    ("indexer", (".indexer.wq_b", ".indexer.wk", ".indexer.weights_proj")),
    ("router", (".mlp.gate",)),
    ("embedding", ("embed_tokens",)),
    ("head", ("lm_head", "shared_head.head")),
    ("query down-projection", (".q_a_proj",)),
    ("query up-projection", (".q_b_proj",)),
    ("KV down-projection", (".kv_a_proj_with_mqa",)),
    ("keys from the latent", (".embed_q",)),
    ("values from the latent", (".unembed_out",)),
    ("attention output", (".o_proj",)),
    ("shared experts", (".shared_experts.gate_proj", ".shared_experts.up_proj", ".shared_experts.down_proj")),
    ("routed experts, gate and up", (".switch_mlp.gate_proj", ".switch_mlp.up_proj")),
    ("routed experts, down", (".switch_mlp.down_proj",)),
    ("dense feed-forward", (".mlp.gate_proj", ".mlp.up_proj", ".mlp.down_proj")),
    ("MTP join", (".eh_proj",)),
)


def component_of(path: str) -> str | None:
    return next((name for name, ends in MODULES if any(f".{path}".endswith(end) for end in ends)), None)


def layer_of(path: str) -> int | None:
    return stages.layer_of(path.removeprefix("model.") + ".")


class Build:
    """A packed build and what it was packed from, both in memory, whose modules can be exchanged."""

    def __init__(self, packed: Side, original: Side) -> None:
        self.model, _ = checkpoint.assemble(packed.folder, mx.float32, **packed.overrides)
        self.whole, _ = checkpoint.assemble(original.folder, mx.float32, **original.overrides)
        for model in (self.model, self.whole):
            model.set_dtype(mx.float32)
        self.args: ModelArgs = self.model.args
        modules, plain = dict(self.model.named_modules()), dict(self.whole.named_modules())
        self.paths = {p: c for p in modules if p in plain and (c := component_of(p)) and _differ(modules[p], plain[p])}

    def logits(self, tokens: Array, restored: Iterable[str] = ()) -> Array:
        """[S, V], with the modules of these paths unpacked."""
        with exchanged(self.model, self.whole, restored):
            logits = self.model(mx.array(tokens))
            mx.eval(logits)
            return np.array(logits[0].astype(mx.float32))

    def alone(self, tokens: Array, packed: Iterable[str]) -> Array:
        """[S, V], of the original, with the modules of these paths packed."""
        with exchanged(self.whole, self.model, packed):
            logits = self.whole(mx.array(tokens))
            mx.eval(logits)
            return np.array(logits[0].astype(mx.float32))

    def size(self, path: str) -> tuple[int, int]:
        """(weights, bytes as stored)."""
        module = dict(self.model.named_modules())[path]
        plain = dict(self.whole.named_modules())[path]
        return plain.weight.size, stored_bytes(module)

    def bits(self) -> float:
        """A weight, of all that is stored, the MTP layer included."""
        plain = dict(self.whole.named_modules())
        every = [(p, m) for p, m in self.model.named_modules() if not m.children() and p in plain]
        weights = sum(a.size for p, _ in every for a in plain[p].values() if isinstance(a, mx.array))
        return 8 * sum(stored_bytes(m) for _, m in every) / weights


def _differ(packed: nn.Module, plain: nn.Module) -> bool:
    return "scales" in packed and "scales" not in plain


def stored_bytes(module: nn.Module) -> int:
    """Packed: as they are; else in 16 bit, but what is float32 in every build."""
    if "scales" in module:
        size = 1 if module["scales"].dtype == mx.uint8 else 2  # nvfp4 and mxfp4 keep a byte
        of_scales = size * sum(module[n].size for n in ("scales", "biases") if n in module)
        return int(module["weight"].nbytes + of_scales)
    arrays = [(n, a) for n, a in module.items() if isinstance(a, mx.array)]
    return sum(a.size * (4 if n == "e_score_correction_bias" else FULL_BYTES) for n, a in arrays)


class exchanged:
    """One model's modules in another's, for a while."""

    def __init__(self, model: Model, other: Model, paths: Iterable[str]) -> None:
        self.model, self.other, self.paths = model, other, list(paths)

    def __enter__(self) -> None:
        self.own = {path: _put(self.model, path, at(self.other, path)) for path in self.paths}

    def __exit__(self, *error: object) -> None:
        for path, module in self.own.items():
            _put(self.model, path, module)


def at(model: Any, path: str) -> Any:
    for part in path.split("."):
        model = model[int(part)] if isinstance(model, list) else getattr(model, part)
    return model


def _put(model: Any, path: str, module: Any) -> Any:
    parent, _, name = path.rpartition(".")
    holder = at(model, parent) if parent else model
    before = getattr(holder, name)
    setattr(holder, name, module)
    return before
