"""Two recordings held against each other, stage by stage, each within what its arithmetic explains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from glm_dsa import ModelArgs
from reference.equations import Weights

from ..core import bounds, compare, stages
from ..core.choices import Decision, made_by, of_stage
from ..core.report import AGREES, FAULT, MEASURED
from ..engines.recording import Recording

Array = np.ndarray
LOCAL, OWN = "local", "own"
CHOICES = (*stages.SELECTIONS, stages.ROUTING)
SCORES = "self_attn.indexer.scores"

# What each stage of a layer is computed from. A stage that differs while nothing before it does is where something is wrong.
PARENTS: dict[str, tuple[str, ...]] = {
    "input_layernorm": ("eh_proj",),
    "self_attn.q_latent": ("input_layernorm",),
    "self_attn.indexer.k": ("input_layernorm",),
    "self_attn.indexer.q": ("self_attn.q_latent",),
    "self_attn.indexer.weights": ("input_layernorm",),
    "self_attn.indexer.scores": ("self_attn.indexer.k", "self_attn.indexer.q", "self_attn.indexer.weights"),
    "self_attn.indexer.topk": ("self_attn.indexer.scores",),
    "self_attn.selection": ("self_attn.indexer.topk",),
    "self_attn.q_rope": ("self_attn.q_latent",),
    "self_attn.kv_latent": ("input_layernorm",),
    "self_attn.k_rope": ("input_layernorm",),
    "self_attn.heads": ("self_attn.q_rope", "self_attn.k_rope", "self_attn.kv_latent", "self_attn.selection"),
    "self_attn.output": ("self_attn.heads",),
    "post_attention_layernorm": ("self_attn.output",),
    "mlp.gate.logits": ("post_attention_layernorm",),
    "mlp.gate.topk": ("mlp.gate.logits",),
    "mlp.gate.weights": ("mlp.gate.logits", "mlp.gate.topk"),
    "mlp.experts": ("post_attention_layernorm", "mlp.gate.weights"),
    "mlp.shared_experts": ("post_attention_layernorm",),
    "mlp.output": ("mlp.experts", "mlp.shared_experts"),
    "mlp_output": ("post_attention_layernorm", "mlp.output"),
    "output": ("mlp_output", "self_attn.output"),
    "shared_head": ("output",),
}
# Under the choices that a layer is handed, its own do not reach what follows.
PASSED_ON_ONLY_ALONE = ("self_attn.indexer.topk", "mlp.gate.topk")


@dataclass(frozen=True)
class Compared:
    """One stage of the candidate beside the reference's. run: LOCAL (on the reference's input) or OWN (from the tokens on).
    error: in units of the reference's rms; of choices, the share of queries that differ by more than a tie. handed: whether
    the candidate went on with the reference's value."""

    stage: str
    run: str
    verdict: str
    error: float
    bound: float
    ties: int = 0
    where: str = ""
    handed: bool = True

    @property
    def layer(self) -> int | None:
        return stages.layer_of(self.stage)

    @property
    def kind(self) -> str:
        return stages.kind(self.stage)

    @property
    def share(self) -> float:
        return self.error / self.bound if self.bound else (0.0 if self.verdict != FAULT else np.inf)


class Yardstick:
    """What arithmetic alone explains at each stage of a reference.

    hf: HF's modules in the precision that is judged, on the reference's inputs and under its choices; truth: the equations,
    the same. As in the gate: 4 times what the one errs against the other, and how much less exact mlx is.
    """

    def __init__(self, args: ModelArgs, read: Weights, hf: Recording, truth: Recording, half: bool) -> None:
        """read: the reference's weights, by HF's names. half: whether 16 bit is judged."""
        self.args, self.read, self.truth, self.half = args, read, truth, half
        self.errors: dict[str, float] = {}
        worst: dict[str, float] = {}
        for stage in truth:
            kind, true, theirs = stages.kind(stage), truth[stage], hf.get(stage)
            if kind in CHOICES or true is None or theirs is None:
                continue
            if kind == stages.ROUTING_WEIGHTS:
                rows = same_experts(theirs, true)
                true, theirs = true[rows], theirs[rows]
            worst[kind] = max(worst.get(kind, 0.0), compare.values(theirs, true).error)
            self.errors[stage] = worst[kind]

    @cached_property
    def longest(self) -> int:
        embedded = self.truth["embed"]
        assert embedded is not None
        return max(bounds.longest(self.args), len(embedded))

    @property
    def is_sparse(self) -> bool:
        embedded = self.truth["embed"]
        assert embedded is not None
        return 0 < self.args.index_topk < len(embedded)

    def bound(self, stage: str) -> bounds.Bound:
        """Raises `tolerances.ReferencesDisagree` where HF and the equations differ by more than rounding."""
        true, kind = self.truth[stage], stages.kind(stage)
        assert true is not None
        if self.half:
            return bounds.bound_16(self.errors[stage], true, self.longest, packed=False)
        norm = true.shape[-1] if kind in stages.NORMS else 0
        return bounds.bound(
            self.errors[stage], true, self.longest, kind == stages.ROUTING_WEIGHTS, norm, bounds.EXPLAINED_AT_MOST
        )

    def decision(self, stage: str) -> Decision | None:
        """What a choice [S, K] is made by; None where that is not known."""
        if self.truth.get(made_by(stage, self.args)) is None:
            return None
        return of_stage(stage, self.args, lambda s: self.truth[s][None], self.bound, self.read)  # type: ignore[index]


