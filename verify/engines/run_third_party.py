"""Somebody's MLX code on a prompt, tapped where its modules' paths are HF's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from ..core.compare import same_sets
from ..core.stages import INDEXER, MODULE_OUTPUTS, ROUTER, kind_of
from .base import MX, Calls, let_go
from .definition import to_numpy
from .marshal import Routing, aligned, arrays, call_model, first, in_place_of, new_cache, with_input
from .recording import Hearing
from .spec import Side
from .taps import paths_of, tapped
from .third_party import Implementation, others_code

Array = np.ndarray
# not o_proj: what it is given is noted, as heads
STAGES = {kind: stage for kind, stage in MODULE_OUTPUTS.items() if kind not in ("self_attn.o_proj", "lm_head")}
HEADS = "self_attn.o_proj"


class ThirdPartyEngine:
    """A large model is loaded lazily, and each layer let go when it has answered: one layer is in memory, with its experts."""

    def __init__(self, side: Side) -> None:
        self.side, self.args, self.model = side, side.args, None
        self.implementation = Implementation.of(side.implementation, "")

    def load(self) -> Any:
        """Their model on the side's checkpoint. Raises `Failed`."""
        shared = [i for i in range(self.args.num_hidden_layers) if not self.args.runs_indexer(i)]
        changes: dict[str, Any] = dict(self.side.changes)
        if "model_file" in self.side.release.config:
            changes["model_file"] = None  # this code runs, not the checkpoint's
        dtype = MX[self.side.dtype]
        return self.implementation.load(self.side.folder, changes, shared, dtype, lazy=not self.side.is_small)

    def cached(self) -> Calls:
        model = self.load()
        cache = new_cache(model)
        return lambda part: call_model(model, part, cache)

    def whole(self, tokens: Array, at: Array, hearing: Hearing) -> None:
        model = self.load()
        modules = paths_of(model)
        listening = _Listening(self, hearing, tokens.shape[1], modules)
        paths = {p for p in modules if kind_of(p) in (*STAGES, INDEXER, ROUTER, HEADS)}
        with tapped(model, paths, listening):
            out = call_model(model, tokens)
        logits = to_numpy(first(out, mx.floating)[0])
        if logits is not None and logits.shape[:2] == tokens.shape:
            hearing.note("logits", logits[0, at])


class _Listening:
    def __init__(self, engine: ThirdPartyEngine, hearing: Hearing, length: int, modules: dict[str, Any]) -> None:
        self.engine, self.hearing, self.length = engine, hearing, length
        self.modules = modules

    def __call__(self, path: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kind = kind_of(path)
        prefix = path.removesuffix(kind).rstrip(".")
        if path == "layers.0":  # "embed" is what the first layer is given, whatever was done to the embedding before
            args, kwargs = with_input(args, kwargs, lambda array: self._value("embed", array, lambda new: new))
        if kind == HEADS and args:
            args = (self._value(f"{prefix}.self_attn.heads", args[0], lambda new: new), *args[1:])
        with others_code():
            out = call(*args, **kwargs)
            mx.eval(*arrays(out))
        if kind == INDEXER:
            return self._selection(f"{path}.topk", out)
        if kind == ROUTER:
            return self._routing(path, out)
        if kind == HEADS:
            return out
        array, put = first(out, mx.floating)
        stage = f"{prefix}.{STAGES[kind]}".lstrip(".") if prefix else STAGES[kind]
        out = self._value(stage, array, put) if array is not None else out
        if kind == "" and not self.engine.side.is_small:
            let_go(self.modules[path])
        return out

    def _value(self, stage: str, array: Any, put: Callable[[Any], Any]) -> Any:
        width = array.shape[-1]
        values = aligned(array, (1, self.length, width))
        if values is None:
            return put(array)
        self.hearing.note(stage, values[0])
        due = self.hearing.due(stage)
        return put(array if due is None else in_place_of(array, due))

    def _selection(self, stage: str, out: Any) -> Any:
        array, put = first(out, mx.integer)
        if array is None:
            if out is None:
                self.hearing.note(stage, None)
            return out
        chosen = to_numpy(array)
        if chosen.size != self.length * chosen.shape[-1]:
            return out
        self.hearing.note(stage, chosen.reshape(self.length, -1))
        due = self.hearing.due(stage)
        return out if due is None else put(in_place_of(array, due))

    def _routing(self, path: str, out: Any) -> Any:
        """Experts and their weights. Where others take their place, so do the weights, but not those of the same experts."""
        routing = Routing.of(out)
        if routing is None or routing.experts.size % self.length:
            return out
        chosen = routing.chosen(self.length)
        by_expert = routing.by_expert(self.engine.args.n_routed_experts, self.length)
        self.hearing.note(f"{path}.topk", chosen)
        self.hearing.note(f"{path}.weights", by_expert)
        due, theirs = self.hearing.due(f"{path}.topk"), self.hearing.other(f"{path}.weights")
        if due is None or theirs is None:
            return out
        return routing.exchanged(due, np.where(same_sets(chosen, due)[:, None], by_expert, theirs))
