"""What a file's place decides: each is one that a move between rooms would quietly change."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import glm_dsa
from reference.kept import TRAINED
from verify import FOLDER, ROOT
from verify.engines import third_party
from verify.faults import coverage
from verify.gate import plugin
from verify.release.request import digest_of_code

ROOMS = sorted(folder.name for folder in FOLDER.iterdir() if (folder / "__init__.py").is_file())


def test_every_file_of_the_gate_lies_in_a_room():
    assert {f.name for f in FOLDER.glob("*.py")} == {"__init__.py", "__main__.py", "conftest.py"}
    assert {f.relative_to(FOLDER).parts[0] for f in FOLDER.glob("*/**/*.py")} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_it_holds(room):
    said = ast.get_docstring(ast.parse((FOLDER / room / "__init__.py").read_text()))
    assert said
    named = re.findall(r"^([a-z_]+) {2,}\S", said, re.MULTILINE)
    assert not [name for name in named if not (FOLDER / room / f"{name}.py").is_file()]


def test_a_file_of_over_400_lines_says_why():
    every = [file for package in ("glm_dsa", "reference", "verify") for file in sorted((ROOT / package).rglob("*.py"))]
    long = {file: file.read_text() for file in every if len(file.read_text().splitlines()) > 400}
    assert not [str(file) for file, text in long.items() if "400 lines" not in (ast.get_docstring(ast.parse(text)) or "")]


def test_the_picture_has_every_room():
    picture = (ROOT / "docs" / "architecture.md").read_text().split("```")[3].split()
    assert sorted(picture) == sorted([*ROOMS, "__main__"])


def names_of_others(file: Path) -> list[str]:
    """Private names that a file takes from another room."""
    own, found = file.parent, []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            is_own = node.level == 1 or (node.module or "").startswith(f"verify.{own.name}")
            private = [a.name for a in node.names if a.name.startswith("_") and not a.name.startswith("__")]
            found += [f"{file.relative_to(ROOT)}: {name}" for name in private if not is_own]
    return found


def test_nobody_takes_a_private_name_from_another_room():
    assert not [name for file in sorted(FOLDER.rglob("*.py")) for name in names_of_others(file)]


def test_claims_lie_in_their_room_and_name_themselves():
    every = sorted(FOLDER.rglob("test_*.py"))
    assert {file.parent for file in every} == {plugin.CLAIMS}
    claims = {file: importlib.import_module(f"verify.claims.{file.stem}").CLAIM for file in every}
    asked = {claim for file, claim in claims.items() if not file.name.startswith(plugin.RELEASE)}
    assert set(plugin.all_claims()) | set(plugin.all_claims(of_implementations=True)) == asked
    assert {f"test_{part}.py" for part in plugin.ORDER} <= {file.name for file in every}


def test_a_change_in_any_subfolder_is_other_code(tmp_path):
    """Or an interrupted run would go on under it."""
    for package in ("glm_dsa", "reference", "verify"):
        (tmp_path / package / "room").mkdir(parents=True)
        (tmp_path / package / "room" / "part.py").write_text("a = 1\n")
    before = digest_of_code(tmp_path)
    for package in ("glm_dsa", "reference", "verify"):
        (tmp_path / package / "room" / "part.py").write_text("a = 2\n")
        assert digest_of_code(tmp_path) != before, package
        before = digest_of_code(tmp_path)


def test_functions_of_subpackages_are_faulted_and_mutated_too(tmp_path, monkeypatch):
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    for file in ("outer/__init__.py", "outer/part.py", "outer/inner/__init__.py", "outer/inner/deep.py"):
        (tmp_path / file).write_text("")
    (tmp_path / "outer" / "mlx_lm").mkdir()
    (tmp_path / "outer" / "mlx_lm" / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert set(coverage.modules(importlib.import_module("outer"))) == {"part", "inner", "inner.deep"}
    assert "storage.safetensors.read_header" in coverage.functions()
    files = {file.relative_to(ROOT / "glm_dsa") for file in (ROOT / "glm_dsa").rglob("*.py")}
    names = {str(file.with_suffix("")).replace("/", ".").removesuffix(".__init__") for file in files} - {"__init__"}
    assert {n for n in names if n.partition(".")[0] not in coverage.NO_PART} == set(coverage.modules())
    assert set(coverage.NO_PART) <= names


@pytest.mark.parametrize("room", ROOMS)
def test_an_error_is_placed_in_their_code_and_not_in_a_room_of_this_gate(room, tmp_path):
    theirs = tmp_path / "theirs.py"
    theirs.write_text("def call(then):\n    then()\n")
    scope: dict = {}
    exec(compile(theirs.read_text(), str(theirs), "exec"), scope)  # noqa: S102
    own: dict = {}
    exec(compile("def fail():\n    raise ValueError('no')\n", str(FOLDER / room / "some.py"), "exec"), own)  # noqa: S102
    with pytest.raises(ValueError, match="no") as error:
        scope["call"](own["fail"])
    told = third_party.told(error.value)
    assert told == "ValueError: no (theirs.py, line 2)"


def pip(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "pip", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "glm_dsa", folder / "source" / "glm_dsa", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, folder / "source")
    (file,) = folder.glob("glm_dsa-*.whl")
    return file


def test_the_wheel_holds_every_subpackage(wheel):
    with zipfile.ZipFile(wheel) as held:
        names = {name for name in held.namelist() if name.startswith("glm_dsa/")}
    source = wheel.parent / "source"
    due = {str(f.relative_to(source)) for f in (source / "glm_dsa").rglob("*") if f.is_file()}
    assert names == due
    assert {"glm_dsa/storage/__init__.py", "glm_dsa/mlx_lm/__init__.py"} <= names


RUNS = """
import sys, numpy, mlx.core as mx, glm_dsa
model, tokens = glm_dsa.load(sys.argv[1]), mx.array([[*b"import sys"]])
print(glm_dsa.__file__)
numpy.save(sys.argv[2], numpy.array(model(tokens).astype(mx.float32)))
"""


def test_what_the_wheel_installs_runs_the_trained_checkpoint(wheel, tmp_path):
    """From a folder that holds nothing else, and nowhere near this repository: the same logits as here."""
    target, logits = tmp_path / "installed", tmp_path / "logits.npy"
    pip("install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel)
    environment = os.environ | {"PYTHONPATH": str(target)}
    command = [sys.executable, "-P", "-c", RUNS, str(TRAINED / "half-split"), str(logits)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(target)
    here = glm_dsa.load(TRAINED / "half-split")(mx.array([[*b"import sys"]]))
    assert np.array_equal(np.load(logits), np.array(here.astype(mx.float32)))
