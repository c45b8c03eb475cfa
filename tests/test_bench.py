"""What attention costs: counts against the graph that runs, memory that the context does not set, the bench and its record."""

import json
import re
import xml.etree.ElementTree as ET

import mlx.core as mx
import numpy as np
import pytest

import verify.__main__
from glm_dsa import ModelArgs
from glm_dsa.attention import ABSORBED, EXPANDED, GATHERED, MultiHeadLatentAttention
from glm_dsa.indexer import Indexer, ranks
from glm_dsa.mask import CausalMask
from glm_dsa.moe import MixtureOfExperts
from reference import checkpoints
from verify.bench import contenders, floor, flops, suite, tables
from verify.bench.flops import Sizes
from verify.bench.plots import draw
from verify.bench.roofline import Machine, paper
from verify.bench.suite import Bench, Course, alike
from verify.commands import bench as bench_command
from verify.engines.definition import in_tiles_of

ARGS = ModelArgs.from_dict(checkpoints.glm_5_2())
EIGHTH = ModelArgs.from_dict(contenders.read(contenders.EIGHTH))


@pytest.mark.parametrize("form", [EXPANDED, ABSORBED, GATHERED])
@pytest.mark.parametrize("shared", [False, True])
def test_what_is_counted_on_paper_is_what_runs(monkeypatch, form, shared):
    monkeypatch.setattr(MultiHeadLatentAttention, "cheapest_form", lambda *_: form)
    side = contenders.Ours(ARGS, shared=shared)
    side.fill(contenders.Filled(ARGS, 60, 5))
    sizes, total = Sizes(), 65
    due = flops.projections(ARGS, 5, sizes, absorbed=form != EXPANDED)
    due += flops.attention(ARGS, form, 5, total, sizes)
    if not shared:
        due += flops.indexer(ARGS, 5, total, sizes)
    assert flops.counted(side.once) == due.multiplications


def test_within_index_topk_the_indexer_only_writes_its_key():
    side = contenders.Ours(ARGS)
    side.fill(contenders.Filled(ARGS, 8, 3))
    form = side.block.cheapest_form(3, 11, None)
    due = flops.projections(ARGS, 3, Sizes(), absorbed=form != EXPANDED) + flops.indexer(ARGS, 3, 11, Sizes())
    due += flops.attention(ARGS, form, 3, 11, Sizes())
    assert flops.counted(side.once) == due.multiplications


def test_the_experts_are_counted():
    experts, x = MixtureOfExperts(ARGS), mx.random.normal((1, 3, ARGS.hidden_size))
    layer = next(i for i in range(ARGS.num_hidden_layers) if ARGS.is_sparse(i))
    due = flops.feed_forward(ARGS, layer, 3, Sizes())
    assert flops.counted(experts, x) == due.multiplications


def test_the_weights_on_paper_are_those_of_the_model():
    """GLM-5.2: 743 billion without MTP."""
    args = ModelArgs.from_dict(contenders.read(contenders.TRUE))
    found = paper(args, 1 << 20, 8.0, 16, 2048, Machine())
    assert found.weights == pytest.approx(743.38e9, rel=1e-4)
    assert found.latents == 78 * 2**20 * 576 * 2
    assert found.index_keys == 21 * 2**20 * 128 * 2


def measured(run):
    mx.eval(run())
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(run())
    return mx.get_peak_memory() - before


def test_peak_memory_is_set_by_the_tile():
    """Of the indexer: at 8 times the context the same."""
    indexer, peaks = Indexer(EIGHTH), []
    for context in (32768, 262144):
        q, k, w = (mx.random.normal(s) for s in ((1, 64, 4, 16), (1, context, 16), (1, 64, 4)))
        mx.eval(q, k, w)
        mask = CausalMask(context - 64, 64)
        peaks.append(measured(lambda q=q, k=k, w=w, mask=mask: indexer.select_tiled(q, k, w, mask)))
    assert peaks[1] <= 1.2 * peaks[0]


