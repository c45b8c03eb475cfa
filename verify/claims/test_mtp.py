"""Multi-token prediction: four chained draft steps, with the selection reused and made anew."""

import dataclasses
from collections import Counter
from contextlib import contextmanager
from functools import cached_property

import mlx.core as mx
import numpy as np
import pytest

from glm_dsa import trace
from reference import hf
from reference.capture import capture
from reference.equations import Equations
from reference.mtp import Mtp
from verify.cases import Case, group_size
from verify.claims.replay import in_columns
from verify.core import bounds, compare, stages
from verify.core.choices import of_stage
from verify.engines.definition import Ours, Stages, to_numpy

CLAIM = "MTP, chained draft steps"
STEPS = 4


class Oracles:
    """HF's drafts and the equations', some rows at a time, from HF's hidden after the final norm, on given tokens."""

    def __init__(self, case: Case, conventions, length, count=STEPS, rows=2):
        self.case, self.count = case, count
        random = np.random.default_rng([case.seed, length])
        tokens = case.tokens(length, rows)
        with capture(case.hf) as seen:
            hf.forward(case.hf, tokens)
        following = random.integers(3, case.args.vocab_size, (rows, count))
        self.hidden = seen["norm"]
        self.fed = [np.concatenate([tokens[:, 1:], following[:, :1]], axis=1)]  # the next token of each
        self.fed += [following[:, i : i + 1] for i in range(1, count)]
        mtp = Mtp(case.hf_with_mtp, case.folder, conventions.mtp_reuses_selection, conventions.mtp_zero_first_embedding)
        self.hf = mtp.draft(self.hidden, self.fed, count)
        self.keys = mtp.index_keys()
        self.steps = mtp.steps
        self.choices = [{s: v for s, v in step.items() if s.endswith(".topk")} for step in self.steps]
        equations = Equations(case.config, case.weights, conventions)
        self.truth = equations.draft(self.hidden.astype(np.float64), self.fed, count, self.choices)
        self.true_stages = equations.stages
        self.true_keys = equations.stages.get(f"layers.{case.args.num_hidden_layers}.self_attn.indexer.k")

    def bound(self, step, which):
        """From the largest error of HF's in the steps so far. which: 0 logits, 1 hidden."""
        errors = [compare.values(self.hf[i][which], self.truth[i][which]).error for i in range(step + 1)]
        return bounds.bound(max(errors), self.hf[step][which], self.longest, explained=self.explained)

    @property
    def longest(self):
        return max(self.case.longest, self.hidden.shape[1] + self.count)

    @property
    def explained(self):
        return bounds.explained_at(self.hidden.shape[1] + self.count)

    def decision(self, step, stage):
        """What HF's choice in a step was made by, of that step's tokens."""
        first, seen = self.hidden.shape[1], self.steps[step]
        rows = slice(0, first) if step == 0 else slice(first + step - 1, first + step)

        def bound(own):
            truth = self.true_stages[own][:, rows]
            truth = truth[..., : first + step] if own.endswith("scores") else truth
            return bounds.bound(
                compare.values(seen[own], truth).error, seen[own], self.longest, explained=self.explained
            )

        return of_stage(stage, self.case.args, seen.__getitem__, bound, self.case.weights)

    def selects(self, step, stage):
        """Whether there is anything to choose: up to index_topk every key is selected."""
        return not stages.is_selection(stage) or self.hidden.shape[1] + step > self.case.args.index_topk

    @cached_property
    def is_torn(self):
        """Whether HF's own choices, in any step, lie within the noise of others."""
        return any(
            self.decision(step, stage).torn.any()
            for step, choices in enumerate(self.choices) for stage in choices if self.selects(step, stage)
        )  # fmt: skip

    def due(self, pads=0):
        """HF's choices of each step, as a cache whose rows begin with `pads` columns numbers them."""
        first, topk = self.hidden.shape[1], self.case.args.index_topk
        out: list[Stages] = []
        for step, choices in enumerate(self.choices):
            at, before, width = (0, pads, first + pads) if step == 0 else (first + step - 1, 0, first + step + pads)
            out.append({})
            for stage, choice in choices.items():
                if not stages.is_selection(stage):
                    every = np.broadcast_to(np.arange(choice.shape[-1]), (len(choice), before, choice.shape[-1]))
                    out[-1][stage] = np.concatenate([every, choice], axis=1)
                elif width > topk:
                    out[-1][stage] = np.stack([in_columns(row, at, pads, before, width, topk) for row in choice])
        return out

    def draft(self, model, cache, pads=0):
        """Ours, on the same tokens: free, or, where HF is torn between two keys or two experts, under its choices. With what
        ours would have chosen: [{stage: its choice}] by step."""
        padded = [np.pad(part, ((0, 0), (pads, 0), (0, 0))[: part.ndim]) for part in (self.hidden, self.fed[0])]
        chosen: list[Stages] = [{} for _ in range(self.count)]
        with drafting(model, self.due(pads) if self.is_torn else [], chosen):
            drafts = model.draft(mx.array(padded[0]), mx.array(padded[1]), cache, self.count,
                                 choose=lambda step, _: mx.array(self.fed[(step + 1) % self.count][:, 0]))  # fmt: skip
            mx.eval([draft.logits for draft in drafts])
        return drafts, [{s: to_numpy(v) for s, v in step.items()} for step in chosen]

    def judge_choices(self, judge, chosen, name="", rows=slice(None), pads=0):
        """As sets, where ours ran under HF's: what ours would have chosen on the same inputs. chosen: by step, ours for the
        tokens `rows` of the first, as a cache whose rows begin with `pads` columns numbers keys."""
        for step, choices in enumerate(self.choices[: len(chosen)] if self.is_torn else ()):
            for stage, ref in choices.items():
                if (ours := chosen[step].get(stage)) is None:
                    continue
                decision = self.decision(step, stage)
                if step == 0:
                    decision, ref = decision[:, rows], ref[:, rows]
                if stages.is_selection(stage):
                    width = self.hidden.shape[1] + step if step or rows.stop is None else rows.stop
                    scores = decision.scores[..., :width]
                    scores = np.pad(scores, ((0, 0), (0, 0), (pads, 0)), constant_values=-np.inf)
                    decision = dataclasses.replace(decision, scores=scores)
                    ref = (
                        np.minimum(ref, width - 1) + pads
                    )  # early rows list keys of the future: any masked one will do
                name_of = f"mtp step {step} {stages.kind(stage)}{name}"
                judge.selection(self.case.name, name_of, ours[:, -ref.shape[1] :], ref, decision)


