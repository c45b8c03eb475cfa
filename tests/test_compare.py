"""The judge's own arithmetic, on inputs where the answer is known."""

import numpy as np
import pytest

from verify.core import bounds, compare, stages
from verify.core.choices import Decision, of_keys

INF = np.inf


def test_values_measure_in_units_of_the_reference():
    ref = np.array([3.0, -4.0, 0.0, 0.0])  # rms 2.5
    difference = compare.values(ref + np.array([0, 0, 0.5, 0]), ref)
    assert difference.error == pytest.approx(0.2)
    assert difference.where.startswith("at (2,): 0.5, ref 0")


@pytest.mark.parametrize(
    ("ours", "problem"),
    [
        (np.zeros(3), "shape"),
        (np.array([1.0, np.nan]), "1 entries are NaN on one side only, first at (1,)"),
        (np.array([1.0, -INF]), "infinite"),
    ],
    ids=["shape", "nan", "inf"],
)
def test_values_that_cannot_be_compared(ours, problem):
    difference = compare.values(ours, np.array([1.0, 2.0]))
    assert problem in difference.problem
    assert difference.error == INF


def test_an_empty_reference_is_no_agreement():
    assert compare.values(np.zeros((0, 4)), np.zeros((0, 4))).problem


def test_masked_scores_agree_however_they_are_masked():
    lowest = np.finfo(np.float32).min
    assert compare.values(np.array([1.0, -INF]), np.array([1.0, lowest + 3])).error == 0
    assert compare.values(np.array([1.0, 5.0]), np.array([1.0, -INF])).error == INF


def test_a_zero_reference():
    assert compare.values(np.zeros(3), np.zeros(3)).error == 0
    assert compare.values(np.array([0.0, 1e-30, 0.0]), np.zeros(3)).error == INF


SCORES = np.array([[[0.9, 0.8, 0.7, 0.7 + 1e-7, 0.1, -INF]]])


def select(*keys):
    return np.array([[keys]])


@pytest.mark.parametrize(
    ("ours", "ref", "noise", "ties", "faults"),
    [
        (select(0, 1, 2), select(2, 1, 0), 0.0, 0, 0),  # order is free
        (select(0, 1, 2), select(0, 1, 3), 1e-6, 1, 0),  # 2 and 3 are as good as equal
        (select(0, 1, 2), select(0, 1, 3), 1e-9, 0, 1),  # ... but not at this noise
        (select(0, 1, 4), select(0, 1, 3), 1e-6, 0, 1),
        (select(0, 2, 3), select(0, 1, 3), 1e-6, 0, 1),  # one swapped key is near the boundary, the other is not
        (select(0, 1), select(0, 1, 3), 1e-6, 0, 1),  # too few
        (select(0, 1, 5), select(0, 1, 3), 1.0, 0, 1),  # a masked key in a valid one's place is no tie
        (None, select(0, 1, 3), 1e-6, 0, 1),  # dense where a selection is expected
    ],
)
def test_selections(ours, ref, noise, ties, faults):
    difference = of_keys(SCORES, 3, noise).difference(ours, ref)
    assert (difference.ties, difference.faults) == (ties, faults)


def test_selections_of_early_rows():
    """Rows with fewer valid keys than K list masked ones: which, is of no account. Rows that see nothing are dropped."""
    scores = np.array([[[0.5, -INF, -INF, -INF], [-INF] * 4]])
    difference = of_keys(scores, 2, 0.0).difference(np.array([[[0, 1], [2, 3]]]), np.array([[[3, 0], [0, 1]]]))
    assert (difference.queries, difference.differing) == (1, 0)


def test_what_is_torn_and_what_ties_exactly():
    scores = np.array(
        [[[0.9, 0.8, 0.5, 0.5], [0.9, 0.8, 0.5, 0.5 - 1e-7], [0.9, 0.8, 0.5, 0.1], [0.9, 0.8, 0.5, -INF]]]
    )
    decision = of_keys(scores, 3, 1e-6)
    assert decision.torn.tolist() == [[True, True, False, False]]
    assert decision.exact.tolist() == [[True, False, False, False]]
    assert not of_keys(scores, 4, 1e-6).torn.any(), "nothing is left out"


GROUPED = np.array([[[0.9, 0.1, 0.5, 0.5 + 1e-8, 0.8, 0.7]]])  # three groups of two, of sums 1.0, 1.0 and 1.5


@pytest.mark.parametrize(
    ("ours", "noise", "ties", "faults"),
    [
        (select(4, 0), 1e-9, 0, 1),  # the second group wins by 1e-8, which this noise does not explain
        (select(4, 0), 1e-6, 1, 0),  # ... but this: the first may win, and then its best is chosen
        (select(4, 5), 1e-6, 0, 0),
        (select(0, 3), 1e-6, 0, 1),  # of both groups that are near, one may win
        (select(4, 1), 1e-6, 0, 1),  # not the best of the group that may win
    ],
)
def test_groups_that_are_near_may_win_either_way(ours, noise, ties, faults):
    decision = Decision(GROUPED, 2, noise, "experts", groups=3, top_groups=2)
    assert decision.torn.item() == (noise == 1e-6)
    for one, other in ((ours, select(4, 5)), (select(4, 5), ours)):  # whichever of both is the right one
        difference = decision.difference(one, other)
        assert (difference.ties, difference.faults) == (ties, faults)


def test_distributions():
    ref = np.log(np.array([[0.5, 0.5], [0.9, 0.1]]))
    ours = np.log(np.array([[0.25, 0.75], [0.9, 0.1]]))
    found = compare.distributions(ours, ref)
    due = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert found.kl_max == pytest.approx(due)
    assert found.kl_mean == pytest.approx(due / 2)
    assert found.top1 == 0.5


def test_bounds_are_derived():
    ref = np.array([1.0, -1.0, 2.0])
    bound = bounds.bound(1e-6, ref, 16)
    assert bound.value == 4 * 1e-6 * bound.ratio
    assert "reference's own error 1.00e-06" in bound.derivation
    assert bounds.bound(0.0, ref, 16).value == pytest.approx(4 * 2.0**-24 * 2 / np.sqrt(2) * bound.ratio)
    assert all(1 <= bounds.primitive_ratio(n) <= 8 for n in (16, 64, 1024, 6144))


def test_references_that_disagree_make_no_bound():
    """A bound from an error that float32 does not explain would pass anything."""
    for error in (1e-3, float("inf"), float("nan")):
        with pytest.raises(bounds.ReferencesDisagree, match="where float32 explains"):
            bounds.bound(error, np.ones(3), 16)


def test_no_environment_variable_loosens_a_bound(monkeypatch):
    before = bounds.bound(1e-6, np.ones(3), 64)
    for name in ("GLM_DSA_TOLERANCE", "TOLERANCE_SCALE", "CI"):
        monkeypatch.setenv(name, "1000")
    assert bounds.bound(1e-6, np.ones(3), 64) == before


def test_stages_are_ordered_as_computed():
    names = ["logits", "layers.1.output", "layers.0.output", "layers.0.self_attn.indexer.topk", "embed", "norm"]
    assert stages.in_order(names) == [
        "embed", "layers.0.self_attn.indexer.topk", "layers.0.output", "layers.1.output", "norm", "logits",
    ]  # fmt: skip
    assert stages.kind("layers.12.mlp.gate.topk") == "mlp.gate.topk"
    assert stages.layer_of("layers.12.mlp.gate.topk") == 12
    assert stages.layer_of("logits") is None
