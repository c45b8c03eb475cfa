"""The README is tested: every command, option and table in it exists, and every option is in it."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from glm_dsa.__main__ import main
from glm_dsa.config import OVERRIDES, ModelArgs
from reference import checkpoints
from verify import conftest as gate

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def claims_table() -> str:
    rows = []
    for file in sorted((ROOT / "verify").glob("test_*.py")):
        module = importlib.import_module(f"verify.{file.stem}")
        rows.append((getattr(module, "ORDER", 1), f"| {module.CLAIM} | {module.__doc__.splitlines()[0]} |"))
    return "\n".join(
        ["| claim | what is held against what |", "|---|---|", *(row for _, row in sorted(rows, key=lambda r: r[0]))]
    )


def test_the_table_of_claims_is_generated():
    written = README.split("<!-- claims -->\n")[1].split("\n<!-- end of claims -->")[0]
    assert written == claims_table(), f"the table should read:\n{claims_table()}"


class Recorder:
    """Takes what pytest_addoption registers."""

    def __init__(self):
        self.names = []

    def getgroup(self, _):
        return self

    def addoption(self, name, **_):
        self.names.append(name)


def test_every_option_is_in_the_readme_and_every_option_in_it_exists():
    recorder = Recorder()
    gate.pytest_addoption(recorder)
    section = README.split("## Options of the gate")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(--[a-z-]+)", section, re.MULTILINE)) == set(recorder.names)
    known = {*recorder.names, "--values", "--json", "--version", "--kv-bits"}  # the last is mlx-lm's, named as refused
    assert set(re.findall(r"--[a-z][a-z-]+", README)) <= known


def test_every_command_of_the_command_line_runs(tmp_path, capsys):
    folder = checkpoints.write(tmp_path / "ck", checkpoints.glm_5_2(num_hidden_layers=4))
    commands = re.findall(r"^python -m glm_dsa (.*?)(?:\s+#.*)?$", README, re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        arguments = [str({"DIR": folder, "config.json": folder / "config.json"}.get(a, a)) for a in command.split()]
        if arguments == ["--version"]:
            with pytest.raises(SystemExit, match="0"):
                main(arguments)
        else:
            assert main(arguments) == 0
        assert capsys.readouterr().out


def test_the_python_example_runs(tmp_path):
    folder = checkpoints.write(tmp_path / "ck", checkpoints.glm_5_2(num_hidden_layers=4))
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        names: dict = {}
        exec(block.replace("path/to/checkpoint", str(folder)), names)  # noqa: S102
        assert [d.logits.shape for d in names["drafts"]] == [(1, 4, 160), (1, 1, 160), (1, 1, 160)]
        assert {layer.length for layer in names["cache"]} == {4}


def test_the_table_of_conventions_is_complete():
    section = README.split("## Conventions")[1].split("\n## ")[0]
    listed = set(re.findall(r"^\| `([a-z_]+)` \|", section, re.MULTILINE))
    assert listed == {c.name for c in ModelArgs.from_dict(checkpoints.tiny()).conventions}
    assert set(OVERRIDES) - listed == {"index_topk", "indexer_types"}  # no convention, and the schedule


def test_the_makefile_has_what_the_readme_names():
    listed = subprocess.run(
        ["make", "-n", "verify", "test", "lint"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "pytest verify/" in listed.stdout
    assert "pytest tests/" in listed.stdout
    assert sys.version_info >= (3, 11)
