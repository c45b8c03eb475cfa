"""One forward of somebody's model beside HF's: each module that both have is judged as it answers, in the order of calls.

Decoder layers are given HF's input (local error). What differs is replaced by HF's, so that one fault is named once and what
follows is judged on its own; a selection that differs by ties alone is replaced too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from ..core.choices import scatter
from ..core.collector import Collector, Fault
from ..core.stages import INDEXER, ROUTER, kind_of
from ..engines.definition import to_numpy
from ..engines.marshal import (
    Routing,
    aligned,
    arrays,
    call_model,
    describe,
    first,
    given,
    in_place_of,
    max_of,
    with_input,
)
from ..engines.taps import paths_of, tapped
from ..engines.third_party import others_code
from . import causes
from .subject import ModuleReference, Theirs

Array = np.ndarray
# Where their code meets the rest of the model: what lies inside may be cut otherwise than HF's is.
BOUNDARIES = ("embed_tokens", INDEXER, ROUTER, "self_attn.heads", "self_attn", "mlp", "", "norm", "lm_head")


class OurError(BaseException):
    """An error of the judge's, on its way through somebody's code."""


@dataclass
class Watch:
    """`inside`: whether modules within the boundaries are judged too, or boundaries alone."""

    theirs: Theirs
    reference: ModuleReference
    collector: Collector
    local: bool = True
    inside: bool = True
    start: int = 0  # how many tokens came before those of the next call
    calls: Counter = field(default_factory=Counter)
    faults: list[tuple[str, Fault]] = field(default_factory=list)  # (path, fault)
    unread: dict[str, str] = field(default_factory=dict)  # path -> what came that could not be read
    ties: int = 0

    def forward(self, tokens: Array, cache: Any = None) -> Any:
        """Their model on int [B, S], tapped: whatever it returns. Raises `Failed`, with what it raises."""
        try:
            with tapped(self.theirs.model, self.paths, self._see):
                out = call_model(self.theirs.model, tokens, cache)
        except OurError as error:
            raise error.__cause__ or error from None
        self.start += tokens.shape[1]
        return out

    @property
    def paths(self) -> set[str]:
        return {*self.reference.values_at, *self.reference.choices} & set(paths_of(self.theirs.model))

    @property
    def sees_choices(self) -> bool:
        """Whether every choice that HF makes was met in a form that can be read, and replaced."""
        return all(self.calls[path] and path not in self.unread for path in self.reference.choices)

    def _see(self, path: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.local and path in self.reference.inputs:
            due = self.reference.inputs[path]
            args, kwargs = with_input(args, kwargs, lambda array: in_place_of(array, due))
        if kind_of(path) == "self_attn.o_proj":
            try:
                args = self._heads(path, args)
            except Exception as error:
                raise OurError from error
        with others_code():
            out = call(*args, **kwargs)
            mx.eval(*arrays(out))
        self.calls[path] += 1
        judged = {INDEXER: self._selection, ROUTER: self._routing}.get(kind_of(path))
        try:
            return judged(path, out) if judged else self._values(path, out, args)
        except Exception as error:
            raise OurError from error

    # -- values

    def _rows(self, array: Array, length: int) -> Array:
        return array if self.local else array[:, self.start : self.start + length]

    def _values(self, path: str, out: Any, args: tuple[Any, ...]) -> Any:
        kind, due = kind_of(path), self.reference.hf[path]
        if not self.inside and kind not in BOUNDARIES and path not in self.theirs.mended:
            return out
        array, put = first(out, mx.floating)
        if not self.local:
            if path not in self.theirs.mended or array is None:
                return out
            due = self._rows(due, array.shape[1])
            return put(in_place_of(array, due))
        ours = None if array is None else aligned(array, due.shape)
        if ours is None:
            what = f"gives {describe(out)}; expected an array {list(due.shape)}"
            if kind not in BOUNDARIES or kind == "lm_head":  # a head may answer for the last position alone
                self.unread[path] = what
                return out
            self._add(path, Fault(self.theirs.name, path, (what,)))
            return put(mx.array(due)) if array is not None else mx.array(due)
        if path in self.theirs.mended:
            return put(in_place_of(array, due))
        bound = self.reference.bound(path)
        fault = self.collector.check(
            lambda: self.collector.values(self.theirs.name, path, ours, due, bound),
            lambda: causes.of_values(self.theirs, self.reference, path, ours, bound, given(args)),
        )
        if fault is None:
            return out
        self._add(path, fault)
        return put(in_place_of(array, due))

    def _heads(self, path: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """What o_proj is given: all heads' sums of values."""
        stage = path.removesuffix("o_proj") + "heads"
        due = self.reference.reference.hf[stage]
        array, _ = first(args, mx.floating)
        if array is None:
            return args
        if not self.local:
            mended = stage in self.theirs.mended
            return (in_place_of(array, self._rows(due, array.shape[1])), *args[1:]) if mended else args
        ours = aligned(array, due.shape)
        if ours is None:
            self.unread[stage] = f"is {describe(array)}; expected {list(due.shape)}"
            return args
        bound = self.reference.reference.bound(stage, local=True)
        fault = self.collector.check(
            lambda: self.collector.values(self.theirs.name, stage, ours, due, bound),
            lambda: causes.of_heads(self.theirs, self.reference, stage, ours, bound),
        )
        if fault is None:
            return args
        self._add(stage, fault)
        return (in_place_of(array, due), *args[1:])

    # -- choices

    def _selection(self, path: str, out: Any) -> Any:
        if not self.local and path in self.theirs.mended and out is None:
            return out
        array, put = first(out, mx.integer)
        if out is not None and array is None:
            self.unread[path] = f"gives {describe(out)}: no selection that can be read"
            return out
        reference, stage = self.reference.reference, f"{path}.topk"
        decision, due = reference.decision(stage, self.local), reference.hf[stage]
        ours = None if array is None else to_numpy(array)
        if ours is not None and ours.ndim == 4 and ours.shape[1] == 1:
            ours = ours[:, 0]  # [B, 1, S, K]
        if not self.local and ours is not None:
            end = self.start + ours.shape[1]
            decision = decision[:, self.start : end, :end]
            due = self._rows(due, ours.shape[1])
            due = np.where(due < end, due, end - 1)  # early rows list keys of the future: any masked key will do
        if ours is not None and (
            ours.shape[:2] != due.shape[:2] or ours.ndim != 3 or max_of(ours) >= decision.scores.shape[-1]
        ):
            self.unread[path] = f"gives {describe(out)}: no selection that can be read"
            return out
        if not self.local and ours is None:
            return out
        if self.local:
            if path in self.theirs.mended:
                return out if array is None else put(in_place_of(array, due))
            fault = self.collector.check(
                lambda: self.collector.selection(self.theirs.name, path, ours, due, decision),
                lambda: causes.of_selection(self.reference, path, ours, decision),
            )
            if fault is not None:
                self._add(path, fault)
        found = decision.difference(ours, due)
        self.ties += found.ties
        hand_on = found.differing and (self.local or not found.faults or path in self.theirs.mended)
        return put(in_place_of(array, due)) if hand_on and array is not None else out

    def _routing(self, path: str, out: Any) -> Any:
        """Experts and their weights, in any order; HF's in the place of what differs."""
        routing = Routing.of(out)
        reference, count = self.reference.reference, self.theirs.case.args.n_routed_experts
        due, due_weights, logits = (reference.hf[f"{path}.{s}"] for s in ("topk", "weights", "logits"))
        decision = reference.decision(f"{path}.topk", self.local)
        if not self.local and routing is not None:
            rows = int(np.prod(routing.experts.shape[:-1])) // due.shape[0]
            due, logits, due_weights = (self._rows(a, rows) for a in (due, logits, due_weights))
            decision = decision[:, self.start : self.start + rows]
        if routing is None or routing.experts.size != due.size:
            self.unread[path] = f"gives {describe(out)}: no experts with weights that can be read"
            return out
        ours = routing.chosen(*due.shape[:-1])
        if max_of(ours) >= count:
            self.unread[path] = f"names expert {max_of(ours)} of {count}"
            return out
        weights = scatter(due_weights, due, count)

        def mend() -> Any:
            return routing.exchanged(due, weights)

        if path in self.theirs.mended:
            return mend()
        found = decision.difference(ours, due)
        self.ties += found.ties
        if not self.local:
            return mend() if found.differing and not found.faults else out
        fault = self.collector.check(
            lambda: self.collector.selection(self.theirs.name, path, ours, due, decision),
            lambda: causes.of_routing(self.reference, path, ours, logits, decision),
        )
        if fault is None and not found.differing:
            mine = routing.by_expert(count, *due.shape[:-1])
            bound = reference.bound(f"{path}.weights", local=True)
            fault = self.collector.check(
                lambda: self.collector.values(self.theirs.name, f"{path}.weights", mine, weights, bound),
                lambda: causes.of_routing_weights(mine, weights, bound),
            )
        if fault is not None:
            self._add(path, fault)
        return mend() if fault is not None or found.differing else out

    def _add(self, path: str, fault: Fault) -> None:
        self.faults.append((path, fault))
