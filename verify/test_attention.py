"""Attention under a given selection: all three forms against HF's, in prefill and in decode."""

import mlx.core as mx
import numpy as np
import pytest

from glm_dsa.attention import ABSORBED, EXPANDED, GATHERED, MultiHeadLatentAttention
from verify import stages
from verify.candidate import to_numpy
from verify.cases import Case

CLAIM = "attention under an injected selection"
FORMS = (EXPANDED, ABSORBED, GATHERED)


def attend(case: Case, reference, layer, monkeypatch, form, cuts):
    """Our attention of one layer on HF's normalized input and HF's selection, in chunks."""
    model, start, seen = case.ours.model, 0, []
    monkeypatch.setattr(MultiHeadLatentAttention, "cheapest_form", lambda *_: form)
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
    if form == GATHERED and not reference.is_sparse:
        form = ABSORBED  # without a selection there is nothing to gather
    for layer in range(case.args.num_hidden_layers):
        seen = attend(case, reference, layer, monkeypatch, form, cuts)
        for stage, ours in seen.items():
            judge.values(case.name, f"{stage} ({form})", ours, reference.hf[stage], reference.bound(stage, local=True))


@pytest.mark.needs("indexer")
def test_gathered_in_blocks(case: Case, judge, monkeypatch):
    """The block of queries that bounds memory changes nothing."""
    from glm_dsa import attention as module

    reference = case.reference(case.long)
    whole = attend(case, reference, 0, monkeypatch, GATHERED, [case.long])
    width = case.args.kv_lora_rank + case.args.qk_rope_head_dim
    monkeypatch.setattr(module, "GATHER_ELEMENTS", 9 * case.args.index_topk * width)
    blocks = attend(case, reference, 0, monkeypatch, GATHERED, [case.long])
    stage = "layers.0.self_attn.heads"
    judge.values(case.name, f"{stage} (blocks of 9)", blocks[stage], whole[stage], reference.bound(stage, local=True))


def test_the_cheapest_form(case: Case, judge):
    """The cost model picks what its own equation says, and decode beyond index_topk never touches all T."""
    attention = case.ours.model.layers[0].self_attn
    a = case.args
    if a.has_indexer:
        judge.holds(case.name, "form", attention.cheapest_form(1, 100_000, a.index_topk) == GATHERED, "decode gathers")
    judge.holds(case.name, "form", attention.cheapest_form(1, 100_000, None) == ABSORBED, "dense decode is absorbed")
    judge.holds(
        case.name, "form", attention.cheapest_form(4096, 4096, None) == EXPANDED, "a long dense prefill is expanded"
    )