def test_tiles_are_as_large_as_they_may_be(monkeypatch):
    in_tiles_of(monkeypatch, 1 << 19)
    indexer = Indexer(EIGHTH)  # 4 heads, index_topk 2048
    assert indexer.tile(1, 128) == (16, 8192)
    assert indexer.tile(2, 128) == (8, 8192)
    assert indexer.tile(1, 4) == (4, 32768)
    assert indexer.tile(1, 1) == (1, 131072)
    in_tiles_of(monkeypatch, 1)
    assert indexer.tile(1, 128) == (1, 8192)
    attention = MultiHeadLatentAttention(EIGHTH, with_indexer=False)
    assert attention.block(1, 2048) == 1
    in_tiles_of(monkeypatch, 1 << 19)
    assert attention.block(1, 2048) == (1 << 19) // (2048 * 72) == 3
    assert attention.block(3, 2048) == 1


def test_nothing_of_the_contexts_size_is_made_on_shared_layers_in_decode():
    side, context = contenders.Ours(EIGHTH, shared=True), 65536
    side.fill(contenders.Filled(EIGHTH, context, 1))
    assert measured(side.once) < context * 4 * 8  # less than a score for each key and head
    assert measured(side.once) < 2048 * 72 * 4 * 4


@pytest.mark.parametrize("elements", [1, 1 << 12, 1 << 16, 1 << 30])
def test_the_selection_is_the_same_in_tiles_of_any_size(monkeypatch, elements):
    """Ties included: scores are small whole numbers; and rows with fewer valid keys than are selected."""
    in_tiles_of(monkeypatch, elements)
    indexer, random = Indexer(ARGS), np.random.default_rng(0)
    for context, rows, pads in ((50, 3, None), (200, 70, (0, 90)), (333, 333, (4,)), (17, 1, None)):
        batch = len(pads or (0,))
        q = random.integers(-1, 2, (batch, rows, indexer.heads, indexer.width)).astype(np.float32)
        k = random.integers(-1, 2, (batch, context, indexer.width)).astype(np.float32)
        k[..., 2:] = 0
        w = random.integers(-1, 3, (batch, rows, indexer.heads)).astype(np.float32)
        mask = CausalMask(context - rows, rows, pads)
        seen = np.array(mask.sees(range(rows), mx.arange(context)))
        scores = np.array(indexer.score(mx.array(q), mx.array(k), mx.array(w), mx.array(seen)))
        due = np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., : ARGS.index_topk], axis=-1)
        found = indexer.select_tiled(mx.array(q), mx.array(k), mx.array(w), mask)
        assert np.array_equal(np.array(found), due)


@pytest.mark.parametrize("tile", [(20, 40), (20, 80), (40, 40), (7, 33)])
def test_two_blocks_of_queries_and_of_keys(monkeypatch, tile):
    indexer, random = Indexer(ARGS), np.random.default_rng(1)
    monkeypatch.setattr(Indexer, "tile", lambda *_: tile)
    q = random.integers(-1, 2, (1, 40, indexer.heads, indexer.width)).astype(np.float32)
    k = random.integers(-1, 2, (1, 80, indexer.width)).astype(np.float32)
    w = np.repeat(random.choice([-1.0, 1.0], (1, 40, 1)), indexer.heads, axis=-1).astype(np.float32)
    k[:, ::2] = 0  # every second score is 0
    mask = CausalMask(40, 40)
    seen = np.array(mask.sees(range(40), mx.arange(80)))
    scores = np.array(indexer.score(mx.array(q), mx.array(k), mx.array(w), mx.array(seen)))
    due = np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., : ARGS.index_topk], axis=-1)
    assert np.array_equal(np.array(indexer.select_tiled(mx.array(q), mx.array(k), mx.array(w), mask)), due)


