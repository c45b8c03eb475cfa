"""Attention under a given selection: all three forms against HF's, in prefill and in decode."""

import mlx.core as mx
import numpy as np
import pytest

from glm_dsa.attention import ABSORBED, EXPANDED, GATHERED, MultiHeadLatentAttention
from verify.cases import Case
from verify.core import stages
from verify.engines.definition import in_tiles_of, to_numpy

CLAIM = "attention under an injected selection"
FORMS = (EXPANDED, ABSORBED, GATHERED)


def force(monkeypatch, form):
    """Every call takes this form; where there is no selection there is nothing to gather."""

    def chosen(self, queries, keys, selected):
        return ABSORBED if form == GATHERED and selected is None else form

    monkeypatch.setattr(MultiHeadLatentAttention, "cheapest_form", chosen)


def attend(case: Case, reference, layer, monkeypatch, form, cuts):
    """Our attention of one layer on HF's normalized input and HF's selection, in chunks."""
    model, start, seen = case.ours.model, 0, []
    force(monkeypatch, form)
    attention, layer_cache = model.layers[layer].self_attn, model.make_cache()[layer]
    x = reference.hf[f"layers.{layer}.input_layernorm"]
    name = f"layers.{layer}.self_attn.selection"
    selection = reference.hf.get(name) if reference.is_sparse else None
    for cut in cuts:
        rows = slice(start, start + cut)
        start += cut
        rotation, mask = model.model.rotation_and_mask(cut, layer_cache)
        given = stages.of_rows({} if selection is None else {name: selection}, rows, case.args.index_topk)
        chosen = mx.array(given[name].astype(np.int32)) if given else None
        part = mx.array(x[:, rows])
        with case.ours.captured() as shown:
            attention(part, attention.query_latent(part), rotation, mask, layer_cache, chosen)
        seen.append({s: to_numpy(v) for s, v in shown.items()})
    return {s: np.concatenate([part[s] for part in seen], axis=1) for s in seen[0] if not s.endswith("selection")}


CUTS = {"prefill": [80], "decode": [40, 37, 1, 1, 1], "short prefill": [14], "short decode": [11, 1, 1, 1]}


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("form", FORMS)
def test_forms(case: Case, judge, monkeypatch, form, cuts):
    """At index_topk = 16: 14 tokens are within it, 80 are five times as many. Two rows, each with a selection of its own."""
    cuts = case.scaled(cuts)
    reference = case.reference(sum(cuts), batch=2)
    for layer in range(case.args.num_hidden_layers):
        seen = attend(case, reference, layer, monkeypatch, form, cuts)
        for stage, ours in seen.items():
            judge.values(case.name, f"{stage} ({form})", ours, reference.hf[stage], reference.bound(stage, local=True))


@pytest.mark.needs("indexer")
def test_gathered_in_blocks(case: Case, judge, monkeypatch):
    """The block of queries that bounds memory changes nothing."""
    reference = case.reference(case.long)
    whole = attend(case, reference, 0, monkeypatch, GATHERED, [case.long])
    width = case.args.kv_lora_rank + case.args.qk_rope_head_dim
    stage = "layers.0.self_attn.heads"
    for queries, elements in ((9, 9 * case.args.index_topk * width), (1, 1)):  # a block is never smaller than a query
        in_tiles_of(monkeypatch, elements)
        blocks = attend(case, reference, 0, monkeypatch, GATHERED, [case.long])
        name = f"{stage} (blocks of {queries})"
        judge.values(case.name, name, blocks[stage], whole[stage], reference.bound(stage, local=True))


def multiplications(args, queries: int, keys: int, selected: int | None) -> dict[str, int]:
    """Of one head, where the forms differ. expanded: W_uk and W_uv on every key; otherwise W_uk on each query and W_uv on each
    sum, with scores and sums as wide as latent and rotary key. And a softmax of 16 multiplications a pair."""
    nope, rope, value, latent = args.qk_nope_head_dim, args.qk_rope_head_dim, args.v_head_dim, args.kv_lora_rank
    softmax = 16
    counts = {EXPANDED: keys * latent * (nope + value) + queries * keys * (nope + rope + value + softmax)}
    for form, seen in ((ABSORBED, keys), (GATHERED, selected)):
        if seen is not None:
            counts[form] = queries * latent * (nope + value) + queries * seen * (2 * (latent + rope) + softmax)
    return counts


@pytest.mark.any_layout
def test_the_cheapest_form(case: Case, judge, monkeypatch):
    """The form that runs is the one with the fewest multiplications, and decode beyond index_topk never touches all T."""
    attention, args, topk = case.ours.model.layers[0].self_attn, case.args, case.topk
    few = [(topk + n, topk + n) for n in range(1, 2 * topk, 5)]  # there the forms change places
    for queries, keys in (
        (1, 100_000),
        (1, topk + 1),
        (3, 400),
        (40, 300),
        (200, 240),
        (4096, 4096),
        (7, 2 * topk),
        *few,
    ):
        for selected in (None, topk) if args.has_indexer else (None,):
            counts = multiplications(args, queries, keys, selected)
            due, found = min(counts, key=counts.__getitem__), attention.cheapest_form(queries, keys, selected)
            judge.holds(
                case.name,
                "form",
                found == due,
                f"{due} for {queries} queries, {keys} keys, {selected} selected ({found})",
            )
    far = attention.cheapest_form(1, 100_000, topk if args.has_indexer else None)
    judge.holds(
        case.name, "form", far == (GATHERED if args.has_indexer else ABSORBED), "decode is gathered, or else absorbed"
    )

    ran: list[str] = []

    def noting(form, own):
        def attend(self, *inputs):
            ran.append(form)
            return own(self, *inputs)

        return attend

    for form in FORMS:
        name = f"attend_{form}"
        monkeypatch.setattr(MultiHeadLatentAttention, name, noting(form, getattr(MultiHeadLatentAttention, name)))
    model, cache, before = case.ours.model, case.ours.model.make_cache(), 0
    for length in (topk - 2, 3 * topk, 1, 2):
        ran.clear()
        model(mx.array(case.tokens(length)), cache)
        before += length
        selected = topk if args.has_indexer and before > topk else None
        counts = multiplications(args, length, before, selected)
        forms = {min(counts, key=counts.__getitem__)}
        told = f"{forms} runs for {length} of {before} tokens (ran: {set(ran)})"
        judge.holds(case.name, "form", set(ran) == forms, told)
