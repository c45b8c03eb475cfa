"""What a comparison found: plain objects, and a compact summary, top findings first."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from reference.layout import Evidence

from ..engines.spec import Side
from .cache_check import Cached
from .export import report_of, write
from .hypotheses import Cause, Diagnosis
from .patching import Repair
from .sensitivity import Sensitivity
from .stagewise import LOCAL, Compared
from .summary import findings_of, summary_of

Array = np.ndarray
AROUND = 3  # stages shown before and after the first divergence
STRAYS = 1e-4  # nats of mean KL between two sound sides in float32: far more than rounding


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

    candidate: Side
    reference: Side
    length: int
    prompt: str
    same_weights: bool
    comparisons: list[Compared] = field(default_factory=list)
    divergence: Compared | None = None
    elsewhere: Compared | None = None  # the first one, where it lies outside of what is reported
    unseen: list[str] = field(default_factory=list)  # outputs that the candidate does not show
    config: list[str] = field(default_factory=list)  # where the two configs say otherwise
    experts: list[str] = field(
        default_factory=list
    )  # which of the reference's are there, where not all are, in its order
    diagnosis: Diagnosis | None = None
    growth: list[Growth] = field(default_factory=list)
    choices: list[Choices] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    distributions: dict[str, float] = field(default_factory=dict)
    repair: Repair | None = None
    cached: Cached | None = None
    sensitivity: Sensitivity | None = None
    mass: Evidence | None = None
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
        """On the same weights, at every stage, reported or not, in one call or several; and nothing was out of sight."""
        is_sound = self.divergence is None and self.elsewhere is None and self.cached is None
        return is_sound and self.same_weights and not self.unseen and not self.strays

    @property
    def strays(self) -> bool:
        """Each layer agrees on the reference's input, and the logits of both alone do not: no tie, no rounding does that."""
        in_16_bit = {"bfloat16", "float16"} & {self.candidate.dtype, self.reference.dtype}
        has_ties = any(c.ties for c in self.comparisons)
        return bool(self.distributions) and not in_16_bit and not has_ties and self.distributions["kl_mean"] > STRAYS

    @property
    def causes(self) -> list[Cause]:
        return [] if self.diagnosis is None else self.diagnosis.causes

    def findings(self) -> list[dict[str, Any]]:
        """The top findings first: {kind, title, lines}."""
        return findings_of(self)

    def summary(self) -> str:
        return summary_of(self)

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
