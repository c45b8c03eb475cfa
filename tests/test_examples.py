"""examples/: each runs as it is, on the small trained checkpoint, and on one that is named."""

import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from glm_dsa import Model
from reference import checkpoints

ROOT = Path(__file__).parents[1]


@pytest.fixture
def example(monkeypatch, tmp_path):
    """example("load", *arguments) -> the names that it leaves."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        return runpy.run_module(f"examples.{name}", run_name="__main__")

    return run


@pytest.fixture
def other(tmp_path):
    return checkpoints.write(tmp_path / "other", checkpoints.glm_5_2(num_hidden_layers=4))


def test_load(example, other, capsys):
    assert {layer.length for layer in example("load")["cache"]} == {4}
    assert capsys.readouterr().out.startswith("4 tokens in ")
    assert example("load", other)["logits"].shape == (1, 1, 160)


def test_draft(example, other, capsys):
    example("draft")
    assert capsys.readouterr().out.startswith("drafts: [")
    assert [d.logits.shape for d in example("draft", other)["drafts"]] == [(1, 4, 160), (1, 1, 160), (1, 1, 160)]


def test_in_mlx_lm(example, registered):
    found = example("in_mlx_lm")
    assert isinstance(found["model"], Model)
    assert found["text"]


@pytest.mark.slow("examples/drift", "verify/drift", "verify/engines", "glm_dsa/planning", "glm_dsa/mlx_lm")
def test_drift(example, registered):
    found = example("drift")
    assert found["found"].sensitivity.recipe.bits <= 6.25
    assert (found["out"] / "better" / "config.json").is_file()


def test_layout(example, other, tmp_path):
    assert example("layout")["found"].layout == "interleaved"
    np.save(tmp_path / "texts.npy", np.random.default_rng(0).integers(3, 160, (4, 40)))
    assert set(example("layout", other, tmp_path / "texts.npy")["found"].mass) == {"interleaved", "half-split"}


def test_every_example_is_tried_here():
    every = {file.stem for file in (ROOT / "examples").glob("[!_]*.py")}
    assert every == {name.removeprefix("test_") for name in globals() if name.startswith("test_")} & every
    assert every


def test_one_runs_as_a_user_runs_it():
    done = subprocess.run(
        [sys.executable, "-m", "examples.load"],
        cwd=ROOT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "tokens in" in done.stdout
