"""Chunked prefill, decode, rewind and left-padded batches give what the uncached run gives."""

import mlx.core as mx
import numpy as np
import pytest

from glm_dsa import store
from verify import compare, stages
from verify.candidate import to_numpy
from verify.cases import Case, Reference

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


@pytest.mark.parametrize("step", [1, 7])
def test_the_growth_of_the_buffers(case: Case, judge, step, monkeypatch):
    """In steps so small that chunks and decode cross many; the true one is crossed where contents are preserved."""
    monkeypatch.setattr(store, "STEP", step)
    check_cuts(case, judge, f"buffers grow by {step}", cuts_of(case, "decode"))


def check_cuts(case: Case, judge, name: str, cuts: list[int], batch: int = 1) -> None:
    """Free-running. A near tie that falls the other way changes all that follows: then the same once more, each choice judged
    as a set and the reference's put in its place."""
    reference = case.reference(sum(cuts), batch)
    logits = run_in_chunks(case, reference.tokens, cuts, case.ours.model.make_cache())
    bound = reference.bound("logits", local=False)
    if not compare.values(logits, reference.hf["logits"]).error <= bound.value:
        logits = under_its_choices(case, judge, name, reference, cuts)
    judge.values(case.name, f"logits ({name})", logits, reference.hf["logits"], bound)


def under_its_choices(case: Case, judge, name: str, reference: Reference, cuts: list[int]) -> np.ndarray:
    cache, start, logits = case.ours.model.make_cache(), 0, []
    for cut in cuts:
        rows = slice(start, start + cut)
        start += cut
        given = stages.of_rows(reference.injections, rows, case.args.index_topk)
        seen = case.ours.forward(reference.tokens[:, rows], cache, given)
        for stage in stages.in_order(given):
            judge.choice(f"{stage} ({name})", seen[stage], reference, stage, rows)
        logits.append(seen["logits"])
    return np.concatenate(logits, axis=1)


@pytest.mark.parametrize("cuts", [[80], [40, 37, 1, 1, 1]], ids=["prefill", "chunks and decode"])
def test_a_batch_without_padding(case: Case, judge, cuts):
    """Three rows, three selections."""
    check_cuts(case, judge, "batch of 3", case.scaled(cuts), batch=3)


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
