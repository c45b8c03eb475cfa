"""How near two runs are to each other, stage by stage: one in which a mistake was made, and the candidate's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from glm_dsa import ModelArgs

from ..core import compare, stages
from ..core.choices import biased_scores, made_by
from ..engines.recording import Recording
from .stagewise import CHOICES, Yardstick, same_experts

Array = np.ndarray
# How many bounds a mistake made here may lie from the candidate's: each errs, and the mistake may amplify that.
EXACT = 4.0
# A mistake that rounds: how many of a stage's entries may be a rounding step apart, and of the square of its effect, how much
# they may leave: few entries at any distance, or some more that are near.
ROUNDED = ((0.01, 0.25), (0.1, 0.005))
FLIPS = 0.01  # of choices, the share that may differ: near ties under scores that the mistake has changed


class Likeness:
    """To a candidate's local recording, whose inputs are `reference`'s."""

    def __init__(self, args: ModelArgs, reference: Recording, theirs: Recording, yard: Yardstick) -> None:
        self.args, self.reference, self.theirs, self.yard = args, reference, theirs, yard

    def share(self, stage: str, seen: Recording) -> float:
        """How far another run's stage is from the candidate's, in bounds; of choices, 0 or infinite."""
        mine, theirs, kind = seen.get(stage), self.theirs.get(stage), stages.kind(stage)
        if kind in CHOICES:
            return self._choice(stage, mine, theirs, seen)
        if mine is None or theirs is None or stage not in self.yard.errors:
            return 0.0 if mine is None and theirs is None else np.inf
        rows = np.ones(len(theirs), bool)
        if kind == stages.ROUTING_WEIGHTS:
            rows = same_experts(mine, theirs)
            if not rows.any():
                return 0.0
        mine, theirs = mine[rows], theirs[rows]
        bound, found = self.yard.bound(stage).value, compare.values(mine, theirs)
        share = found.error / bound
        if share <= EXACT or found.problem:
            return share
        ref = self.reference.get(stage)
        return share if ref is None else self._rounded(ref[rows], mine, theirs, bound, share)

    def _rounded(self, ref: Array, mine: Array, theirs: Array, bound: float, share: float) -> float:
        """A mistake that rounds to 16 bit rounds a value between two neighbours either way: a few entries are a step apart, and
        what is computed of them; the others are as they should be."""
        if ref.shape != theirs.shape:
            return share
        finite = np.isfinite(theirs) & (np.abs(theirs) < -compare.LOWEST) & np.isfinite(ref) & np.isfinite(mine)
        gap, effect = (np.where(finite, a, 0).astype(np.float64) - np.where(finite, theirs, 0) for a in (mine, ref))
        scale = np.sqrt(np.mean(theirs[finite].astype(np.float64) ** 2))
        apart = (np.abs(gap) > EXACT * bound * scale).mean()
        left = (gap**2).sum() / ((effect**2).sum() or 1.0)
        return EXACT if any(apart <= few and left <= small for few, small in ROUNDED) else share

    def _choice(self, stage: str, mine: Array | None, theirs: Array | None, seen: Recording) -> float:
        """By the scores of the run that makes the mistake, where it shows them: under them the ties are."""
        decision = self.yard.decision(stage)
        if mine is None or theirs is None:  # every key
            mine, theirs = None, mine if theirs is None else theirs
        if decision is None or theirs is None:
            return 0.0 if mine is None and theirs is None else np.inf
        own, noise = self._scores(stage, seen), decision.noise
        if own is not None:
            noise *= max(_rms(own) / (_rms(decision.scores) or 1.0), 1.0)
            decision = replace(decision, scores=own[None])
        decision = replace(decision, noise=EXACT * noise)
        found = decision.difference(None if mine is None else mine[None], theirs[None])
        return 0.0 if found.faults <= FLIPS * found.queries else np.inf

    def _scores(self, stage: str, seen: Recording) -> Array | None:
        """What another run chose by."""
        own = seen.get(made_by(stage, self.args))
        if own is None or stages.kind(stage) != stages.ROUTING:
            return own
        bias = self.yard.read(f"model.{stage.removesuffix('topk')}e_score_correction_bias")
        return biased_scores(own, bias)


def _rms(values: Array) -> float:
    finite = values[np.isfinite(values) & (np.abs(values) < -compare.LOWEST)].astype(np.float64)
    return float(np.sqrt(np.mean(finite**2))) if finite.size else 0.0
