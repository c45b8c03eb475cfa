"""The indexer on its own: scores and selections, against HF's two indexer classes, on inputs where mistakes show."""

import mlx.core as mx
import numpy as np
import pytest
import torch

from glm_dsa.indexer import WIDEST
from glm_dsa.mask import CausalMask
from reference.capture import capture
from reference.equations import causal
from verify import stages, tolerances
from verify.candidate import in_tiles_of, to_numpy
from verify.cases import Case
from verify.choices import of_keys

CLAIM = "indexer scores and selections"
STAGES = ("k", "q", "weights", "scores")  # as the model computes them
# x of unit variance, and so small that var(k) is about 1e-6: there k_norm's eps is as large as the variance
SCALES = {"unit": 1.0, "small variance": 0.1}


def first(case: Case):
    """(HF's indexer of the first full layer, ours)."""
    return case.hf.model.layers[0].self_attn.indexer, case.ours.model.layers[0].self_attn.indexer


def inputs(case: Case, length, scale, batch=1):
    random = np.random.default_rng([case.seed, length, batch])
    x = random.standard_normal((batch, length, case.args.hidden_size)) * scale
    q_latent = random.standard_normal((batch, length, case.args.q_lora_rank))
    return x.astype(np.float32), q_latent.astype(np.float32)


def run(indexer, x, q_latent, rotation, mask, cache=None):
    """Our indexer as the decoder layer calls it: keys first, then the selection."""
    x = mx.array(x)
    return to_numpy(indexer(x, mx.array(q_latent), indexer.keys_so_far(x, rotation, cache), rotation, mask))


def oracles(case: Case, x, q_latent, positions, allowed):
    """({stage: HF's array}, {stage: truth}) of HF's module and the equations, under HF's selection."""
    model, prefix = case.hf, "layers.0.self_attn.indexer."
    rotary = model.model.rotary_emb(torch.from_numpy(x), torch.from_numpy(positions))
    mask = torch.where(torch.from_numpy(allowed), 0.0, torch.finfo(torch.float32).min)
    with capture(model) as seen:
        first(case)[0](torch.from_numpy(x), torch.from_numpy(q_latent), rotary, mask, torch.from_numpy(positions))
    equations = case.equations()
    equations.selection(0, x.astype(np.float64), q_latent.astype(np.float64), positions, allowed)
    return (
        {s.removeprefix(prefix): v for s, v in seen.items()},
        {s.removeprefix(prefix): v for s, v in equations.stages.items()},
    )


@pytest.mark.needs("indexer")
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("length", ["T = 4 index_topk", "T = 9 index_topk"])
def test_scores_and_selection(case: Case, judge, length, scale):
    topk = case.args.index_topk
    count = int(length.split()[2]) * topk
    x, q_latent = inputs(case, count, SCALES[scale])
    positions = np.arange(count)[None]
    allowed = causal((1, count), None)
    seen, truth = oracles(case, x, q_latent, positions, allowed)

    model, indexer = case.ours.model, first(case)[1]
    rotation, mask = model.model.rotation_and_mask(count, None)
    with case.ours.captured() as ours:
        run(indexer, x, q_latent, rotation, mask)
    ours = {stages.kind(s).rsplit(".", 1)[-1]: to_numpy(v) for s, v in ours.items()}
    name = f"{case.name}, {scale}, T = {count}"
    bounds = {s: tolerances.bound(_error(seen[s], truth[s]), seen[s], max(case.longest, count)) for s in STAGES}
    for stage in STAGES:
        judge.values(name, f"self_attn.indexer.{stage}", ours[stage], seen[stage], bounds[stage])
    decision = of_keys(seen["scores"], topk, bounds["scores"].absolute(seen["scores"]))
    judge.selection(name, "self_attn.indexer.topk", ours["topk"], seen["topk"], decision)


@pytest.mark.needs("indexer")
def test_within_index_topk_every_key_is_selected(case: Case, judge):
    """T <= index_topk: HF's top-k is all of them, ours says so by selecting nothing; T = index_topk + 1 is the first to choose."""
    topk = case.args.index_topk
    model, indexer = case.ours.model, first(case)[1]
    for count, chooses in ((1, False), (topk, False), (topk + 1, True)):
        x, q_latent = inputs(case, count, 1.0)
        allowed = causal((1, count), None)
        seen, _ = oracles(case, x, q_latent, np.arange(count)[None], allowed)
        rotation, mask = model.model.rotation_and_mask(count, None)
        ours = run(indexer, x, q_latent, rotation, mask)
        judge.holds(
            case.name,
            f"self_attn.indexer.topk, T = {count}",
            (ours is not None) == chooses,
            f"a selection {'is' if chooses else 'is not'} made",
        )
        decision = of_keys(seen["scores"], topk, 1e-6)
        judge.selection(case.name, f"self_attn.indexer.topk, T = {count}", ours, seen["topk"], decision)


