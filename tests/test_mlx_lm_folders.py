"""Folders that are no whole checkpoint, at the doors of mlx-lm's commands: one line each, before anything is read or written."""

import json
import shutil
import sys

import mlx.core as mx
import mlx_lm
import mlx_lm.utils
import pytest

from glm_dsa.__main__ import main
from glm_dsa.errors import CheckpointError
from reference.kept import TRAINED

SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(TRAINED / "interleaved", tmp_path / "glm")


@pytest.fixture
def refused(registered, capsys, monkeypatch):
    """The one line in which a command refuses."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", sys.argv)
        assert main([*map(str, arguments)]) == 10
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        return line

    return run


def write_config(folder, without=(), **keys):
    config = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in without}))


@pytest.mark.parametrize("lost", [SHARD, "model-mtp.safetensors"])
def test_a_missing_shard_is_named_before_any_is_read(refused, folder, tmp_path, monkeypatch, lost):
    """That of the MTP layer too, which mlx-lm would quietly do without."""
    (folder / lost).unlink()
    monkeypatch.setattr(mx, "load", lambda *_: pytest.fail("a shard was read"))
    expected = f"glm-dsa: {folder / lost}: missing, though model.safetensors.index.json puts model.layers."
    assert refused("generate", "--model", folder, "--prompt", "x").startswith(expected)
    assert refused("convert", "--hf-path", folder, "--mlx-path", tmp_path / "out", "-q").startswith(expected)
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="download the shard"):
        mlx_lm.utils.sharded_load(str(folder))


def test_a_shard_that_no_index_misses_is_not_told_in_tensors(refused, folder):
    for file in (SHARD, "model.safetensors.index.json"):
        (folder / file).unlink()
    line = refused("generate", "--model", folder, "--prompt", "x")
    assert line.startswith(f"glm-dsa: {folder}: ")
    assert len(line) < 500


@pytest.mark.parametrize("kind", ["llama", "deepseek_v32"])
def test_a_model_type_of_another_definition_is_named(refused, folder, kind):
    write_config(folder, model_type=kind, architectures=[])
    line = refused("generate", "--model", folder, "--prompt", "x")
    assert line.startswith(f"glm-dsa: {folder / 'config.json'}: model_type = {kind!r}, and mlx-lm's definition of that")
    assert "this definition's are 'glm_moe_dsa', 'glm4_moe_lite'" in line
    assert "\\n" not in line


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: write_config(f, without=["hidden_size"]), "config.json: hidden_size is missing"),
        (lambda f: write_config(f, without=["model_type"]), "config.json: model_type is missing: expected one of"),
        (lambda f: write_config(f, model_type=["glm_moe_dsa"]), "config.json: model_type = ['glm_moe_dsa']: allowed are"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json: list; expected a JSON object"),
    ],
)
def test_a_config_that_cannot_be_is_named_with_its_file(refused, folder, damage, message):
    damage(folder)
    assert refused("generate", "--model", folder, "--prompt", "x").startswith(f"glm-dsa: {folder}/{message}")


def cut(file):
    file.write_bytes(file.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / SHARD).unlink(), "missing, though"),
        (lambda f: cut(f / SHARD), "cut short"),
        (lambda f: (f / SHARD).write_text("version https://git-lfs.github.com/spec/v1\n"), "a Git LFS pointer"),
        (lambda f: [s.rename(s.with_suffix(".gguf")) for s in f.glob("model*")], "GGUF, a format of llama.cpp"),
        (lambda f: [s.rename(s.with_suffix(".bin")) for s in f.glob("model*")], "PyTorch's pickle"),
    ],
)
def test_what_is_no_checkpoint_is_not_attached_to(refused, folder, damage, message):
    """Refused as `inventory` refuses it, and left as it is."""
    damage(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    line = refused("attach", folder)
    assert message in line
    assert line == refused("inventory", folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_model_of_another_kind_is_left_to_mlx_lm(registered, tmp_path):
    """A draft model, say: a Llama in one layer."""
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama

    config = {
        "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2,
        "rms_norm_eps": 1e-5, "vocab_size": 32,
    }  # fmt: skip
    model = llama.Model(llama.ModelArgs.from_dict(config))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert isinstance(mlx_lm.utils.load_model(tmp_path)[0], llama.Model)
