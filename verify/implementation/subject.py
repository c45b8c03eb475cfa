"""One case of somebody's implementation: its model beside HF's modules, and what has been found wrong with it so far."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from reference import hf
from reference.modules import outputs, path_of

from ..cases import Case, Reference, Spec, default_specs
from ..core import bounds, compare, stages
from ..core.stages import EXPERTS, INDEXER, MODULE_OUTPUTS, ROUTER, kind_of
from ..engines.third_party import Failed, Implementation

Array = np.ndarray

FIXTURE = "theirs"
NOT_VERIFIED = {  # of any implementation
    "glm_dsa, this project's own definition": "left out: --implementation judges somebody's code in its place",
    "MTP, quantized weights, batches, prompts of more than 100 tokens": "of an implementation, nothing here looks at them",
}
def specs() -> list[Spec]:
    """What an implementation is given: the gate's own checkpoints, each with a config.json that says what is in force.

    So nothing is asked that no key can tell: latent norms keep HF's eps. One case more has groups of experts without
    IndexShare, and GLM-5.1's can be packed: those that know no IndexShare are judged on both.
    """
    packable = {"kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_head_dim": 44, "index_head_dim": 40}
    own = []
    for spec in default_specs():
        if not spec.args.has_indexer or spec.claims:
            continue
        config = dict(spec.config)
        if spec.folder is None:
            config["indexer_rope_interleave"] = spec.args.indexer_rope == "interleaved"
            config |= packable if spec.family == "glm-5.1" else {}
        own.append(replace(spec, config=config, overrides={}))
    grouped = next(s for s in own if s.family == "grouped")
    unshared = {k: v for k, v in grouped.config.items() if k != "indexer_types"} | {"num_hidden_layers": 3}
    return [*own, replace(grouped, name="grouped-without-indexshare", config=unshared)]


def check(spec: Spec) -> Spec:
    """Raises ValueError for a checkpoint without an indexer."""
    if not spec.args.has_indexer:
        raise ValueError(
            f"--checkpoint {spec.folder}: model_type {spec.args.model_type} has no indexer; --implementation expects one"
        )
    return spec


class ModuleReference:
    """HF's modules on a prompt: {path: what it gives} in float32, and how far that lies from float64.

    Each layer's truth is computed on float32's input of that layer, under its choices.
    """

    def __init__(self, case: Case, in_float64: Any, reference: Reference) -> None:
        self.case, self.reference = case, reference
        with outputs(case.hf) as self.hf:
            hf.forward(case.hf, reference.tokens)
        layers = range(case.args.num_hidden_layers)
        self.inputs = {f"layers.{i}": reference.layer_input(i) for i in layers}
        self.inputs["norm"] = self.hf[f"layers.{layers[-1]}"]
        self.inputs["lm_head"] = self.hf["norm"]
        choices = {f"layers.{i}.{INDEXER}": reference.hf.get(f"layers.{i}.{INDEXER}.topk") for i in layers}
        choices |= {f"layers.{i}.{ROUTER}": reference.hf.get(f"layers.{i}.{stages.ROUTING}") for i in layers}
        self.choices: dict[str, Array] = {path: choice for path, choice in choices.items() if choice is not None}
        with hf.in_float64(in_float64), outputs(in_float64, self.inputs, self.choices) as truth:
            hf.forward(in_float64, reference.tokens)
        self.errors: dict[str, float] = {}
        worst: dict[str, float] = {}
        for path, ours in self.hf.items():  # in the order of the calls
            kind = kind_of(path)
            worst[kind] = max(worst.get(kind, 0.0), compare.values(ours, truth[path]).error)
            self.errors[path] = worst[kind]
        self.values_at = {p for p in self.hf if self.hf[p].ndim == 3 and kind_of(p) not in (ROUTER, EXPERTS)}

    @property
    def length(self) -> int:
        return self.reference.length

    def bound(self, path: str) -> bounds.Bound:
        kind = kind_of(path)
        norm = self.hf[path].shape[-1] if kind.endswith("norm") and not kind.endswith("k_norm") else 0
        longest = max(self.case.longest, self.length)
        explained = bounds.EXPLAINED
        if kind in MODULE_OUTPUTS and self.errors[path] > explained:
            prefix = f"layers.{stages.layer_of(path + '.')}." if path.startswith("layers.") else ""
            explained = self.reference.explained(prefix + MODULE_OUTPUTS[kind], self.errors[path], local=True)
        return bounds.bound(self.errors[path], self.hf[path], longest, norm=norm, explained=explained)


@dataclass
class Theirs:
    """An implementation on a case. `mended`: paths at fault, where HF's output stands in for their own from then on."""

    implementation: Implementation
    case: Case
    mended: set[str] = field(default_factory=set)
    judged: bool = False
    broken: str = ""  # what it raised as it ran
    _references: dict[int, ModuleReference] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.case.name

    @cached_property
    def _loaded(self) -> Any:
        shared = [i for i in range(self.case.args.num_hidden_layers) if not self.case.args.runs_indexer(i)]
        changes: dict[str, Any] = dict(self.case.changes)
        if "model_file" in self.case.config:
            changes["model_file"] = None  # this code is on trial, not the checkpoint's
        try:
            return self.implementation.load(self.case.folder, changes, shared)
        except Failed as error:
            return error

    @property
    def is_loaded(self) -> bool:
        return not isinstance(self._loaded, Failed)

    def blind_spot(self) -> str:
        """Why its logits and caches cannot be judged; "" where they can. Its modules are to be judged first."""
        if isinstance(self._loaded, Failed):
            return "it does not load"
        if self.broken:
            return "it does not run"
        hiding = sorted(
            {kind_of(path) or "a layer" for path in self.mended} & {"self_attn", "self_attn.heads", "a layer"}
        )
        return f"what reads them is at fault ({hiding[-1]})" if hiding else ""

    @property
    def model(self) -> Any:
        """Raises `Failed` with the cause where it does not load."""
        if isinstance(self._loaded, Failed):
            raise self._loaded
        return self._loaded

    @cached_property
    def hf_in_float64(self) -> Any:
        return hf.load(self.case.folder, self.case.conventions, dtype=torch.float64, **self.case.changes)

    def reference(self, length: int) -> ModuleReference:
        if length not in self._references:
            self._references[length] = ModuleReference(self.case, self.hf_in_float64, self.case.reference(length))
        return self._references[length]

    def hf_paths(self) -> list[str]:
        return [
            path for name, _ in self.case.hf.named_modules() if (path := path_of(name)) not in ("", "model", "layers")
        ]

    def hf_module(self, path: str) -> Any:
        return next(module for name, module in self.case.hf.named_modules() if path_of(name) == path)


def add_name(lines: dict[str, str], what: str, name: str) -> None:
    names = [*filter(None, lines.get(what, "").split(", "))]
    lines[what] = ", ".join([*names, *([name] if name not in names else [])])
