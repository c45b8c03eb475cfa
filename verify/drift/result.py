"""What a comparison found: plain objects, and a compact summary, top findings first."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from glm_dsa.errors import printable

from .. import stages
from .bits import Sensitivity
from .cached import Cached
from .comparing import LOCAL, Compared
from .repair import Repair
from .suspects import Cause, Diagnosis
from .written import report_of, write

Array = np.ndarray
AROUND = 3  # stages shown before and after the first divergence
PARTS = {"mass": "which layout the weights tell of", "tokens": "KL along the prompt"}


@dataclass(frozen=True)
class Growth:
    """Relative errors of a layer's output."""

    layer: int
    local: float
    own: float
    gain: float | None


@dataclass(frozen=True)
class Choices:
    """Shares of the reference's choices that the candidate makes too; None where there is nothing to choose."""

    layer: int
    selection: float | None
    selection_own: float | None
    routing: float | None
    routing_own: float | None


@dataclass(frozen=True)
class Token:
    """kl in nats, of what follows this token."""

    position: int
    token: int
    text: str
    kl: float
    same_top1: bool
    ref_next: str
    own_next: str


@dataclass
class Drift:
    """All that was found; `summary` in words, `report` for machines."""

    candidate: Any
    reference: Any
    length: int
    prompt: str
    same_weights: bool
    comparisons: list[Compared] = field(default_factory=list)
    divergence: Compared | None = None
    diagnosis: Diagnosis | None = None
    growth: list[Growth] = field(default_factory=list)
    choices: list[Choices] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    distributions: dict[str, float] = field(default_factory=dict)
    repair: Repair | None = None
    cached: Cached | None = None
    sensitivity: Sensitivity | None = None
    mass: Any = None  # reference.layout.Evidence
    mass_by_layer: list[dict[str, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    own_weights: Drift | None = None  # the candidate beside HF on its own weights, where those are other ones
    seconds: float = 0.0
    command: str = ""
    date: str = ""
    labels: dict[str, Any] = field(default_factory=dict)

    # -- what to say first

    @property
    def agrees(self) -> bool:
        """On the same weights, at every stage, in one call or several."""
        return self.divergence is None and self.same_weights and self.cached is None

    @property
    def causes(self) -> list[Cause]:
        return [] if self.diagnosis is None else self.diagnosis.causes

    def findings(self) -> list[dict[str, Any]]:
        """The top findings first: {kind, title, lines}."""
        out: list[dict[str, Any]] = []

        def add(kind: str, title: str, *lines: str) -> None:
            out.append({"kind": kind, "title": printable(title), "lines": [printable(line) for line in lines if line]})

        kl = self.distributions
        told = (
            f"KL mean {kl['kl_mean']:.3g}, max {kl['kl_max']:.3g} nats; top-1 {kl['top1']:.1%} the same" if kl else ""
        )
        if self.divergence is not None and self.same_weights:
            add("divergence", f"First divergence: {self.divergence.stage}", _error(self.divergence), told)
        elif self.same_weights:
            worst = max(
                (c for c in self.comparisons if c.bound and c.run == LOCAL), key=lambda c: c.share, default=None
            )
            least = f"worst: {worst.stage}, {worst.share:.2g} of its bound" if worst else ""
            add("note", "No divergence: every stage agrees within its bound", least, told)
        else:
            if self.sensitivity is not None:
                add("cost", self.sensitivity.title(), told, *self.sensitivity.lines())
            else:
                add("note", "The weights differ", told)
            if self.own_weights is not None:
                self._add_own(add)
        if self.cached is not None:
            add("divergence", "In several calls, with a cache, the candidate says something else", *self.cached.lines())
        for cause in self.causes:
            alike = f"the same on this prompt: {', '.join(cause.alike)}" if cause.alike else ""
            where = f"in layers {stages.compact(cause.layers)}" if cause.layers else ""
            exact = "to the bit" if cause.exact == 0 else f"to {cause.exact:.2g} of the bound"
            known = f"{cause.suspect.known_as}, " if cause.suspect.known_as else ""
            add("cause", f"Cause: {known}{cause.suspect.name}", cause.suspect.text,
                f"making it here reproduces {', '.join(cause.stages)} {where}, {exact}", alike)  # fmt: skip
        self._add_unknown(add)
        if (
            self.mass is not None
            and self.mass.has_learned
            and self.mass.layout not in (None, self.labels.get("layout"))
        ):
            add("cause", f"The weights tell of {self.mass.layout} indexer RoPE, where the candidate runs {self.labels['layout']}",
                "; ".join(f"{k} catches {v} of the attention" for k, v in self.mass.mass.items()) + f"; chance "
                f"{self.mass.chance:.3f}")  # fmt: skip
        elif self.mass is not None and any("indexer_rope" in c.suspect.name for c in self.causes):
            add("note", "Captured attention mass", "; ".join(f"{k} {v}" for k, v in self.mass.mass.items()))
        if self.growth:
            self._add_growth(add)
        if self.repair is not None and self.repair.best is not None:
            add("cost", self.repair.title(), *self.repair.lines())
        for note in self.notes:
            add("note", note)
        return out

    def _add_own(self, add: Any) -> None:
        own = self.own_weights
        assert own is not None
        if own.divergence is None:
            add("note", "The code is not to blame: on its own weights the candidate agrees with HF at every stage")
            return
        add(
            "divergence",
            f"On its own weights the candidate differs from HF: {own.divergence.stage}",
            _error(own.divergence),
        )
        for cause in own.causes:
            add("cause", f"Cause: {cause.suspect.name}", cause.suspect.text)
        own._add_unknown(add)

    def _add_unknown(self, add: Any) -> None:
        if self.diagnosis is None or not self.diagnosis.unknown:
            return
        left = self.diagnosis.unknown
        also = " besides" if self.causes else ""
        kinds = ", ".join(dict.fromkeys(c.kind for c in left))
        add("cause", f"Cause{also} unknown; component: {self.diagnosis.component}",
            f"wrong by themselves: {kinds} ({stages.layers_of(c.stage for c in left) or 'outside of the layers'})",
            f"none of {self.diagnosis.tried} conventions and catalogued mistakes reproduces it")  # fmt: skip

    def _add_growth(self, add: Any) -> None:
        enters = max(self.growth, key=lambda g: g.local)
        gains = [g for g in self.growth if g.gain is not None]
        amplified = max(gains, key=lambda g: g.gain or 0.0, default=None)
        lines = [f"most enters in layer {enters.layer}: {enters.local:.2g} of its output, on the reference's input"]
        if amplified is not None:
            lines.append(f"strongest gain: layer {amplified.layer}, {amplified.gain:.2f} times what came in")
        add("growth", f"Error at the end: {self.growth[-1].own:.2g} of the hidden state", *lines)

    def summary(self) -> str:
        lines = [f"candidate  {self.candidate.runs}", f"reference  {self.reference.runs}",
                 f"prompt     {self.prompt}, {self.length} tokens", ""]  # fmt: skip
        for finding in self.findings():
            lines += [finding["title"], *(f"  {line}" for line in finding["lines"])]
        if self.divergence is not None and self.same_weights:
            lines += ["", "stages around it (local)"]
            lines += [f"  {c.stage:<40} {c.error:>9.2e}  {_bound(c):<15}  {c.verdict}" for c in self.around()]
        if self.sensitivity is not None:
            lines += ["", *self.sensitivity.table()]
        lines += [f"not looked at: {PARTS.get(what, what)}: {why}" for what, why in self.reasons.items()]
        return "\n".join(printable(line) for line in lines)

    def around(self) -> list[Compared]:
        local = [c for c in self.comparisons if c.run == LOCAL]
        at = next(
            (i for i, c in enumerate(local) if self.divergence is not None and c.stage == self.divergence.stage), 0
        )
        return local[max(0, at - AROUND) : at + AROUND + 1]

    def report(self) -> dict[str, Any]:
        """For machines."""
        return report_of(self)

    def write(self, folder: Path) -> list[Path]:
        """report.json, report.jsonl (header, a record a comparison, footer) and report.html; each whole, or not there."""
        return write(self, folder)


def _error(c: Compared) -> str:
    if not c.bound:
        return f"{c.error:.1%} of the queries choose otherwise; first: {c.where}"
    return f"error {c.error:.3g}, {c.share:.3g} times its bound of {c.bound:.2g}; worst {c.where}"


def _bound(c: Compared) -> str:
    return f"bound {c.bound:.2e}" if c.bound else "of the queries"
