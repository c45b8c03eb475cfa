"""The indexer on its own: scores and selections, against HF's two indexer classes, on inputs where mistakes show."""

import mlx.core as mx
import numpy as np
import pytest
import torch

import glm_dsa
from glm_dsa.indexer import WIDEST
from glm_dsa.mask import CausalMask
from reference.capture import capture
from reference.equations import causal, indexer_scores
from verify.cases import Case
from verify.claims import half
from verify.core import bounds as tolerances
from verify.core import stages
from verify.core.choices import of_keys
from verify.engines.definition import in_tiles_of, to_numpy

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


STEP = 2.0**-22  # neighbours in a cluster differ by two of float32's last bits
FAR = 3  # queries


def landscapes(count: int, topk: int, random) -> dict[str, np.ndarray]:
    """Scores of `count` keys as one row each, up to a positive factor; powers of two apart, so that none of them is rounded."""
    rising = 1 + STEP * np.arange(count)
    shuffled = random.permutation(rising)
    few_above = np.where(random.permutation(count) < max(topk // 2, 1), 2 * shuffled, shuffled)
    late_equals = np.where(np.arange(count) < count - 2 * topk, rising / 2, 1.0)
    spread = random.permutation(2.0 ** (np.arange(count) % 120 - 60)) * rising
    found = {
        "rising": rising, "falling": rising[::-1], "shuffled": shuffled, "a few above a cluster": few_above,
        "equals at the end": late_equals, "all equal": np.ones(count), "of all magnitudes": spread,
        "tiny": shuffled * 2.0**-100, "huge": shuffled * 2.0**100,
    }  # fmt: skip
    return found | {f"{name}, negative": -values for name, values in found.items()}


@pytest.mark.any_layout
@pytest.mark.needs("indexer")
@pytest.mark.parametrize("times", [8, 33])
def test_clustered_scores_far_beyond_index_topk(case: Case, judge, monkeypatch, times):
    """Real scores lie close to each other: a choice by their upper bits, or of so many from each tile, loses some of the best.
    Whatever the best are, and wherever they stand, none is lost."""
    args, topk = case.args, case.args.index_topk
    count, indexer = times * topk + 1, first(case)[1]
    rows = landscapes(count, topk, np.random.default_rng([case.seed, times]))
    values = np.stack(list(rows.values())).astype(np.float32)
    q = np.zeros((len(rows), FAR, args.index_n_heads, args.index_head_dim), np.float32)
    k, w = np.zeros((len(rows), count, args.index_head_dim), np.float32), np.zeros(q.shape[:3], np.float32)
    # one head and one dim: the score is the key itself, by the sign of the head's weight
    q[:, :, 0, 0], k[:, :, 0], w[:, :, 0] = 1, np.abs(values), np.sign(values[:, :1])
    mask = CausalMask(count - FAR, FAR)
    seen = np.arange(count) <= np.arange(count - FAR, count)[:, None]
    scores = np.where(seen, values[:, None], -np.inf)
    due = np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :topk], axis=-1)
    for elements, tiles in ((1 << 30, "one tile"), (1, "tiles")):
        in_tiles_of(monkeypatch, elements)
        found = np.array(indexer.select_tiled(*map(mx.array, (q, k, w)), mask))
        for row, name in enumerate(rows):
            right = np.array_equal(found[row], due[row])
            expected = f"the {topk} best of {count} scores are selected, in {tiles} ({name})"
            judge.holds(case.name, "self_attn.indexer.topk", right, expected)


@pytest.mark.any_layout
@pytest.mark.needs("indexer")
@pytest.mark.parametrize("dtype", half.DTYPES)
def test_float32_by_design_in_16_bit(case: Case, judge, dtype):
    """A model in 16 bit weighs its heads and scores its keys in float32: on the same 16-bit inputs, queries and keys."""
    args, count, name = case.args, 4 * case.args.index_topk, f"{case.name}, {dtype}"
    model = glm_dsa.load(case.folder, half.DTYPES[dtype], **case.spec.overrides)
    indexer = model.layers[0].self_attn.indexer
    (x, true_x), (q_latent, _) = (half.rounded(array, dtype) for array in inputs(case, count, 1.0))
    rotation, mask = model.model.rotation_and_mask(count, None)
    with glm_dsa.trace.capture(indexer) as seen:
        indexer(x, q_latent, indexer.keys_so_far(x, rotation, None), rotation, mask)
    ours = {stage: half.exact(value) for stage, value in seen.items()}
    weight, allowed = half.exact(indexer.weights_proj.weight), causal((1, count), None)

    def by_equations(dtype):
        """In float64 the truth; in float32 what float32 explains."""
        weights = true_x.astype(dtype) @ weight.astype(dtype).T / np.sqrt(dtype(args.index_n_heads))
        q, k, w = (ours[stage].astype(dtype) for stage in ("q", "k", "weights"))
        return {"weights": weights, "scores": indexer_scores(q, k, w, allowed)}

    truth, single = by_equations(np.float64), by_equations(np.float32)
    bounds = {s: tolerances.bound(_error(single[s], truth[s]), truth[s], args.hidden_size) for s in truth}
    for stage, bound in bounds.items():
        judge.values(name, f"self_attn.indexer.{stage}", ours[stage], truth[stage], bound)
    decision = of_keys(truth["scores"], args.index_topk, bounds["scores"].absolute(truth["scores"]))
    best = np.argsort(-truth["scores"], axis=-1, kind="stable")[..., : args.index_topk]
    judge.selection(name, "self_attn.indexer.topk", to_numpy(seen["topk"]), best, decision)


def _error(seen, truth):
    from verify.core import compare

    return compare.values(seen, truth).error
