"""Whether a carried fault is the catalogue's mistake: HF with it beside our definition with the fault seeded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch

from glm_dsa import trace
from reference import hf
from reference.capture import Stages, capture
from reference.layers import Layers
from verify import faults
from verify.cases import Case, default_specs
from verify.core import compare, stages
from verify.engines.base import Underway
from verify.engines.definition import Ours, to_numpy
from verify.engines.run_hf import steps
from verify.engines.third_party import Implementation
from verify.implementation import subject as theirs

from .in_hf import IN_HF, Carried
from .in_stock import IN_STOCK, write_stock

SEED = 5
TOLERANCE, CLEAR = 1e-4, 1e-3  # of the stage's rms; of a choice: how many of its members
ROUNDED = 0.01  # of a stage's values may be rounded to the other 16-bit neighbour, in faults that round
# what they do depends on the order of a choice, or on its ties (any masked key will do): nobody's promise, so ours is handed HF's
GIVEN = ("selection-beats-mask", "experts-left-sorted", "experts-of-another-token")
# with one losing group, of as many experts as are chosen: with more of them 0 ties with 0
OTHER_CONFIG = {"router-group-fill-zero": {"topk_group": 3}}
# of mlx-lm's logits beside HF's: equal scores (of tokens that come twice, of 0, of masked keys), of which each takes its own
TIED = (
    "indexer-without-rope",
    "indexer-relu-after-sum",
    "indexer-per-head-topk",
    "selection-beats-mask",
    "router-group-fill-zero",
)


@dataclass(frozen=True)
class Compared:
    """stage: the first that the fault changes in HF; ours: in our definition. error: ours from HF, both with the fault;
    effect: HF with the fault from HF."""

    stage: str
    ours: str
    error: float
    effect: float

    @property
    def is_the_same(self) -> bool:
        return self.stage == self.ours and self.error <= TOLERANCE and self.effect >= CLEAR


@dataclass(frozen=True)
class InStock:
    """Of logits. right: mlx-lm from HF; effect: with the fault from without; error: both with the fault, in half of the tokens."""

    right: float
    effect: float
    error: float
    is_tied: bool

    @property
    def is_the_same(self) -> bool:
        return self.right <= TOLERANCE and self.effect >= CLEAR and (self.is_tied or self.error <= TOLERANCE)


class Reached(Exception):
    """The last stage that is asked for."""


class Trial:
    """Cases, each written and run once without a fault."""

    def __init__(self, scratch: Path, seed: int = SEED) -> None:
        self.scratch, self.seed = scratch, seed
        self.specs = {spec.name: spec for spec in default_specs()}
        self.stock_specs = {spec.name: spec for spec in theirs.specs()}
        self._kept: dict[Any, Any] = {}

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def case_of(self, fault: Carried) -> Case:
        spec = self.specs[fault.case]
        if fault.name in OTHER_CONFIG:
            other = {**spec.config, **OTHER_CONFIG[fault.name]}
            spec = replace(spec, name=f"{spec.name}-{fault.name}", config=other)
        return self._once(spec.name, lambda: Case(spec, self.scratch, self.seed))

    def clean(self, case: Case, length: int) -> Stages:
        return self._once((case, length), lambda: hf_stages(case, length))

    def ours_clean(self, case: Case, length: int, until: str) -> Mapping[str, Any]:
        return self._once((case, length, until), lambda: ours_stages(case.ours, case.tokens(length), until, {}))

    def compared(self, name: str) -> Compared:
        """Ours runs freely, but for `GIVEN`."""
        fault = IN_HF[name]
        case = self.case_of(fault)
        length = fault.length or case.long
        clean = self.clean(case, length)
        with fault.patch(case.hf):
            faulty = hf_stages(case, length)
        stage = first_changed(clean, faulty)
        if not stage:
            return Compared("", "", 0.0, 0.0)
        layer = stages.layer_of(stage)
        until = stage if layer is None else f"layers.{layer}.output"
        given = stages.choices(faulty, is_sparse=True) if name in GIVEN else {}
        ours = (
            ours_stages(case.ours, case.tokens(length), until, given) if given else self.ours_clean(case, length, until)
        )
        with faults.seeded(name):
            seeded = ours_stages(Ours(case.folder, **case.spec.overrides), case.tokens(length), until, given)
        of = distance(case, stage, "bf16" in name)
        return Compared(
            stage, first_changed(ours, seeded), of(seeded[stage], faulty[stage]), of(clean[stage], faulty[stage])
        )

    def streamed(self, name: str) -> float:
        """How far HF's layers, read and run one at a time, lie from the whole model: both with the fault."""
        fault = IN_HF[name]
        case = self.case_of(fault)
        length = fault.length or case.long
        with fault.patch(case.hf):
            whole = hf_stages(case, length)
        layers = Layers(case.folder, case.conventions, **case.changes)
        with fault.patch(layers.model):
            seen = streamed_stages(layers, case.tokens(length))
        if name == "embedding-scaled":  # rows of the embedding are read, which no module of HF's does
            whole = self.clean(case, length)
        return max(distance(case, s, "bf16" in name)(seen[s], whole[s]) for s in whole if s not in ("embed", "logits"))

    # -- mlx-lm's

    def stock_case(self, name: str) -> Case:
        spec = self.stock_specs[name]
        return self._once(("stock", name), lambda: Case(spec, self.scratch / "stock", self.seed))

    def stock(self, name: str | None, case: str, length: int) -> np.ndarray:
        """Its logits, right (None) or with a fault."""
        file = write_stock(self.scratch / f"stock_{(name or 'right').replace('-', '_')}.py", name)
        model = Implementation.of(str(file)).load(self.stock_case(case).folder, {}, shared=())
        logits = to_numpy(model(mx.array(self.stock_case(case).tokens(length))))
        assert logits is not None
        return logits

    def stock_compared(self, name: str) -> InStock:
        fault = IN_STOCK[name]
        case = self.stock_case(fault.case)
        length = fault.length or case.long
        clean = self.clean(case, length)["logits"]
        with IN_HF[name].patch(case.hf):
            faulty = hf_stages(case, length)["logits"]
        right = self._once((fault.case, length), lambda: self.stock(None, fault.case, length))
        wrong = self.stock(name, fault.case, length)
        gaps = np.abs(wrong - faulty).max(-1) / np.sqrt(np.mean(faulty**2))
        effect = compare.values(wrong, right).error
        return InStock(compare.values(right, clean).error, effect, float(np.median(gaps)), name in TIED)


