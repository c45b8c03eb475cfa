"""Holds stages against the reference, in the order in which they are computed, and stops at the first that differs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import compare, stages
from .bounds import Bound
from .choices import Decision, scatter
from .reference import Reference
from .report import AGREES, FAULT, Comparison, Report

Array = np.ndarray
SKIPPED_WHEN_DENSE = ("self_attn.indexer.q", "self_attn.indexer.weights", "self_attn.indexer.scores")


class Discrepancy(Exception):
    """What differs, in the words of the report. The gate makes a failed test of it."""


@dataclass
class Judge:
    """One test's hand on the report. Every check records a comparison; one that fails raises `Discrepancy`."""

    report: Report
    claim: str
    again: str
    seed: int
    layers: set[int] | None = None
    begun: int = field(init=False)  # comparisons of the tests before this one

    def __post_init__(self) -> None:
        self.begun = len(self.report.comparisons)

    def values(self, case: str, stage: str, ours: Array | None, ref: Array, bound: Bound | float) -> None:
        """Largest difference over the reference's rms, against a bound."""
        if not self._is_wanted(stage):
            return
        limit = bound if isinstance(bound, float) else bound.value
        why = "exact" if isinstance(bound, float) else bound.derivation
        if ours is None:
            self._fault(case, stage, "the candidate has no such stage")
        difference = compare.values(ours, ref)  # type: ignore[arg-type]
        if difference.problem:
            self._fault(case, stage, difference.problem)
        if not difference.error <= limit:
            times = f"{difference.error / limit:.3g} times its bound" if limit else "where not a bit may differ"
            self._fault(
                case, stage, f"error {difference.error:.3g}, {times} ({why})", f"worst {difference.where}",
                error=difference.error, bound=limit,
            )  # fmt: skip
        self.report.add(Comparison(self.claim, case, stage, AGREES, difference.error, limit, note=why))

    def selection(self, case: str, stage: str, ours: Array | None, ref: Array, decision: Decision) -> int:
        """Sets of indices; returns the number of ties."""
        if not self._is_wanted(stage):
            return 0
        difference = decision.difference(ours, ref)
        if difference.queries == 0:
            self._fault(case, stage, "nothing to compare: no query sees any key")
        if difference.faults:
            self._fault(
                case, stage,
                f"{difference.differing} of {difference.queries} queries select other {decision.noun} than the reference; "
                f"{difference.ties} are ties (score noise {decision.noise:.2g})",
                f"first: {difference.first}",
            )  # fmt: skip
        exact = int(decision.exact.sum())
        self.report.add(
            Comparison(self.claim, case, stage, AGREES, ties=difference.ties, exact_ties=exact, note="sets")
        )
        return difference.ties

    def holds(self, case: str, stage: str, condition: bool, expected: str) -> None:
        """An exact statement."""
        if not self._is_wanted(stage):
            return
        if not condition:
            self._fault(case, stage, f"does not hold: {expected}")
        self.report.add(Comparison(self.claim, case, stage, AGREES, note=expected))

    def at_most(self, case: str, stage: str, ours: float, limit: float, why: str) -> None:
        """One figure against its limit."""
        if not self._is_wanted(stage):
            return
        if not ours <= limit:
            self._fault(case, stage, f"{ours:.3g}, {ours / limit:.3g} times its bound ({why})", error=ours, bound=limit)
        self.report.add(Comparison(self.claim, case, stage, AGREES, ours, limit, note=why))

    def stages(
        self,
        ours: Mapping[str, Any],
        reference: Reference,
        local: bool,
        replaced: Mapping[str, Array] | None = None,
    ) -> int:
        """Every stage in `ours` that the reference has, in order. Returns the number of ties met.

        local: the candidate's layer ran on the reference's input. replaced: choices that were injected, so that what
        follows a tie is judged under the reference's. Where a tie was met and nothing was injected, what follows is
        not comparable: that is left to the injected run, which must be judged too.
        """
        case, replaced, ties = reference.case, replaced or {}, 0
        mine = [s for s in stages.in_order(reference.hf) if s in ours]
        if not mine:
            self._fault(case.name, "-", "the candidate shows none of the reference's stages")
        for stage in mine:
            kind, ref = stages.kind(stage), reference.hf[stage]
            if kind in (*stages.SELECTIONS, stages.ROUTING):
                ties += self.choice_stage(stage, ours, reference, local)
            elif kind == stages.ROUTING_WEIGHTS:
                topk = stage.replace("weights", "topk")
                experts = case.args.n_routed_experts
                used = replaced.get(topk, ours[topk])
                self.values(
                    case.name, stage, scatter(ours[stage], used, experts),
                    scatter(ref, reference.hf[topk], experts), reference.bound(stage, local),
                )  # fmt: skip
            else:
                self.values(case.name, stage, ours[stage], ref, reference.bound(stage, local))
            if ties and not replaced:
                return ties
        return ties

    def _is_wanted(self, stage: str) -> bool:
        """False for the stages of layers that `--layers` leaves out."""
        layer = stages.layer_of(stage)
        return self.layers is None or layer is None or layer in self.layers

    def missing(self, ours: Mapping[str, Any], reference: Reference) -> None:
        """The candidate shows every stage of the reference, but those of an indexer that has nothing to select from."""
        absent = [
            s for s in stages.in_order(reference.hf)
            if s not in ours and (reference.is_sparse or stages.kind(s) not in SKIPPED_WHEN_DENSE)
        ]  # fmt: skip
        extra = [s for s in stages.in_order(ours) if s not in reference.hf and ours[s] is not None]
        self.holds(
            reference.case.name, "all stages", not absent, f"the candidate shows every stage (absent: {absent[:4]})"
        )
        self.holds(
            reference.case.name, "all stages", not extra, f"no stage that the reference has not (extra: {extra[:4]})"
        )

    def choice_stage(self, stage: str, ours: Mapping[str, Any], reference: Reference, local: bool) -> int:
        """A selection or a routing."""
        decision = reference.decision(stage, local)
        return self.selection(reference.case.name, stage, ours[stage], reference.hf[stage], decision)

    def _fault(self, case: str, stage: str, *lines: str, error: float = float("inf"), bound: float = 0.0) -> None:
        before = [
            c for c in self.report.comparisons[self.begun :] if c.case == case and c.bound and c.verdict == AGREES
        ]
        worst = max(before, key=lambda c: c.share, default=None)
        agreed = f"stages before it agree (worst: {worst.stage}, {worst.share:.2g} of its bound)" if worst else ""
        self.report.add(Comparison(self.claim, case, stage, FAULT, error, bound, note=lines[0]))
        text = [f"{stage}   FAULT   [case {case}, seed {self.seed}]", *lines, agreed, f"again: {self.again}"]
        raise Discrepancy("\n  ".join(line for line in text if line))
