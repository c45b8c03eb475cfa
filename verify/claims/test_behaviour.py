"""What a trained model can do, it does here as under HF: recall from beyond index_topk, drafts, a layout that its weights tell."""

from functools import cache

import mlx.core as mx
import numpy as np
import pytest

from glm_dsa import trace
from reference import corpus, hf, layout
from reference.kept import probes
from reference.mtp import Mtp
from reference.training.measure import drafted, greedy
from verify.cases import Case, group_size
from verify.core.report import MEASURED, Comparison

CLAIM = "a trained model's behaviour"
pytestmark = pytest.mark.needs("trained")
CHUNK = 93  # odd, so that prompts are cut within lines


@cache
def said_by_hf(case: Case, prompt: str):
    return greedy(case.hf, corpus.encode(prompt), corpus.VALUE)


def said_by_ours(case: Case, prompt, count, **options):
    """Greedy, from a cache: the prompt in chunks, then token by token. With the number of keys that each layer looked at."""
    model, said = case.ours.model, []
    cache = model.make_cache(**options)
    chunks = [prompt[start : start + CHUNK] for start in range(0, len(prompt), CHUNK)]
    for _ in range(count):
        for chunk in chunks:
            with trace.capture(model) as seen:
                logits = model(mx.array(chunk[None]), cache)
        said.append(int(mx.argmax(logits[0, -1])))
        chunks = [np.array(said[-1:])]
    selections = [value for stage, value in seen.items() if stage.endswith("self_attn.selection")]
    return np.array(said), {0 if s is None else s.shape[-1] for s in selections}


def is_the_same(case: Case, prompt, ours, theirs, tie):
    """Equal up to the first token at which HF itself is torn between two."""
    if np.array_equal(ours, theirs):
        return True
    at = int(np.argmin(ours == theirs))
    best = np.sort(hf.forward(case.hf, np.append(prompt, theirs[:at])[None])[0, -1].numpy())
    return best[-1] - best[-2] < tie


def test_recall_from_beyond_index_topk(case: Case, judge, gate):
    """A value said 4 x index_topk tokens before: the same answers as HF's, and more than half of them right."""
    check_recall(case, judge, gate, "float cache", None, tie=1e-3)


@pytest.mark.any_layout
def test_recall_from_a_packed_cache(case: Case, judge, gate):
    """As above, from an int8 cache."""
    check_recall(case, judge, gate, "int8 cache", 8, tie=0.1)


def check_recall(case: Case, judge, gate, name: str, bits: int | None, tie: float) -> None:
    options = {} if bits is None else {"kv_bits": bits, "kv_group_size": group_size(case.args)}
    right, asked = 0, probes()["needles"]
    for i, probe in enumerate(asked):
        prompt = corpus.encode(probe["prompt"])
        theirs = said_by_hf(case, probe["prompt"])
        ours, looked_at = said_by_ours(case, prompt, corpus.VALUE, **options)
        sparse = f"every layer looks at index_topk of {len(prompt)} tokens (at {sorted(looked_at)})"
        judge.holds(case.name, f"sparse ({name})", looked_at == {case.args.index_topk}, sparse)
        if bits is None or corpus.decode(theirs) == probe["value"]:  # what HF does not know, packing may change
            expected = f"{corpus.decode(ours)!r} where HF says {corpus.decode(theirs)!r}"
            judge.holds(case.name, f"answer {i} ({name})", is_the_same(case, prompt, ours, theirs, tie), expected)
        right += corpus.decode(ours) == probe["value"]
    share = f"more than half of the values are recalled ({right} of {len(asked)})"
    judge.holds(case.name, f"recall ({name})", 2 * right > len(asked), share)
    note = f"{right} of {len(asked)} values recalled from {4 * case.args.index_topk} tokens before"
    gate.add(Comparison(CLAIM, case.name, f"recall ({name})", MEASURED, note=note))


@pytest.mark.any_layout
def test_drafts(case: Case, judge, gate):
    """Three greedy draft steps, each fed what the one before chose: the same tokens as HF's chain."""
    steps, accepted, length = 3, [], 3 * case.args.index_topk
    mtp = Mtp(case.hf_with_mtp, case.folder, case.conventions.mtp_reuses_selection)
    model = case.ours.model
    for i, prompt in enumerate(case.tokens(length, batch=3)):
        said = greedy(case.hf, prompt, steps + 1)
        theirs = drafted(case.hf, mtp, prompt, said[0], steps)
        with trace.capture(model) as seen:
            model(mx.array(prompt[None]))
        fed = np.append(prompt[1:], said[0])[None]
        drafts = model.draft(seen["norm"], mx.array(fed), model.make_mtp_cache(), steps)
        ours = np.array([int(mx.argmax(draft.logits[0, -1])) for draft in drafts])
        expected = f"{corpus.decode(ours)!r} where HF drafts {corpus.decode(theirs)!r}"
        judge.holds(case.name, f"drafts of text {i}", np.array_equal(ours, theirs), expected)
        accepted.append(int(np.logical_and.accumulate(ours == said[1:]).sum()))
    note = f"{sum(accepted)} of {steps * len(accepted)} drafts are what the model says"
    gate.add(Comparison(CLAIM, case.name, "drafts", MEASURED, note=note))


def test_the_weights_tell_their_layout(case: Case, judge, gate):
    """Under the layout that config.json names, the indexers catch what attention looks at; under the other they lose it: the
    checkpoint and the convention that is in force are judged here, by the equations; that the candidate obeys it, elsewhere.
    """
    tokens = case.tokens(4 * case.args.index_topk, batch=4)
    found = layout.evidence(layout.captured_mass(case.config, case.weights, tokens, case.conventions))
    says = ", ".join(f"{rope} {mass}" for rope, mass in found.mass.items())
    judge.holds(case.name, "captured mass", found.layout == case.args.indexer_rope, f"attention mass captured: {says}")
    note = f"{says}; ratio {found.ratio:.2f}"
    gate.add(Comparison(CLAIM, case.name, "captured mass by layout", MEASURED, note=note))