def test_zeros_of_both_signs_are_equal_and_the_earlier_is_the_better():
    """Negative weights on a ReLU's zeros make -0 where a product does not begin from 0."""
    found = np.array(ranks(mx.array([[[-0.0, 0.0, -0.0, 1.0, -1.0, 0.0]]]), range(10, 16)))[0, 0]
    assert list(np.argsort(-found)) == [3, 0, 1, 2, 5, 4]


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, -np.nan, 3e38])
@pytest.mark.parametrize("pads", [None, (9, 0)])
def test_what_overflows_never_lets_a_masked_key_in(monkeypatch, value, pads):
    """Queries, keys or weights beyond float32: of the future, and of pads, nothing is selected while other keys are left."""
    indexer, random = Indexer(ARGS), np.random.default_rng(2)
    batch, rows, context = len(pads or (0,)), 40, 80
    for wrong in ("q", "k", "w"):
        given = {
            "q": random.normal(size=(batch, rows, indexer.heads, indexer.width)).astype(np.float32),
            "k": random.normal(size=(batch, context, indexer.width)).astype(np.float32),
            "w": random.normal(size=(batch, rows, indexer.heads)).astype(np.float32),
        }
        given[wrong][..., : given[wrong].shape[-1] // 2] = value
        mask = CausalMask(context - rows, rows, pads)
        seen = np.broadcast_to(np.array(mask.sees(range(rows), mx.arange(context))), (batch, rows, context))
        for tile in ((40, 80), (7, 33)):
            monkeypatch.setattr(Indexer, "tile", lambda *_, tile=tile: tile)
            chosen = np.array(indexer.select_tiled(*(mx.array(given[n]) for n in ("q", "k", "w")), mask))
            assert (np.diff(chosen.astype(np.int64), axis=-1) > 0).all()
            assert np.take_along_axis(seen, chosen.astype(np.int64), -1).all(), (wrong, tile)


def test_keys_that_no_query_sees_yet_are_not_scored(monkeypatch):
    """Of a prompt's first chunk that is half of all pairs."""
    scored = []
    score = Indexer.score
    monkeypatch.setattr(Indexer, "score", lambda self, q, k, w, m: scored.append(k.shape[1]) or score(self, q, k, w, m))
    monkeypatch.setattr(Indexer, "tile", lambda *_: (10, 20))
    indexer = Indexer(ARGS)
    q, k, w = (
        mx.random.normal(s)
        for s in ((1, 100, indexer.heads, indexer.width), (1, 100, indexer.width), (1, 100, indexer.heads))
    )
    indexer.select_tiled(q, k, w, CausalMask(0, 100))
    assert sum(scored) == sum(max(10 * (i + 1), ARGS.index_topk) for i in range(10))


@pytest.mark.parametrize("length", [1, 9])
def test_forms_agree_where_they_change_places(monkeypatch, length):
    """One token below and above each switch-over, all forms say the same."""
    side = contenders.Ours(ARGS)
    forms, outputs = [], []
    for context in range(17, 120):
        forms.append(side.block.cheapest_form(length, context + length, ARGS.index_topk))
    changes = [i + 17 for i in range(1, len(forms)) if forms[i] != forms[i - 1]] or [40]
    for context in {c + n for c in changes for n in (-1, 0)}:
        outputs = []
        for form in (EXPANDED, ABSORBED, GATHERED):
            with monkeypatch.context() as patch:
                patch.setattr(MultiHeadLatentAttention, "cheapest_form", lambda *_, form=form: form)
                side.fill(contenders.Filled(ARGS, context, length))
                outputs.append(np.array(side.run()))
        for other in outputs[1:]:
            assert np.abs(other - outputs[0]).max() < 1e-5 * np.abs(outputs[0]).max() + 1e-6


def test_decode_is_gathered_beyond_the_switch_over():
    side = contenders.Ours(ARGS)
    assert side.block.cheapest_form(1, 100_000, ARGS.index_topk) == GATHERED
    assert contenders.Ours(EIGHTH).block.cheapest_form(128, 65536, 2048) == GATHERED


# -- the bench


@pytest.fixture(scope="module")
def found():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "LEAST", 0.0)
        patch.setattr(floor, "ROUNDS", 1)
        return Course([512, 2304], chunk=4, rounds=1, batches=(1, 2), hf_up_to=512, true_context=None).run()


