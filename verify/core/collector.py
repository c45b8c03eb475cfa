"""Faults, collected: each is recorded as it is met, with its cause where one is known, and all are told at the end, once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import stages
from .checker import Discrepancy, Judge
from .report import FAULT, Comparison


@dataclass
class Fault(Exception):
    """What a check of `Judge` raises here, in the place of a failed test."""

    case: str
    stage: str
    lines: tuple[str, ...]
    error: float = float("inf")
    bound: float = 0.0
    cause: str = ""

    @property
    def note(self) -> str:
        return self.cause or self.lines[0]


@dataclass
class Collector(Judge):
    """A judge that goes on after a fault."""

    faults: list[Fault] = field(default_factory=list)

    @classmethod
    def of(cls, judge: Judge) -> Collector:
        return cls(judge.report, judge.claim, judge.again, judge.seed, judge.layers)

    def _fault(self, case: str, stage: str, *lines: str, error: float = float("inf"), bound: float = 0.0) -> Any:
        raise Fault(case, stage, lines, error, bound)

    def check(self, check: Callable[[], Any], cause: Callable[[], str] = str) -> Fault | None:
        """Runs a check; a fault is kept, with its cause, until `record`."""
        try:
            check()
        except Fault as fault:
            fault.cause = cause()
            return fault
        return None

    def record(self, fault: Fault) -> None:
        if not self._is_wanted(f"{fault.stage}."):
            return
        self.faults.append(fault)
        self.report.add(
            Comparison(self.claim, fault.case, fault.stage, FAULT, fault.error, fault.bound, note=fault.note)
        )

    def at_fault(self, case: str, stage: str, *lines: str, cause: str = "") -> None:
        self.record(Fault(case, stage, lines, cause=cause))

    def finish(self) -> None:
        """Raises `Discrepancy`, with all that was met: the same fault in several layers, or prompts, is told once."""
        if not self.faults:
            return
        groups: dict[tuple[str, str], list[Fault]] = {}
        for fault in self.faults:
            groups.setdefault((stages.kind(fault.stage), fault.cause or stages.kind(fault.stage)), []).append(fault)
        texts = []
        for group in groups.values():
            group.sort(key=lambda fault: stages.layer_of(fault.stage + ".") or 0)
            first, layers = group[0], sorted({f.stage for f in group[1:]} - {group[0].stage})
            lines = [f"{first.stage}   FAULT   [case {first.case}, seed {self.seed}]", *first.lines]
            lines += [f"looks like: {first.cause}"] if first.cause and first.cause not in first.lines else []
            lines += [f"the same in {stages.layers_of(layers)}"] if layers else []
            texts.append("\n  ".join(lines))
        raise Discrepancy("\n".join([*texts, f"again: {self.again}"]))
