"""What a build takes is told before its weights are read, and refused where the machine has less."""

import json
import logging
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from builds import write_build

import glm_dsa
from glm_dsa import ModelArgs, checkpoint, memory
from glm_dsa.errors import CheckpointError
from glm_dsa.model import parameters_of
from glm_dsa.planning import recipe
from glm_dsa.planning.stored import OnDisk
from reference import checkpoints
from reference.kept import TRAINED
from verify import drift
from verify.engines.headers import headers_of
from verify.quality import measure
from verify.release.request import OnTrial

CONFIGS = Path(__file__).parents[1] / "verify" / "configs"
GIB = 1 << 30


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("memory") / "plain", checkpoints.packable(num_hidden_layers=4))


@pytest.fixture(scope="module")
def fp8(plain):
    checkpoints.write_fp8(plain, plain.parent / "fp8", plain.parent / "again")
    return plain.parent / "fp8"


@pytest.fixture(scope="module")
def packed(plain):
    folder, model = plain.parent / "packed", glm_dsa.load(plain)
    folder.mkdir()
    nn.quantize(model, 32, 4, class_predicate=lambda path, m: hasattr(m, "to_quantized") and "indexer" not in path)
    mx.save_safetensors(str(folder / "model.safetensors"), parameters_of(model))
    said = {"quantization": {"group_size": 32, "bits": 4, "mode": "affine"}}
    (folder / "config.json").write_text(json.dumps(json.loads((plain / "config.json").read_text()) | said))
    return folder


@pytest.fixture
def has(monkeypatch):
    """has(bytes): a machine of so much memory."""
    return lambda nbytes: monkeypatch.setattr(memory, "physical", lambda: nbytes)


def test_this_machine_has_memory():
    assert 1 << 28 < memory.physical() < 1 << 50


@pytest.mark.parametrize("kind", ["plain", "fp8", "packed"])
@pytest.mark.parametrize("dtype", [None, mx.float32])
def test_what_is_told_is_what_is_held(kind, dtype, request, caplog):
    folder = request.getfixturevalue(kind)
    assembled, stored = checkpoint.assemble(folder, dtype)
    with caplog.at_level(logging.INFO, "glm_dsa"):
        model = glm_dsa.load(folder, dtype=dtype)
    assert memory.taken(assembled) == memory.taken(model)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert (
        f"{folder}: weights, {'packed' if kind == 'packed' else 'unpacked'} take {memory.gib(memory.taken(model))} of"
        in told[0]
    )
    if dtype is None:  # the same as `plan` counts from the headers
        model.drop_mtp()
        assert memory.taken(model) == OnDisk.of(model.args, stored).loaded


def test_a_build_that_cannot_fit_is_refused_before_a_weight_is_read(packed, has, monkeypatch):
    has(memory.taken(glm_dsa.load(packed)) - 1)
    monkeypatch.setattr(checkpoint, "check_values", None)  # would fail otherwise
    with pytest.raises(CheckpointError, match="this machine has") as error:
        glm_dsa.load(packed)
    assert str(packed) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_build_that_just_fits_is_loaded(packed, has):
    has(memory.taken(glm_dsa.load(packed)))
    assert isinstance(glm_dsa.load(packed), glm_dsa.Model)


def test_a_build_of_true_size(tmp_path, has, caplog):
    """GLM-5.2 in 3.5 bits, of headers alone: 305 GiB are refused on 256, and told of on 512."""
    params = json.loads((CONFIGS / "glm-5.2.json").read_text())
    formats = recipe.load("glm-5.2-3.5bit").formats(ModelArgs.from_dict(params), False)
    folder = write_build(tmp_path / "build", params, formats)
    has(256 * GIB)
    with pytest.raises(CheckpointError, match=r"take 30\d\.\d GiB of memory, .* has 256\.0 GiB; load a build of fewer"):
        glm_dsa.load(folder)
    has(512 * GIB)
    model, stored = checkpoint.assemble(folder)
    with caplog.at_level(logging.INFO, "glm_dsa"):
        memory.check_model(str(folder), model)
    assert "packed take 30" in caplog.text
    assert memory.taken(model) == OnDisk.of(model.args, stored).loaded


# -- what loads by other ways


@pytest.mark.usefixtures("registered")
def test_mlx_lm_tells_and_refuses_too(packed, has, caplog, monkeypatch):
    monkeypatch.setattr(mlx_lm.utils, "load_tokenizer", lambda *_, **__: None)
    monkeypatch.setattr(logging.getLogger("glm_dsa"), "propagate", True)
    with caplog.at_level(logging.INFO, "glm_dsa"):
        model, _ = mlx_lm.load(str(packed))
    assert f"{packed}: weights, packed take" in caplog.text
    needed = memory.taken(model)
    has(needed - 1)
    with pytest.raises(CheckpointError, match="this machine has"):
        mlx_lm.load(str(packed))
    with caplog.at_level(logging.INFO, "glm_dsa"):
        mlx_lm.load(str(packed), lazy=True)  # as convert does, which writes what it has read
    assert f"take {memory.gib(needed)}; they are read as they are needed" in caplog.text


def test_quality_goes_through_a_large_model_if_a_layer_fits(plain, has, monkeypatch):
    monkeypatch.setattr("verify.engines.spec.SMALL", 0)
    model, _ = checkpoint.assemble(plain, mx.float32)
    largest = max(map(memory.taken, model.layers))
    has(largest - 1)
    with pytest.raises(CheckpointError, match=r"weights of a layer, in float32, take .* dtype=bfloat16"):
        measure(str(plain), str(plain), token_ids=[5, 6, 7, 8])
    has(largest)
    measure(str(plain), str(plain), token_ids=[5, 6, 7, 8])


def test_drift_refuses_to_hold_two_models_that_do_not_fit(packed, plain, has, monkeypatch):
    monkeypatch.setattr("verify.drift.session.Session._run", None)
    sides = str(packed), f"hf@{plain}"
    has(1 << 20)
    with pytest.raises(CheckpointError, match=r"--thorough: .* both in full"):
        drift.compare(*sides, tokens=list(range(3, 60)), thorough=True)
    for memory_of, thorough in ((1 << 20, False), (1 << 40, True)):
        has(memory_of)
        with pytest.raises(TypeError, match="NoneType"):  # it would run
            drift.compare(*sides, tokens=list(range(3, 60)), thorough=thorough)


def test_the_kept_checkpoint_fits_anywhere(has):
    has(1 << 28)
    assert memory.taken(glm_dsa.load(TRAINED / "interleaved")) < 1 << 28


def test_a_release_on_trial_says_what_it_takes_before_it_begins(monkeypatch):
    release = OnTrial.of(headers_of(str(TRAINED / "half-split")), tokens=40, layers={0, 1})
    monkeypatch.setattr(memory, "physical", lambda: 3 << 30)
    line = release.memory()
    assert line.startswith("half-split: ")
    assert memory.gib(max(release.nbytes().values())) in line
    assert "3.0 GiB" in line
