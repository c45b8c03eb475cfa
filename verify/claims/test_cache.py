"""Chunked prefill, decode, rewind and left-padded batches give what the uncached run gives."""

import mlx.core as mx
import numpy as np
import pytest

from glm_dsa import store
from verify.cases import Case
from verify.claims.replay import Row, hold

CLAIM = "caches: chunks, decode, rewind, padding"

# Chunks of one, odd ones, and one that crosses index_topk = 16 in its middle; the tail is decoded token by token.
ACROSS = "across index_topk, token by token"
CUTS = {
    "chunks": [1, 12, 7, 31, 1, 28],
    "decode": [61] + [1] * 19,
    "decode from the first token": [1] * 24 + [56],
    "few at a time": [30, 2, 3, 5, 8, 13, 19],
    "within index_topk": [5, 1, 1, 4, 3],
}


@pytest.fixture
def reference(case: Case):
    return case.reference(case.long)


def cuts_of(case: Case, name: str) -> list[int]:
    if name == ACROSS:
        first = max(case.topk - 3, 1)
        return [first, *[1] * 6, case.long - first - 6]
    return case.scaled(CUTS[name])


def check_cuts(case: Case, judge, name: str, cuts: list[int], batch: int = 1) -> None:
    reference = case.reference(sum(cuts), batch)
    hold(case, judge, name, [Row(reference, of=i) for i in range(batch)], lambda replay: replay(*cuts))


@pytest.mark.parametrize("name", [*CUTS, ACROSS])
def test_cuts(case: Case, judge, name):
    check_cuts(case, judge, name, cuts_of(case, name))


@pytest.mark.parametrize("step", [1, 7])
def test_the_growth_of_the_buffers(case: Case, judge, step, monkeypatch):
    """In steps so small that chunks and decode cross many; the true one is crossed where contents are preserved."""
    monkeypatch.setattr(store, "STEP", step)
    check_cuts(case, judge, f"buffers grow by {step}", cuts_of(case, "decode"))


@pytest.mark.parametrize("cuts", [[80], [40, 37, 1, 1, 1]], ids=["prefill", "chunks and decode"])
def test_a_batch_without_padding(case: Case, judge, cuts):
    """Three rows, three selections."""
    check_cuts(case, judge, "batch of 3", case.scaled(cuts), batch=3)


def test_rewind(case: Case, judge, reference):
    """What was trimmed leaves no trace, in the latent, the rotary keys or the indexer's keys."""
    kept, model = case.long * 5 // 8, case.ours.model

    def run(replay):
        head, start = replay(kept), 0
        for cut in (6, 1, 6):
            mx.eval(model(mx.array(case.tokens(13)[:, start : start + cut]), replay.cache))
            start += cut
        trimmed = [c.trim(13) for c in replay.cache]
        judge.holds(case.name, "trim", trimmed == [13] * len(replay.cache), "every layer trims 13 tokens")
        return np.concatenate([head, replay(1, case.long - kept - 1)], axis=1)

    hold(case, judge, "rewind", [Row(reference)], run)


@pytest.mark.parametrize("cuts", [[80], [33, 40, 1, 1, 1, 1, 1, 1, 1]], ids=["prefill", "chunks and decode"])
def test_left_padded_batch(case: Case, judge, cuts):
    """Rows far beyond index_topk, a little, and within it, in one batch: no pad may be attended to, or selected."""
    lengths = (case.long, case.long * 67 // 80, case.topk + 5, case.topk // 2 + 1)
    rows = [Row(case.reference(n), case.long - n, name=f"row of {n} in a padded batch") for n in lengths]
    cuts = case.scaled(cuts)
    hold(case, judge, "padded batch", rows, lambda replay: replay(*cuts), left_padding=[row.pad for row in rows])
