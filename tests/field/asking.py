"""What is asked of an input: each question answers with an exit code and what was printed."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

import glm_dsa
from glm_dsa.__main__ import main as glm_dsa_main
from tests.gatekeeper import gate
from verify.__main__ import main as verify_main

from .makers import Bench
from .row import AGREES, UNREADABLE, Said

ROOT = Path(__file__).parents[2]
GATE = (str(ROOT / "verify" / "claims" / "test_release.py"), "--rootdir", str(ROOT), "-q")  # the release's own claim
CLOSE = 1e-5  # of the logits' rms: the same weights under other names
Question = Callable[[Bench, Path], Said]


@contextmanager
def _heard() -> Iterator[io.StringIO]:
    """Everything that is printed or warned of."""
    out = io.StringIO()
    with warnings.catch_warnings(record=True) as caught, redirect_stdout(out), redirect_stderr(out):
        warnings.simplefilter("always")
        yield out
    out.write("".join(f"{w.message}\n" for w in caught if issubclass(w.category, UserWarning)))


def _command(main: Callable[[list[str]], int], *arguments: object) -> Said:
    with _heard() as out:
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as exit:  # argparse's
            code = exit.code if isinstance(exit.code, int) else 1
    return Said(code, out.getvalue())


# -- commands


def audited(*options: str) -> Question:
    return lambda bench, folder: _command(verify_main, "audit", folder, *options)


def counted(*options: str) -> Question:
    """`python -m glm_dsa inventory`."""
    return lambda bench, folder: _command(glm_dsa_main, "inventory", folder, *options)


def planned(*options: str) -> Question:
    return lambda bench, folder: _command(glm_dsa_main, "plan", folder, *options)


def ruled(text: str, most: float = 5.0) -> Question:
    """A recipe of ik_llama.cpp's or llama.cpp's, planned; an error if it takes more seconds than `most`."""

    def ask(bench: Bench, folder: Path) -> Said:
        file = folder / "rules.txt"
        file.write_text(text)
        start = time.monotonic()
        said = _command(glm_dsa_main, "plan", folder / "config.json", "--custom-q", file)
        assert time.monotonic() - start < most, "a recipe that does not end"
        return said

    return ask


def followed(recipe: str) -> Question:
    """An MLX recipe of our own (TOML), planned for this model."""

    def ask(bench: Bench, folder: Path) -> Said:
        file = folder / "recipe.toml"
        file.write_text(recipe)
        return _command(glm_dsa_main, "plan", folder, "--recipe", file)

    return ask


def drifted(against: Callable[[Bench, Path], Path], *options: str) -> Question:
    return lambda bench, folder: _command(verify_main, "drift", folder, "--against", against(bench, folder), *options)


def measured(against: Callable[[Bench, Path], Path], *options: str) -> Question:
    """`python -m verify quality`, on the first tokens of the kept texts."""
    return lambda bench, folder: _command(
        verify_main, "quality", folder, "--against", against(bench, folder), *options
    )  # fmt: skip


# -- the definition itself


def loaded(bench: Bench, folder: Path) -> Said:
    return ran(lambda model: None)(bench, folder)


def ran(what: Callable[[Any], Any]) -> Question:
    """Loaded, and something done with the model."""

    def ask(bench: Bench, folder: Path) -> Said:
        code = AGREES
        with _heard() as out:
            try:
                what(glm_dsa.load(folder))
            except ValueError as error:  # GlmDsaError too
                print(error)
                code = UNREADABLE
        return Said(code, out.getvalue())

    return ask


def same_as(source: Callable[[Bench, Path], Path]) -> Question:
    """Loaded, with the logits of another folder, which holds the same weights under other names."""

    def ask(bench: Bench, folder: Path) -> Said:
        said = loaded(bench, folder)
        if said.code == AGREES:
            ours, due = _logits(folder), _logits(source(bench, folder))
            error = float(np.abs(ours - due).max() / np.sqrt((due**2).mean()))
            assert error < CLOSE, f"it loads, as another model: logits differ by {error:.1e} of their rms"
        return said

    return ask


def of_source(bench: Bench, folder: Path) -> Path:
    return bench.source


def built_of_source(bench: Bench, folder: Path) -> Path:
    """The same, in 4 bit."""
    return bench.packed(bench.source, {"group_size": 64, "bits": 4, "mode": "affine"}, r"\.indexer\.")


def _logits(folder: Path) -> np.ndarray:
    model = glm_dsa.load(folder, dtype=mx.float32)
    tokens = np.random.default_rng(0).integers(3, model.args.vocab_size, (1, 48))
    return np.array(model(mx.array(tokens)).astype(mx.float32))


# -- the gate


def gated(*options: object, files: tuple[str, ...] = GATE) -> Question:
    """`pytest verify/ --checkpoint FOLDER`; a callable among the options is asked for a folder."""

    def ask(bench: Bench, folder: Path) -> Said:
        given = [o(bench, folder) if callable(o) else o for o in options]
        return Said(*gate(*files, "--checkpoint", folder, *given))

    return ask


def gated_with(module: str, text: str, *options: str) -> Question:
    """The gate as a process of its own, before whose modules one of another text stands."""

    def ask(bench: Bench, folder: Path) -> Said:
        (folder / "first").mkdir()
        (folder / "first" / f"{module}.py").write_text(text)
        command = [sys.executable, "-m", "pytest", *GATE, "--checkpoint", str(folder), *options]
        environment = os.environ | {"PYTHONPATH": f"{folder / 'first'}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
        return Said(done.returncode, done.stdout + done.stderr)

    return ask
