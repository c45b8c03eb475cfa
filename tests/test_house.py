"""What a file's place decides: each is one that a move between rooms would quietly change."""

import ast
import importlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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
    assert ast.get_docstring(ast.parse((FOLDER / room / "__init__.py").read_text()))


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


def test_the_wheel_holds_every_subpackage(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "glm_dsa", source / "glm_dsa", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("glm_dsa-*.whl")
    with zipfile.ZipFile(wheel) as held:
        names = {name for name in held.namelist() if name.startswith("glm_dsa/")}
    due = {str(f.relative_to(source)) for f in (source / "glm_dsa").rglob("*") if f.is_file()}
    assert names == due
    assert "glm_dsa/storage/__init__.py" in names
