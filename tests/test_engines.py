"""Engines: a layer that stops at its experts gives what it gives in one piece, to the bit, and attends once."""

import importlib

import mlx.core as mx
import numpy as np
import pytest
import torch

from glm_dsa import trace
from glm_dsa.attention import MultiHeadLatentAttention
from reference import checkpoints
from reference.capture import capture
from reference.equations import Equations, causal
from verify.core import stages
from verify.engines.base import MX, Underway, chunks
from verify.engines.definition import to_numpy
from verify.engines.definition_streamed import AnsweredExperts, Asked, OurLayers
from verify.engines.headers import headers_of
from verify.engines.registry import LAYERED, engine_of
from verify.engines.run_third_party import ThirdPartyEngine
from verify.engines.spec import EQUATIONS, HF, OURS, Side
from verify.release.request import OnTrial
from verify.release.run import Trial

CONFIG = checkpoints.packable(num_hidden_layers=3, first_k_dense_replace=1)
DENSE, SPARSE, CHUNK = 0, 1, 3
X = np.random.default_rng(0).standard_normal((1, 40, CONFIG["hidden_size"])).astype(np.float32)
INPUTS = {OURS: mx.array(X), HF: torch.from_numpy(X), EQUATIONS: X.astype(np.float64)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("engines") / "hf", CONFIG)


def engine(folder, kind):
    return engine_of(Side.of(headers_of(str(folder)), kind))


def begun(engine, kind, layer=SPARSE, choices=None):
    return Underway(engine.layer(layer, INPUTS[kind], None, choices or {}))


def handed_over(layer, read):
    """Its experts, in chunks; then what became of it."""
    if layer.request is not None:
        for first in range(0, CONFIG["n_routed_experts"], CHUNK):
            layer.request.take(first, read(SPARSE, first, min(CHUNK, CONFIG["n_routed_experts"] - first)))
    return layer.finish()


# -- the same, in one piece


def hf_whole(engine):
    def answer(x, experts, weights):
        out = torch.zeros_like(x)
        for first, count in chunks(engine.args, CHUNK):
            out += layers.chunk(first, *layers.experts(SPARSE, first, count))(x, experts, weights)
        return out

    layers = engine.layers
    with layers.loaded(SPARSE, answer) as model, capture(model) as seen:
        layers.run(SPARSE, INPUTS[HF], None)
    return seen


def equations_whole(engine):
    read = engine.layers.read
    own = Equations(
        engine.layers.config, lambda n: read(n, torch.float32).double().numpy(), engine.side.conventions
    )
    own.layer(SPARSE, INPUTS[EQUATIONS], np.arange(X.shape[1])[None], causal(X.shape[:2], None), None)
    return own.stages


def definition_whole(engine):
    def answer(x, experts):
        asked = Asked(layers, SPARSE, x, np.array(experts))
        for first, count in chunks(engine.args, CHUNK):
            asked.read(first, count)
        return asked.answers

    layers = OurLayers(engine.side.folder, MX[engine.side.dtype])
    module = layers.model.model.layers[SPARSE]
    module.mlp.switch_mlp = AnsweredExperts(answer)
    with trace.capture(layers.model) as seen:
        module(INPUTS[OURS], *layers.model.model.rotation_and_mask(X.shape[1], None), None, None)
    return {stage: to_numpy(value) for stage, value in seen.items()}


WHOLE = {OURS: definition_whole, HF: hf_whole, EQUATIONS: equations_whole}


@pytest.mark.parametrize("kind", LAYERED)
def test_a_layer_that_stops_at_its_experts_gives_what_it_gives_in_one_piece(folder, kind):
    own = engine(folder, kind)
    layer = begun(own, kind)
    before = set(layer.stages)
    assert f"layers.{SPARSE}.{stages.ROUTING}" in before
    assert f"layers.{SPARSE}.mlp.experts" not in before
    answer = handed_over(layer, engine(folder, HF).layers.experts)
    due = WHOLE[kind](own)
    assert set(answer.stages) == set(due)
    assert len(due) > 15
    for stage in due:
        assert np.array_equal(answer.stages[stage], due[stage]), stage
    output = answer.out.numpy() if kind == HF else np.array(answer.out)
    assert np.array_equal(output, due[f"layers.{SPARSE}.output"])


@pytest.mark.parametrize("kind", LAYERED)
def test_what_its_experts_answer_is_in_its_output(folder, kind):
    """(Were nothing taken, both would agree all the same.)"""
    silent, due = begun(engine(folder, kind), kind).finish(), WHOLE[kind](engine(folder, kind))
    assert not silent.stages[f"layers.{SPARSE}.mlp.experts"].any()
    assert not np.array_equal(silent.stages[f"layers.{SPARSE}.output"], due[f"layers.{SPARSE}.output"])


@pytest.mark.parametrize("kind", LAYERED)
def test_a_dense_layer_asks_for_nothing(folder, kind):
    layer = begun(engine(folder, kind), kind, DENSE)
    assert layer.request is None
    assert layer.finish().stages == layer.stages
    assert f"layers.{DENSE}.output" in layer.stages


def test_attention_runs_once(folder, monkeypatch):
    """It is what a layer costs beside its experts."""
    ran = []

    def counted(kind, name, who):
        own = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda self, *a, **k: (ran.append(who), own(self, *a, **k))[1])

    hf = engine(folder, HF)
    counted(MultiHeadLatentAttention, "cheapest_form", OURS)
    counted(type(hf.layers.empty[SPARSE].self_attn), "forward", HF)
    counted(Equations, "attention", EQUATIONS)
    for kind in LAYERED:
        handed_over(begun(hf if kind == HF else engine(folder, kind), kind), hf.layers.experts)
    assert sorted(ran) == sorted(LAYERED)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_layers_of_hf_may_be_under_way_together_and_end_in_any_order(folder, order):
    """What `capture` exchanges in HF's module is put back, whoever ends first, and one that is given up."""
    engines = [engine(folder, HF) for _ in range(3)]
    modeling = importlib.import_module(type(engines[0].layers.empty[SPARSE]).__module__)
    eager = modeling.eager_attention_forward
    running = [begun(own, HF) for own in engines]
    assert modeling.eager_attention_forward is eager
    outputs = [handed_over(running[i], engines[i].layers.experts).out for i in order]
    assert torch.equal(*outputs)
    running[2]._steps.close()
    assert modeling.eager_attention_forward is eager
    assert engines[2].layers.model.model.layers[SPARSE] is engines[2].layers.empty[SPARSE]


def test_a_release_reads_each_chunk_of_experts_once_for_all_engines(folder, monkeypatch):
    trial = Trial(OnTrial.of(headers_of(str(folder)), tokens=20), seed=0)
    trial.run.chunk, read, own = CHUNK, [], trial.run.theirs.layers.experts
    monkeypatch.setattr(
        trial.run.theirs.layers, "experts", lambda layer, *chunk: (read.append((layer, *chunk)), own(layer, *chunk))[1]
    )
    trial.upto(SPARSE)
    assert read == [(SPARSE, first, count) for first, count in chunks(trial.run.args, CHUNK)]


def test_engines_go_by_the_names_of_the_command_line():
    assert set(LAYERED) == {"glm_dsa", "hf", "equations"}
    other = Side("", "mlx_lm.models.glm_moe_dsa", "nowhere")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Side, "args", None)
        assert isinstance(engine_of(other), ThirdPartyEngine)