def test_a_run_measures_all_sides_and_its_record_says_the_same(found, tmp_path):
    assert [(c.kind, c.context, c.batch) for c in found.cases] == [
        ("prefill", 512, 1), ("decode", 512, 1), ("prefill", 2304, 1), ("decode", 2304, 1), ("prefill", 512, 2), ("decode", 512, 2)
    ]  # fmt: skip
    assert all(len(timed.seconds) >= 1 and timed.median > 0 for case in found.cases for timed in case.sides.values())
    assert {p.part for p in found.parts} == {"indexer", "attention", "projections", "feed-forward", "head"}
    again = Bench.of_dict(json.loads(json.dumps(found.as_dict())))
    assert list(tables.summary(again)) == list(tables.summary(found))
    files = draw(found, tmp_path)
    assert [f.name for f in files] == [
        f"{kind}-{what}.svg" for kind in ("prefill", "decode") for what in ("rate", "memory", "parts")
    ]
    for file in files:
        assert ET.fromstring(file.read_text()).tag.endswith("svg")  # noqa: S314 - written by ourselves


def test_sides_that_compute_something_else_are_not_compared():
    ours = contenders.Ours(ARGS)
    other = contenders.Ours(ARGS)
    other.block.o_proj.weight = other.block.o_proj.weight * 1.01
    filled = contenders.Filled(ARGS, 40, 3)
    ours.fill(filled)
    other.fill(filled)
    with pytest.raises(ValueError, match="do not compute the same"):
        alike(ours, other)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--contexts", "many"], "--contexts many: expected a number of tokens"),
        (["--chunk", "0"], "expected 1 or more"),
        (["--rounds", "0"], "expected 1 or more"),
        (["--hf-up-to", "x"], "--hf-up-to x"),
        (["--paper", "--context", "2k"], "expected more than index_topk = 2048"),
        (["--paper", "--kv-bits", "4"], "expected 16 or 8"),
        (["--paper", "--bits", "-1"], "--bits -1: expected a number above 0"),
        (["--paper", "--config", "/no/such"], "No such file"),
        (["--paper", "--config", str(contenders.TRUE.with_name("glm-4.7-flash.json"))], "has no indexer"),
        (["--paper", "--memory", "inf"], "--memory inf: expected a number above 0, and below 1e6"),
        (["--paper", "--kept"], "--kept: --paper does not go with it"),
        (["--kept", "--rounds", "9"], "--kept: --rounds does not go with it"),
        (["--kept", "--keep"], "--kept: --keep does not go with it"),
        (["--keep", "--contexts", "1k"], "--keep: --contexts does not go with it"),
        (["--memory", "256"], "--memory is for --paper"),
        (["--contexts", ","], "--contexts: expected numbers of tokens"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(capsys, arguments, said):
    assert verify.__main__.main(["bench", *arguments]) == 10
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("verify: ")
    assert said in err
    assert err.count("\n") == 1


def test_on_paper_it_says_what_fits(capsys):
    assert verify.__main__.main(["bench", "--paper"]) == 0
    said = capsys.readouterr().out
    assert "latents 50.1, index keys 5.6" in said
    assert "fits into 512" in said
    assert verify.__main__.main(["bench", "--paper", "--memory", "256"]) == 0
    assert "does NOT fit into 256" in capsys.readouterr().out


def test_on_paper_the_form_is_the_one_that_runs(capsys):
    """At 3k, 2048 queries at a time, the expanded form; and a config that cannot be read is named."""
    spent = {}
    for context in ("3k", "1M"):
        assert verify.__main__.main(["bench", "--paper", "--context", context, "--chunk", "2048"]) == 0
        prefill = capsys.readouterr().out.split("prefill, chunks")[1]
        spent[context] = float(re.search(r"attention +([0-9.]+)", prefill)[1])
    assert spent["3k"] < spent["1M"]


def test_a_config_nested_too_deep_is_one_line(capsys, tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    assert verify.__main__.main(["bench", "--paper", "--config", str(tmp_path / "deep.json")]) == 10
    error = capsys.readouterr().err
    assert "deep.json" in error
    assert error.count("\n") == 1


def test_the_kept_record_is_told_with_its_targets(capsys):
    record = Bench.of_dict(json.loads(bench_command.KEPT.read_text()))
    assert verify.__main__.main(["bench", "--kept"]) == int(not all(t.met for t in record.targets))
    assert "target" in capsys.readouterr().out


def test_an_interrupted_or_refused_run_leaves_nothing(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert verify.__main__.main(["bench", "--contexts", "512", "--out", str(tmp_path / "file")]) == 10
    assert capsys.readouterr().err.startswith("verify: ")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
