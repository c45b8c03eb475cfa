"""A release judged by the gate as a process: beside its original, refused, interrupted and resumed."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
import tokenizers

import glm_dsa
from glm_dsa.model import parameters_of
from reference import checkpoints
from tests.gatekeeper import gate
from verify.audit import audit
from verify.gate import options

ROOT = Path(__file__).parents[1]
CONFIG = checkpoints.packable(num_hidden_layers=5, first_k_dense_replace=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("release") / "hf", CONFIG)


def run(*arguments):
    command = [sys.executable, "-m", "pytest", str(ROOT / "verify"), "--rootdir", str(ROOT), *map(str, arguments)]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return out.returncode, out.stdout + out.stderr


@pytest.fixture(scope="module")
def release(source):
    """As mlx-lm packs, 4 bit; with a tokenizer of bytes."""
    model, folder = glm_dsa.load(source), source.parent / "4bit"
    nn.quantize(
        model, 64, 4, class_predicate=lambda path, module: hasattr(module, "to_quantized") and "indexer" not in path
    )
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), parameters_of(model))
    shutil.copy(source / "config.json", folder)
    config = json.loads((folder / "config.json").read_text())
    said = {"quantization": {"group_size": 64, "bits": 4, "mode": "affine"}}
    (folder / "config.json").write_text(json.dumps(config | said))
    letters = {letter: i for i, letter in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_release_beside_its_original(release, source, tmp_path):
    (tmp_path / "text").write_text("The gate judges what it is shown, and says what it was not. " * 4)
    arguments = [
        "--checkpoint",
        release,
        "--original",
        source,
        "--prompt-file",
        tmp_path / "text",
        "--tokens",
        100,
        "-q",
    ]
    status, said = gate(ROOT / "verify", *arguments, "--limit", "kl_mean=1e-6", "--limit", "top1=0")
    assert "layers.0 cost: relative error of attention" in said
    assert "KL(original || release) in nats: mean" in said
    assert ", of text" in said
    assert "the gate's other claims: not of this release: judged beside its original" in said
    assert status == 1
    assert "does not hold: kl_mean" in said
    assert "at most 1e-06 is asked for" in said
    assert "top1" not in said.split("does not hold:")[1].splitlines()[0]
    assert "verdict: FAULT in 1 of 2 claims" in said


def test_without_the_original_the_report_says_what_nobody_can_tell(release, source, given):
    key = "that these are the model's own weights and config values"
    for more, told in (({}, True), ({"--original": str(source)}, False)):
        asked = options.Asked.of(given({"--checkpoint": str(release)} | more))
        lines = asked.not_verified(given({}))
        assert (key in lines) == told
        assert "the gate's other claims" in lines


def test_what_does_not_load_is_refused_with_its_reason(release, tmp_path, given):
    """As a process: tests/fuzz/test_bounds.py."""
    folder = shutil.copytree(release, tmp_path / "router")
    tensors = dict(mx.load(str(folder / "model.safetensors")))
    w = tensors.pop("model.layers.2.mlp.gate.weight")
    for part, array in zip(("weight", "scales", "biases"), mx.quantize(w, 64, 4), strict=True):
        tensors[f"model.layers.2.mlp.gate.{part}"] = array
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    asked = options.Asked.of(given({"--checkpoint": str(folder)}))
    assert asked.release.refused
    faults = [f.what for f in audit.audit(asked.release.headers).findings if f.severity == audit.FAULT]
    assert any("mlp.gate.weight: packed" in what for what in faults), faults


@pytest.mark.slow("verify/release", "verify/core/report", "verify/gate")
def test_interrupted_and_resumed_the_report_is_the_same(release, source, tmp_path):
    """By SIGINT, and once more by SIGKILL."""
    report = tmp_path / "report"
    arguments = ["--checkpoint", release, "--original", source, "--report", report, "--layers", "0-2"]
    arguments += ["-q", "-o", f"cache_dir={tmp_path}/c"]
    status, said = run(*arguments)
    assert status == 0, said
    whole = (report / "report.jsonl").read_text()
    interrupt(arguments, 1, signal.SIGINT)
    interrupt([*arguments, "--resume"], 2, signal.SIGKILL)
    status, said = run(*arguments, "--resume")
    assert status == 0, said
    finished = int(re.search(r"resumed after (\d) of 3 layers", said)[1])
    assert finished >= 2
    assert re.findall(r"layer (\d): ", said) == [str(i) for i in range(finished, 3)]  # nothing twice
    seconds = re.compile(r'"seconds": [0-9.]+')
    assert seconds.sub("", (report / "report.jsonl").read_text()) == seconds.sub("", whole)
    assert not list((tmp_path / "c" / "d" / "glm-dsa").iterdir())  # let go


def interrupt(arguments, layer, number):
    """Sends a signal when this layer has passed."""
    command = [sys.executable, "-m", "pytest", str(ROOT / "verify"), "--rootdir", str(ROOT), *map(str, arguments)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        for line in running.stdout:
            if f"layer {layer}: " in line:
                running.send_signal(number)
                break
        running.stdout.read()
    assert running.returncode != 0
