"""Three references agree before anything is judged: HF in float32, HF in float64, and the float64 equations."""

import dataclasses

import pytest
import torch

from reference import hf
from reference.capture import capture
from reference.modules import choosing
from verify.cases import Case
from verify.core import bounds, exits, stages
from verify.core.checker import Judge
from verify.core.report import NOT_JUDGED, Comparison

CLAIM = "the references agree"
FLOAT64 = 2.0**-29  # its rounding, in units of float32's


class Between(Judge):
    """Holds the oracles to each other: where they differ, nobody is on trial."""

    def _fault(self, case: str, stage: str, *lines: str, error: float = float("inf"), bound: float = 0.0) -> None:
        self.report.add(Comparison(self.claim, case, stage, NOT_JUDGED, error, bound, note=lines[0]))
        raise bounds.ReferencesDisagree(f"HF and the equations differ at {stage} [{case}]: {'; '.join(lines)}")


@pytest.fixture
def judge(judge):
    return Between(judge.report, judge.claim, judge.again, judge.seed, judge.layers)


@pytest.fixture
def stop_when_they_disagree(gate):
    """Nothing is judged by references that contradict each other, or that fail."""
    yield
    if gate.claims[CLAIM]["failed"]:
        pytest.exit("the references cannot be held against each other: mend that first", returncode=exits.FAULT)
    if gate.claims[CLAIM][NOT_JUDGED]:
        pytest.exit("the references disagree, or one of them failed: nothing can be judged by them",
                    returncode=exits.NOT_JUDGED)  # fmt: skip


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("regime", ["short", "long"])
@pytest.mark.usefixtures("stop_when_they_disagree")
def test_hf_agrees_with_the_equations(case: Case, judge, regime, precision):
    """The yardstick for float32 is the equations themselves, run in float32; for float64 that, times 2^-29."""
    reference = case.reference(case.lengths[0 if regime == "short" else -1])
    seen = reference.hf
    if precision == "float64":
        model = hf.load(case.folder, case.conventions, dtype=torch.float64, **case.changes)
        given = {stage.removesuffix(".topk"): choice for stage, choice in reference.given.items()}
        with (
            hf.in_float64(model),
            choosing(model, given),
            capture(model) as seen,
        ):  # where float32 is torn, under its choices
            hf.forward(model, reference.tokens)
    explained = reference.single
    for stage in stages.in_order(reference.truth):
        kind = stages.kind(stage)
        if kind in stages.SELECTIONS or kind == stages.ROUTING:
            continue
        bound = bounds.bound(explained[stage], reference.truth[stage], 16, explained=case.explained_at_most)
        if precision == "float64":
            bound = dataclasses.replace(bound, value=bound.value * FLOAT64)
        judge.values(case.name, f"{stage} ({precision})", seen[stage], reference.truth[stage], bound)


@pytest.mark.usefixtures("stop_when_they_disagree")
def test_hf_selects_what_the_equations_select(case: Case, judge):
    reference = case.reference(case.lengths[-1])
    for stage in stages.in_order(reference.given):
        if reference.is_sparse or stages.kind(stage) == stages.ROUTING:
            judge.choice_stage(stage, reference.truth, reference, local=False)
