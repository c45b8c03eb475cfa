"""Ties: a checkpoint whose indexer has two heads makes exact ones in most rows, and HF differs from itself there."""

import numpy as np
import pytest

from reference import checkpoints
from verify import faults
from verify.cases import Case, Spec
from verify.claims import test_cache, test_mtp
from verify.claims.replay import Row, hold, in_columns
from verify.core.checker import Discrepancy, Judge
from verify.core.report import Report


@pytest.fixture(scope="module")
def few_heads(tmp_path_factory):
    config = checkpoints.tiny(num_hidden_layers=4, index_n_heads=2)
    return Case(Spec("few-heads", config, {"indexer_rope": "interleaved"}), tmp_path_factory.mktemp("case"), 0)


@pytest.fixture
def judge():
    return Judge(Report(), "claim", "again", 0)


def test_most_rows_lie_behind_a_tie(few_heads):
    reference = few_heads.reference(few_heads.long)
    decision = reference.decision("layers.0.self_attn.indexer.topk", local=False)
    assert decision.exact.sum() > 5
    assert reference.untied.sum() < few_heads.long // 2


def test_a_sound_model_is_not_condemned_for_ties(few_heads, judge):
    reference = few_heads.reference(few_heads.long)
    test_cache.test_cuts(few_heads, judge, "decode")
    test_cache.test_rewind(few_heads, judge, reference)
    test_cache.test_left_padded_batch(few_heads, judge, [33, 40, 1, 1, 1, 1, 1, 1, 1])
    test_mtp.test_draft_steps_that_select_anew(few_heads, judge, "long", False)
    test_mtp.test_a_left_padded_batch(few_heads, judge, "long")
    judged = [c for c in judge.report.comparisons if c.stage.startswith("logits (rewind)")]
    assert judged
    assert sum(c.exact_ties for c in judge.report.comparisons) > 100, "ties are counted"


@pytest.mark.parametrize(
    ("fault", "claim"),
    [
        ("trim-main-only", lambda case, judge: test_cache.test_rewind(case, judge, case.reference(case.long))),
        ("rope-offset-after-cache", lambda case, judge: test_cache.test_cuts(case, judge, "decode")),
        ("indexer-caches-zeros", lambda case, judge: test_cache.test_cuts(case, judge, "chunks")),
        ("topk-unmasked-decode", lambda case, judge: test_cache.test_left_padded_batch(case, judge, [33, 40, *[1] * 7])),
        ("mtp-concat-order", lambda case, judge: test_mtp.test_draft_steps_that_select_anew(case, judge, "long", False)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_no_fault_hides_behind_a_tie(few_heads, judge, fault, claim):
    with faults.seeded(fault), pytest.raises(Discrepancy, match="FAULT"):
        claim(few_heads, judge)


def test_what_lies_before_any_tie_is_held_in_a_free_run(few_heads, judge):
    """What the injected run would not show: a run that is wrong only where nobody listens."""
    row = Row(few_heads.reference(few_heads.long))

    def run(replay):
        logits = replay(few_heads.long)
        if replay.is_free:
            logits[:, 0] += 1
        return logits

    with pytest.raises(Discrepancy, match="FAULT"):
        hold(few_heads, judge, "prefill", [row], run)


def test_a_selection_in_the_columns_of_a_padded_batch():
    """Positions become columns behind the pads; rows that see too few keys are filled up with what they do not see."""
    choice = np.array([[0, 1, 2], [1, 2, 3]])  # of the tokens at positions 2 and 3, the best three
    assert in_columns(choice, first=2, pad=2, pads=0, width=6, topk=3).tolist() == [[2, 3, 4], [3, 4, 5]]
    early = np.array([[0, 1, 3]])  # position 1 sees two keys; 3 lies in its future
    assert in_columns(early, first=1, pad=1, pads=1, width=5, topk=3).tolist() == [[0, 1, 2], [0, 1, 2]]