@pytest.mark.needs("indexer")
def test_padded_rows(case: Case, judge):
    """Left-padded rows: a pad is never selected before every real key is, and positions start after the pads."""
    topk, count = case.args.index_topk, 4 * case.args.index_topk
    pads = [0, 5, count - topk // 2]
    x, q_latent = inputs(case, count, 1.0, batch=len(pads))
    model, indexer = case.ours.model, first(case)[1]
    cache = model.make_cache(left_padding=pads)[0]
    rotation, mask = model.model.rotation_and_mask(count, cache)
    ours = run(indexer, x, q_latent, rotation, mask, cache)
    valid = np.arange(count)[None] >= np.array(pads)[:, None]
    positions = np.maximum(np.arange(count)[None] - np.array(pads)[:, None], 0)
    allowed = causal((len(pads), count), valid)
    seen, truth = oracles(case, x, q_latent, positions, allowed)
    bound = tolerances.bound(_error(seen["scores"], truth["scores"]), seen["scores"], count)
    decision = of_keys(seen["scores"], topk, bound.absolute(seen["scores"]))
    judge.selection(case.name, "self_attn.indexer.topk (padded)", ours, seen["topk"], decision)


@pytest.mark.needs("indexer")
def test_blocks_of_queries_select_the_same(case: Case, judge, monkeypatch):
    """Blocks of queries and tiles of keys bound memory; they must not change a single choice."""
    count = 9 * case.args.index_topk
    x, q_latent = inputs(case, count, 1.0)
    model, indexer = case.ours.model, first(case)[1]
    rotation, mask = model.model.rotation_and_mask(count, None)
    whole = run(indexer, x, q_latent, rotation, mask)
    least = WIDEST * case.args.index_topk  # a tile is never narrower, and a block never smaller than a query
    for queries, keys in ((7, least), (1, least), (1, 5 * case.args.index_topk)):
        in_tiles_of(monkeypatch, queries * keys * case.args.index_n_heads)
        blocks = run(indexer, x, q_latent, rotation, mask)
        expected = f"blocks of {queries} queries and {keys} keys select what one block selects"
        judge.holds(case.name, "self_attn.indexer.topk", np.array_equal(whole, blocks), expected)


@pytest.mark.needs("indexer")
def test_of_equal_scores_the_earlier_key_is_selected(case: Case, judge, monkeypatch):
    """In one tile and in many: equal scores are common (no head's ReLU lets a key through), and a choice among them that
    hangs on how the work was cut would make a run differ from its own chunks."""
    args, topk = case.args, case.args.index_topk
    count, indexer = 9 * topk, first(case)[1]
    random = np.random.default_rng(case.seed)
    q, k, w = (
        random.integers(-2, 3, shape).astype(np.float32)
        for shape in ((1, count, args.index_n_heads, args.index_head_dim), (1, count, args.index_head_dim),
                      (1, count, args.index_n_heads))
    )  # fmt: skip
    k[:, :, 1:] = 0  # few different keys
    mask = CausalMask(0, count)
    scores = np.array(indexer.score(*map(mx.array, (q, k, w)), mask.sees(range(count), mx.arange(count))))[0]
    due = np.sort(np.argsort(-scores, axis=-1, kind="stable")[:, :topk], axis=-1)
    ties = sum(np.sort(row)[-topk] == np.sort(row)[-topk - 1] for row in scores[topk:])
    judge.holds(case.name, "self_attn.indexer.topk", ties > count // 2, f"equal scores at the boundary in {ties} rows")
    for elements in (1, 1 << 30):
        in_tiles_of(monkeypatch, elements)
        found = np.array(indexer.select_tiled(*map(mx.array, (q, k, w)), mask))[0]
        expected = "of equal scores the earlier keys are selected"
        judge.holds(case.name, "self_attn.indexer.topk", np.array_equal(found, due), expected)


def _error(seen, truth):
    from verify import compare

    return compare.values(seen, truth).error