@contextmanager
def drafting(model, choices, chosen):
    """The MTP layer's choices are noted, by draft step; where `choices` has others for the step, those go on."""
    met: Counter[str] = Counter()

    def listener(stage, value):
        if not stage.endswith(".topk"):
            return value
        step = met[stage]
        met[stage] += 1
        chosen[step][stage] = value
        given = choices[step].get(stage) if step < len(choices) else None
        return value if value is None or given is None else mx.array(given.astype(np.int32)).astype(value.dtype)

    with trace.listen(model, listener, only=("topk",)):
        yield


@pytest.mark.needs("mtp")
@pytest.mark.parametrize("zero_first", [False, True], ids=["first kept", "first zeroed"])
@pytest.mark.parametrize("regime", ["short", "long"])
def test_draft_steps_that_select_anew(case: Case, judge, regime, zero_first):
    """In the short regime the drafts themselves cross index_topk."""
    overrides = {"mtp_reuses_selection": False} if case.args.has_indexer else {}
    check(case, judge, length_of(case, regime), overrides | {"mtp_zero_first_embedding": zero_first})


@pytest.mark.needs("mtp", "indexer")
@pytest.mark.parametrize("regime", ["short", "long"])
def test_draft_steps_that_reuse_the_first_selection(case: Case, judge, regime):
    check(case, judge, length_of(case, regime), {"mtp_reuses_selection": True})