def same_experts(ours: Array, ref: Array) -> Array:
    """bool [S]: where weights by expert [S, E] are those of the same experts."""
    return ((ours != 0) == (ref != 0)).all(-1)


def compared(
    run: str, ours: Recording, reference: Recording, yard: Yardstick, judged: bool = True
) -> Iterator[Compared]:
    """Every stage that both show, in order. judged: whether an error beyond its bound is a fault, or only measured."""
    for stage in reference:
        if stage in ours and (stage in yard.errors or stages.kind(stage) in CHOICES):
            yield one(run, stage, ours, reference, yard, judged)


def one(run: str, stage: str, ours: Recording, reference: Recording, yard: Yardstick, judged: bool = True) -> Compared:
    kind, mine, ref = stages.kind(stage), ours[stage], reference[stage]
    bad = FAULT if judged else MEASURED
    if kind in CHOICES:
        return replace(_choice(run, stage, mine, ref, yard, bad), handed=stage in ours.handed)
    if kind == stages.ROUTING_WEIGHTS and mine is not None and ref is not None and mine.shape == ref.shape:
        rows = same_experts(mine, ref)
        if not rows.any():
            return Compared(stage, run, MEASURED, 0.0, 0.0, where="no token goes to the same experts")
        mine, ref = mine[rows], ref[rows]
    absent = ours.absent.get(stage)
    if absent is not None and mine is not None and ref is not None and mine.shape == ref.shape:
        mine, ref = (np.delete(by_expert, absent, -1) for by_expert in (mine, ref))
    if mine is None or ref is None:
        return Compared(stage, run, bad, np.inf, yard.bound(stage).value, where="one of both has no such value")
    bound, found = yard.bound(stage).value, compare.values(mine, ref)
    agrees = found.error <= bound
    return Compared(stage, run, AGREES if agrees else bad, found.error, bound, where=found.problem or found.where)


def _choice(run: str, stage: str, mine: Array | None, ref: Array | None, yard: Yardstick, bad: str) -> Compared:
    """Choices as sets; a tie is none."""
    decision = yard.decision(stage)
    if decision is None or ref is None:  # every key is selected
        differs = (mine is None) != (ref is None) and yard.is_sparse
        return Compared(stage, run, bad if differs else AGREES, float(differs), 0.0)
    found = decision.difference(None if mine is None else mine[None], ref[None])
    error = found.faults / max(found.queries, 1)
    return Compared(stage, run, bad if found.faults else AGREES, error, 0.0, found.ties, found.first)


def roots(found: list[Compared]) -> list[Compared]:
    """Of local comparisons, the faults that no other fault of the same layer explains."""
    at_fault = {c.stage for c in found if c.verdict == FAULT}
    seen, handed = {c.stage for c in found}, {c.stage for c in found if c.handed}
    return [c for c in found if c.verdict == FAULT and not _explained(c.stage, at_fault, seen, handed)]


def _explained(stage: str, at_fault: set[str], seen: set[str], handed: set[str]) -> bool:
    layer = stages.layer_of(stage)
    if layer is None:
        return False
    for kind in PARENTS.get(stages.kind(stage), ()):
        parent = f"layers.{layer}.{kind}"
        if kind in PASSED_ON_ONLY_ALONE and (parent in handed or parent not in seen):
            continue
        if parent in at_fault or (parent not in seen and _explained(parent, at_fault, seen, handed)):
            return True
    return False
