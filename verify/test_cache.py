"""Chunked prefill, decode, rewind and left-padded batches give what the uncached run gives."""

import mlx.core as mx
import numpy as np
import pytest

from verify.candidate import to_numpy
from verify.cases import Case

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


def run_in_chunks(case: Case, tokens, cuts, cache):
    out, start = [], 0
    for cut in cuts:
        out.append(case.ours.model(mx.array(tokens[:, start : start + cut]), cache))
        mx.eval(out[-1])
        start += cut
    assert start == tokens.shape[1], "the cuts must cover the prompt"
    return to_numpy(mx.concatenate(out, axis=1))


@pytest.fixture
def reference(case: Case):
    return case.reference(case.long)


def cuts_of(case: Case, name: str) -> list[int]:
    if name == ACROSS:
        return [case.topk - 3, *[1] * 6, case.long - case.topk - 3]
    return case.scaled(CUTS[name])


@pytest.mark.parametrize("name", [*CUTS, ACROSS])
def test_cuts(case: Case, judge, name):
    check_cuts(case, judge, name, cuts_of(case, name))


@pytest.mark.any_layout
def test_the_growth_of_the_buffers(case: Case, judge):
    """They grow by 256 tokens."""
    check_cuts(case, judge, "across the growth of the buffers", [500, 8, 1, 1, 1, 1, 1, 1, 16])


def check_cuts(case: Case, judge, name: str, cuts: list[int]) -> None:
    reference = case.reference(sum(cuts))
    logits = run_in_chunks(case, reference.tokens, cuts, case.ours.model.make_cache())
    judge.values(case.name, f"logits ({name})", logits, reference.hf["logits"], reference.bound("logits", local=False))


@pytest.mark.parametrize("cuts", [[80], [40, 37, 1, 1, 1]], ids=["prefill", "chunks and decode"])
def test_a_batch_without_padding(case: Case, judge, cuts):
    """Three rows, three selections."""
    reference = case.reference(case.long, batch=3)
    logits = run_in_chunks(case, reference.tokens, case.scaled(cuts), case.ours.model.make_cache())
    judge.values(
        case.name, "logits (batch of 3)", logits, reference.hf["logits"], reference.bound("logits", local=False)
    )


def test_rewind(case: Case, judge, reference):
    """What was trimmed leaves no trace, in the latent, the rotary keys or the indexer's keys."""
    cache = case.ours.model.make_cache()
    kept = case.long * 5 // 8
    head = run_in_chunks(case, reference.tokens[:, :kept], [kept], cache)
    run_in_chunks(case, case.tokens(13), [6, 1, 6], cache)
    trimmed = [c.trim(13) for c in cache]
    judge.holds(case.name, "trim", trimmed == [13] * len(cache), "every layer trims 13 tokens")
    rest = run_in_chunks(case, reference.tokens[:, kept:], [1, case.long - kept - 1], cache)
    logits = np.concatenate([head, rest], axis=1)
    judge.values(case.name, "logits (rewind)", logits, reference.hf["logits"], reference.bound("logits", local=False))


@pytest.mark.parametrize("cuts", [[80], [33, 40, 1, 1, 1, 1, 1, 1, 1]], ids=["prefill", "chunks and decode"])
def test_left_padded_batch(case: Case, judge, cuts):
    """Rows far beyond index_topk, a little, and within it, in one batch: no pad may be attended to, or selected."""
    rows = [case.reference(n) for n in (case.long, case.long * 67 // 80, case.topk + 5, case.topk // 2 + 1)]
    padding = [case.long - r.length for r in rows]
    tokens = np.concatenate([np.pad(r.tokens, ((0, 0), (p, 0))) for r, p in zip(rows, padding, strict=True)])
    logits = run_in_chunks(case, tokens, case.scaled(cuts), case.ours.model.make_cache(left_padding=padding))
    for row, (reference, pad) in enumerate(zip(rows, padding, strict=True)):
        bound = reference.bound("logits", local=False)
        stage = f"logits (row of {reference.length} in a padded batch)"
        judge.values(case.name, stage, logits[row : row + 1, pad:], reference.hf["logits"], bound)
