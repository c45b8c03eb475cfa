"""Of a pruned candidate, what pruning leaves as it was, held to the reference: all stages but those behind the router, and
the experts' outputs of tokens that go to the same ones."""

from __future__ import annotations

from ..core import compare, stages
from ..core.report import FAULT
from ..engines.recording import Recording
from .stagewise import LOCAL, Yardstick, compared

EXPERTS = "mlp.experts"
CHANGED = (stages.ROUTING, EXPERTS, "mlp.output", "mlp_output", "output", "shared_head")


def remaining(local: Recording, reference: Recording, yard: Yardstick) -> str:
    """local: the candidate's, on the reference's input."""
    others = [c for c in compared(LOCAL, local, reference, yard) if c.kind not in CHANGED]
    wrong = next((c for c in others if c.verdict == FAULT), None)
    if wrong is not None:
        return f"what pruning leaves as it was differs too, first {wrong.stage} (error {wrong.error:.3g})"
    tokens, seen = 0, 0
    for stage in (s for s in reference if stages.kind(s) == EXPERTS):
        mine, ref = local.get(stage), reference[stage]
        routing = stage.replace(EXPERTS, stages.ROUTING)
        own, theirs = local.get(routing), reference.get(routing)
        if mine is None or ref is None or own is None or theirs is None:
            continue
        rows = compare.same_sets(own, theirs)
        tokens, seen = tokens + int(rows.sum()), seen + len(rows)
        error = compare.values(mine[rows], ref[rows]).error if rows.any() else 0.0
        if not error <= yard.bound(stage).value:
            return (
                f"experts that are there are not the reference's: {stage} differs for tokens that go to the same ones "
                f"(error {error:.3g})"
            )
    share = (
        f"{tokens / seen:.1%} of tokens go to the same experts, which answer alike" if seen else "no experts are shown"
    )
    return f"what pruning leaves as it was agrees at every stage, on the reference's input; {share}"
