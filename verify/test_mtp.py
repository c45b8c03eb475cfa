"""Multi-token prediction: four chained draft steps, with the selection reused and made anew."""

import dataclasses

import mlx.core as mx
import numpy as np
import pytest

from reference import hf
from reference.capture import capture
from reference.equations import Equations
from reference.mtp import Mtp
from verify import compare, tolerances
from verify.candidate import Ours, to_numpy
from verify.cases import Case, group_size

CLAIM = "MTP, chained draft steps"
STEPS = 4


class Oracles:
    """HF's drafts and the equations', two rows at a time, from HF's hidden after the final norm, on given tokens."""

    def __init__(self, case: Case, conventions, length):
        random = np.random.default_rng([case.seed, length])
        tokens = case.tokens(length, batch=2)
        with capture(case.hf) as seen:
            hf.forward(case.hf, tokens)
        following = random.integers(3, case.args.vocab_size, (2, STEPS))
        self.hidden = seen["norm"]
        self.fed = [np.concatenate([tokens[:, 1:], following[:, :1]], axis=1)]  # the next token of each
        self.fed += [following[:, i : i + 1] for i in range(1, STEPS)]
        mtp = Mtp(case.hf_with_mtp, case.folder, conventions.mtp_reuses_selection, conventions.mtp_zero_first_embedding)
        self.hf = mtp.draft(self.hidden, self.fed, STEPS)
        self.keys = mtp.index_keys()
        equations = Equations(case.config, case.weights, conventions)
        self.truth = equations.draft(self.hidden.astype(np.float64), self.fed, STEPS)
        self.true_keys = equations.stages.get(f"layers.{case.args.num_hidden_layers}.self_attn.indexer.k")

    def bound(self, case: Case, step, which):
        """From the largest error of HF's in the steps so far. which: 0 logits, 1 hidden."""
        errors = [compare.values(self.hf[i][which], self.truth[i][which]).error for i in range(step + 1)]
        return tolerances.bound(max(errors), self.hf[step][which], max(case.longest, self.hidden.shape[1] + STEPS))


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
    conventions = dataclasses.replace(case.conventions, **overrides)
    oracles = Oracles(case, conventions, case.lengths[0 if regime == "short" else -1])
    ours = Ours(case.folder, **{**case.spec.overrides, **overrides})
    cache = ours.model.make_mtp_cache()
    drafts = ours.model.draft(
        mx.array(oracles.hidden),
        mx.array(oracles.fed[0]),
        cache,
        STEPS,
        choose=lambda step, _: mx.array(oracles.fed[(step + 1) % STEPS][:, 0]),
    )
    due = oracles.fed[0].shape[1] + STEPS - 1
    judge.holds(case.name, "mtp cache", cache.length == due, f"each step writes its latent: {cache.length} of {due}")
    for step in range(STEPS):
        fed = np.array_equal(to_numpy(drafts[step].tokens), oracles.fed[step])
        judge.holds(case.name, f"mtp step {step} tokens", fed, "the draft says what it was fed")
        for which, stage in ((1, "hidden"), (0, "logits")):
            mine = to_numpy(getattr(drafts[step], stage))
            judge.values(
                case.name, f"mtp step {step} {stage}", mine, oracles.hf[step][which], oracles.bound(case, step, which)
            )
    if cache.has_indexer:
        own = compare.values(oracles.keys[:, : oracles.true_keys.shape[1]], oracles.true_keys).error
        written = to_numpy(cache.index_keys.read()[0])
        bound = tolerances.bound(
            max(own, compare.values(oracles.hf[-1][1], oracles.truth[-1][1]).error), oracles.keys, case.longest
        )
        judge.values(case.name, "mtp cache, indexer keys of every step", written, oracles.keys, bound)


@pytest.mark.any_layout
@pytest.mark.needs("mtp")
@pytest.mark.parametrize("zero_first", [False, True], ids=["first kept", "first zeroed"])
def test_the_first_step_in_chunks_after_rejected_drafts(case: Case, judge, zero_first):
    """Rejected drafts, trimmed, leave no trace; the rest of the prompt follows in two chunks."""
    overrides = {"mtp_zero_first_embedding": zero_first}
    oracles = Oracles(case, dataclasses.replace(case.conventions, **overrides), case.lengths[-1])
    model = Ours(case.folder, **{**case.spec.overrides, **overrides}).model
    judge.holds(case.name, "mtp cache", model.make_mtp_cache(start=9).offset == 9, "starts where it is told to")
    cache, seen, length = model.make_mtp_cache(), [], oracles.hidden.shape[1]
    for rows in (slice(0, 9), slice(9, length // 2), slice(length // 2, length)):
        seen.append(
            model.draft(mx.array(oracles.hidden[:, rows]), mx.array(oracles.fed[0][:, rows]), cache, STEPS)[0].logits
        )
        judge.holds(case.name, "mtp cache", cache.trim(STEPS - 1) == STEPS - 1, f"{STEPS - 1} drafts are trimmed")
    logits = np.concatenate([to_numpy(part) for part in seen], axis=1)
    judge.values(case.name, "mtp logits (chunks, rewound)", logits, oracles.hf[0][0], oracles.bound(case, 0, 0))


@pytest.mark.any_layout
@pytest.mark.needs("mtp")
@pytest.mark.parametrize("regime", ["short", "long"])
def test_a_left_padded_batch(case: Case, judge, regime):
    """A row behind pads drafts what it drafts alone."""
    length, model, pads = case.lengths[0 if regime == "short" else -1], case.ours.model, 7
    oracles = Oracles(case, case.conventions, length)
    padded = [np.pad(part, ((0, 0), (pads, 0), (0, 0))[: part.ndim]) for part in (oracles.hidden, oracles.fed[0])]
    cache = model.make_mtp_cache(left_padding=[pads, pads])
    drafts = model.draft(mx.array(padded[0]), mx.array(padded[1]), cache, STEPS,
                         choose=lambda step, _: mx.array(oracles.fed[(step + 1) % STEPS][:, 0]))  # fmt: skip
    for step, draft in enumerate(drafts):
        logits = to_numpy(draft.logits)[:, pads if step == 0 else 0 :]
        judge.values(
            case.name, f"mtp step {step} logits (padded)", logits, oracles.hf[step][0], oracles.bound(case, step, 0)
        )


@pytest.mark.any_layout
@pytest.mark.needs("mtp", "packable")
def test_a_packed_cache(case: Case, judge):
    """--kv-bits holds for the MTP layer's cache too: it keeps what packing leaves of a float one."""
    oracles, model, group = Oracles(case, case.conventions, case.lengths[-1]), case.ours.model, group_size(case.args)
    plain, packed = model.make_mtp_cache(), model.make_mtp_cache(kv_bits=8, kv_group_size=group)
    for cache in (plain, packed):
        model.draft(mx.array(oracles.hidden), mx.array(oracles.fed[0]), cache, 1)
    due, held = plain.length, packed.latents.packed.length
    judge.holds(case.name, "mtp cache", held == due, f"{due} tokens are packed (found: {held})")
    rounded = to_numpy(packed.quantization.rounded(plain.latents.read()))
    judge.values(case.name, "mtp cache (8 bit)", to_numpy(packed.latents.read()), rounded, 0.0)
