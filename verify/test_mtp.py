"""Multi-token prediction: four chained draft steps, with the selection reused and made anew."""

import mlx.core as mx
import numpy as np
import pytest

from reference.equations import Equations
from reference.mtp import Mtp
from verify import compare, tolerances
from verify.candidate import Ours, to_numpy
from verify.cases import Case

CLAIM = "MTP, chained draft steps"
STEPS = 4


def references(case: Case, conventions, length):
    """(tokens fed at each step, HF's drafts, the equations' drafts), from HF's hidden after the final norm."""
    reference = case.reference(length)
    random = np.random.default_rng([case.seed, 7])
    following = random.integers(3, case.args.vocab_size, (1, STEPS))
    tokens = [np.concatenate([reference.tokens[:, 1:], following[:, :1]], axis=1)]
    tokens += [following[:, i : i + 1] for i in range(1, STEPS)]
    hidden = reference.hf["norm"]
    mtp = Mtp(case.hf_with_mtp, case.folder, conventions.mtp_reuses_selection, conventions.mtp_zero_first_embedding)
    truth = Equations(case.config, case.weights, conventions).draft(hidden.astype(np.float64), tokens, STEPS)
    return hidden, tokens, mtp.draft(hidden, tokens, STEPS), truth


@pytest.mark.needs("mtp")
@pytest.mark.parametrize("zero_first", [False, True], ids=["first kept", "first zeroed"])
@pytest.mark.parametrize("regime", ["short", "long"])
def test_draft_steps_that_select_anew(case: Case, judge, regime, zero_first):
    """In the short regime the drafts themselves cross index_topk."""
    overrides = {"mtp_reuses_selection": False} if case.args.has_indexer else {}
    check(case, judge, regime, overrides | {"mtp_zero_first_embedding": zero_first})


@pytest.mark.needs("mtp", "indexer")
@pytest.mark.parametrize("regime", ["short", "long"])
def test_draft_steps_that_reuse_the_first_selection(case: Case, judge, regime):
    check(case, judge, regime, {"mtp_reuses_selection": True})


def check(case: Case, judge, regime, overrides):
    conventions = case.conventions.__class__(**{**vars(case.conventions), **overrides})
    hidden, tokens, hf, truth = references(case, conventions, case.lengths[0 if regime == "short" else -1])

    ours = Ours(case.folder, **{**case.spec.overrides, **overrides})
    cache = ours.model.make_mtp_cache()
    drafts = ours.model.draft(
        mx.array(hidden),
        mx.array(tokens[0]),
        cache,
        STEPS,
        choose=lambda step, _: mx.array(tokens[(step + 1) % STEPS][:, 0]),
    )
    written = (cache.length, cache.index_length if cache.has_indexer else cache.length)
    due = tokens[0].shape[1] + STEPS - 1
    judge.holds(
        case.name,
        "mtp cache",
        written == (due, due),
        f"each step writes its latent and its indexer key: {written} of {due}",
    )
    error = 0.0
    for step in range(STEPS):
        (hf_logits, hf_hidden, _), (true_logits, true_hidden) = hf[step], truth[step]
        for stage, mine, ref, true in (
            ("hidden", drafts[step].hidden, hf_hidden, true_hidden), ("logits", drafts[step].logits, hf_logits, true_logits)
        ):  # fmt: skip
            error = max(error, compare.values(ref, true).error)
            bound = tolerances.bound(error, ref, max(case.longest, due))
            judge.values(case.name, f"mtp step {step} {stage}", to_numpy(mine), ref, bound)


@pytest.mark.needs("mtp")
def test_drafts_rewind(case: Case, judge):
    """Rejected drafts, trimmed, leave no trace in the MTP layer's cache."""
    hidden, tokens, *_ = references(case, case.conventions, case.lengths[-1])
    model = case.ours.model

    def first_step(cache, rows):
        return model.draft(mx.array(hidden[:, rows]), mx.array(tokens[0][:, rows]), cache, 1)[0].logits

    straight, rewound = model.make_mtp_cache(), model.make_mtp_cache()
    first_step(straight, slice(0, 40 if hidden.shape[1] > 40 else 8))
    cut = straight.length
    model.draft(mx.array(hidden[:, :cut]), mx.array(tokens[0][:, :cut]), rewound, STEPS)
    judge.holds(case.name, "mtp cache", rewound.trim(STEPS - 1) == STEPS - 1, f"{STEPS - 1} drafts are trimmed")
    ours = to_numpy(first_step(rewound, slice(cut, None)))
    judge.values(case.name, "mtp logits (rewound)", ours, to_numpy(first_step(straight, slice(cut, None))), 0.0)
