"""A release judged layer by layer: any layout and format, and what is wrong with it named."""

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch

import glm_dsa
from glm_dsa import attention
from glm_dsa.model import parameters_of
from reference import checkpoints, hf
from reference.equations import Conventions
from verify import stages
from verify.judge import Judge
from verify.on_trial import OnTrial, Trial
from verify.release import headers_of
from verify.report import FAULT, Report

CONFIG = checkpoints.packable(num_hidden_layers=5, first_k_dense_replace=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("release") / "hf", CONFIG)


def packed(source, folder, bits, **others):
    """As mlx-lm converts: `others` are the bits of modules whose path holds that part; 0 leaves them as they are."""
    model = glm_dsa.load(source)

    def predicate(path, module):
        own = next((b for part, b in others.items() if part in path), bits)
        return hasattr(module, "to_quantized") and "indexer" not in path and own > 0 and {"group_size": 64, "bits": own}

    nn.quantize(model, class_predicate=predicate)
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), parameters_of(model))
    (folder / "config.json").write_text((source / "config.json").read_text())
    return folder


def trial_of(folder, **options):
    return Trial(OnTrial.of(headers_of(str(folder)), options.get("topk"), options.get("tokens"), None), seed=0)


def judged(trial):
    """The comparison at which the judge stops, or None where all layers and the head agree."""
    judge = Judge(Report(), "claim", "again", 0)
    try:
        for layer in trial.release.layers:
            reference, ours, _ = trial.layer(layer)
            judge.stages(ours, reference, local=True, replaced=reference.injections)
        reference, ours, _ = trial.logits()
        judge.stages(ours, reference, local=True)
    except pytest.fail.Exception:
        return judge.report.comparisons[-1]
    return None


@pytest.mark.parametrize("kind", ["bf16", "fp8", "4 bit", "mixed", "mlx, bf16"])
def test_every_format_agrees(source, tmp_path, kind):
    folder = source
    if kind == "fp8":
        checkpoints.write_fp8(source, tmp_path / "fp8", tmp_path / "plain")
        folder = tmp_path / "fp8"
    elif kind != "bf16":
        others = {"mixed": {"down_proj": 6, "o_proj": 8, "lm_head": 0}, "mlx, bf16": {"": 0}}.get(kind, {})
        folder = packed(source, tmp_path / "q", 4, **others)
    assert judged(trial_of(folder)) is None


def test_layer_by_layer_is_the_whole_run(source):
    """HF's streamed logits are those of HF's model in memory, and ours, run on its own, ends as ours does."""
    trial = trial_of(source)
    for layer in trial.release.layers:
        trial.layer(layer)
    whole = hf.forward(hf.load(source, Conventions.of(CONFIG)), trial.run.tokens).numpy()
    ours = np.array(glm_dsa.load(source, dtype=mx.float32)(mx.array(trial.run.tokens)))
    reference, _, free = trial.logits()
    at = np.unique(np.linspace(0, trial.run.tokens.shape[1] - 1, 64).round().astype(int))
    assert np.abs(reference.hf["logits"] - whole[:, at]).max() < 1e-4 * np.abs(whole).max()
    assert np.abs(ours - whole).max() < 1e-3 * np.abs(whole).max()
    assert free.kl_max < 1e-6


def test_a_fault_of_the_definition_is_named(source, tmp_path, monkeypatch):
    folder = packed(source, tmp_path / "q", 4)
    original = attention.MultiHeadLatentAttention.__init__

    def scaled(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.scale *= 1.01

    monkeypatch.setattr(attention.MultiHeadLatentAttention, "__init__", scaled)
    found = judged(trial_of(folder))
    assert found.verdict == FAULT
    assert found.stage == "layers.0.self_attn.heads"


def test_experts_come_in_chunks(source, monkeypatch):
    from verify import stream

    whole, parts = trial_of(source), trial_of(source)
    parts.run.chunk = 3
    assert whole.run.chunk == CONFIG["n_routed_experts"]
    for layer in (0, 1):
        ones, others = whole.layer(layer)[0].hf, parts.layer(layer)[0].hf
        for stage in stages.in_order(ones):
            assert np.allclose(ones[stage], others[stage], atol=1e-5), stage
    assert stream.CHUNK >= 1 << 20


def test_what_cannot_be_judged_is_told_in_a_line(source, tmp_path):
    for options, message in (
        ({"tokens": 1}, "--tokens 1: at least 2 are due"),
        ({"layers": {7}}, "--layers: .* has 5 layers, from 0 on"),
    ):
        with pytest.raises(ValueError, match=message):
            OnTrial.of(headers_of(str(source)), None, options.get("tokens"), options.get("layers"))
    other = shutil.copytree(source, tmp_path / "other")
    config = json.loads((other / "config.json").read_text()) | {"rope_interleave": False}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="rope_interleave = false"):
        OnTrial.of(headers_of(str(other)), None, None, None)
    assert torch.is_grad_enabled()