def hf_stages(case: Case, length: int) -> Stages:
    with capture(case.hf) as seen:
        hf.forward(case.hf, case.tokens(length))
    return seen


def ours_stages(ours: Ours, tokens: np.ndarray, until: str, given: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Up to a stage, and no further."""
    seen: dict[str, Any] = {}

    def listener(stage: str, value: Any) -> Any:
        seen[stage] = value
        if stage == until:
            raise Reached
        return mx.array(given[stage]) if stage in given else value

    with trace.listen(ours.model, listener), suppress(Reached):
        ours.model(mx.array(tokens))
    return {stage: to_numpy(value) for stage, value in seen.items()}


@torch.no_grad()
def streamed_stages(layers: Layers, tokens: np.ndarray) -> Stages:
    """As verify.release.layerwise runs them, the experts in two chunks."""
    seen: Stages = {}
    x, selection = layers.embed(torch.as_tensor(tokens)), None
    for layer in range(layers.config["num_hidden_layers"]):
        run = Underway(steps(layers, layer, x, selection))
        if run.request is not None:
            half = layers.config["n_routed_experts"] // 2
            for start in (0, half):
                run.request.take(start, layers.experts(layer, start, half))
        answer = run.finish()
        seen |= answer.stages
        x, selection = answer.out, answer.selection
    return seen | {"norm": layers.norm(x).numpy()}


def first_changed(clean: Mapping[str, Any], faulty: Mapping[str, Any]) -> str:
    """Bit by bit; a stage that either has none of is passed over. "" where nothing is changed."""
    for stage in stages.in_order(clean.keys() & faulty.keys()):
        a, b = clean[stage], faulty[stage]
        if (a is None) != (b is None) or (a is not None and not np.array_equal(a, b, equal_nan=True)):
            return stage
    return ""


def distance(case: Case, stage: str, is_rounded: bool) -> Callable[[Any, np.ndarray], float]:
    """distance(stage)(a, b): of values, of b's rms; of choices, of b's members (a None: every key). inf where infinities differ."""

    def of_choices(a: Any, b: np.ndarray) -> float:
        size = b.shape[1] if stages.is_selection(stage) else case.args.n_routed_experts
        seen = np.tri(size, dtype=bool) if stages.is_selection(stage) else np.True_
        theirs = compare.as_sets(b, size) & seen
        ours = (np.ones_like(theirs) if a is None else compare.as_sets(a, size)) & seen
        return float((ours != theirs).sum() / theirs.sum())

    def of_values(a: np.ndarray, b: np.ndarray) -> float:
        if is_rounded and a.shape == b.shape:
            gap = np.abs(a.astype(np.float64) - b)
            off = gap > TOLERANCE * np.sqrt(np.mean(b[np.abs(b) < 1e30].astype(np.float64) ** 2))
            a = np.where(off, b, a) if off.mean() <= ROUNDED else a
        return compare.values(a, b).error

    return of_choices if stages.is_selection(stage) or stages.kind(stage) == stages.ROUTING else of_values