def length_of(case: Case, regime: str) -> int:
    return case.lengths[0 if regime == "short" else -1]


def check(case: Case, judge, length, overrides, **fewer):
    """Drafts after a prompt of `length`."""
    conventions = dataclasses.replace(case.conventions, **overrides)
    oracles = Oracles(case, conventions, length, **fewer)
    ours = Ours(case.folder, **{**case.spec.overrides, **overrides})
    cache = ours.model.make_mtp_cache()
    drafts, chosen = oracles.draft(ours.model, cache)
    judge.report.ran(drafts=len(drafts))
    due = oracles.fed[0].shape[1] + oracles.count - 1
    judge.holds(case.name, "mtp cache", cache.length == due, f"each step writes its latent: {cache.length} of {due}")
    for step in range(oracles.count):
        fed = np.array_equal(to_numpy(drafts[step].tokens), oracles.fed[step])
        judge.holds(case.name, f"mtp step {step} tokens", fed, "the draft says what it was fed")
        for which, stage in ((1, "hidden"), (0, "logits")):
            mine = to_numpy(getattr(drafts[step], stage))
            judge.values(
                case.name, f"mtp step {step} {stage}", mine, oracles.hf[step][which], oracles.bound(step, which)
            )
    oracles.judge_choices(judge, chosen)
    if cache.has_indexer:
        assert oracles.keys is not None
        assert oracles.true_keys is not None
        own = compare.values(oracles.keys[:, : oracles.true_keys.shape[1]], oracles.true_keys).error
        written = to_numpy(cache.index_keys.read()[0])
        bound = bounds.bound(
            max(own, compare.values(oracles.hf[-1][1], oracles.truth[-1][1]).error),
            oracles.keys,
            case.longest,
            explained=oracles.explained,
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
    cache, seen, own, length = model.make_mtp_cache(), [], [], oracles.hidden.shape[1]
    cuts = slice(0, 9), slice(9, length // 2), slice(length // 2, length)
    for rows in cuts:
        given = stages.of_rows(oracles.choices[0], rows, case.args.index_topk) if oracles.is_torn else {}
        chosen: list[Stages] = [{} for _ in range(STEPS)]
        with drafting(model, [given], chosen):
            drafts = model.draft(mx.array(oracles.hidden[:, rows]), mx.array(oracles.fed[0][:, rows]), cache, STEPS)
            seen.append(drafts[0].logits)
            mx.eval(seen)
        own.append({stage: to_numpy(choice) for stage, choice in chosen[0].items()})
        judge.holds(case.name, "mtp cache", cache.trim(STEPS - 1) == STEPS - 1, f"{STEPS - 1} drafts are trimmed")
    logits = np.concatenate([to_numpy(part) for part in seen], axis=1)
    judge.values(case.name, "mtp logits (chunks, rewound)", logits, oracles.hf[0][0], oracles.bound(0, 0))
    for rows, made in zip(cuts, own, strict=True):
        oracles.judge_choices(judge, [made], " (chunks, rewound)", rows)


@pytest.mark.any_layout
@pytest.mark.needs("mtp")
@pytest.mark.parametrize("regime", ["short", "long"])
def test_a_left_padded_batch(case: Case, judge, regime):
    """A row behind pads drafts what it drafts alone."""
    length, model, pads = length_of(case, regime), case.ours.model, 7
    oracles = Oracles(case, case.conventions, length)
    drafts, chosen = oracles.draft(model, model.make_mtp_cache(left_padding=[pads, pads]), pads)
    for step, draft in enumerate(drafts):
        logits = to_numpy(draft.logits)[:, pads if step == 0 else 0 :]
        judge.values(case.name, f"mtp step {step} logits (padded)", logits, oracles.hf[step][0], oracles.bound(step, 0))
    oracles.judge_choices(judge, chosen, " (padded)", pads=pads)


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
    assert packed.quantization is not None
    rounded = to_numpy(packed.quantization.rounded(plain.latents.read()))
    judge.values(case.name, "mtp cache (8 bit)", to_numpy(packed.latents.read()), rounded, 0.0)
