"""Imports run one way: glm_dsa <- verify -> reference, and the equations never call HF."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GLM_DSA = "glm_dsa, glm_dsa.__main__"
REFERENCE = ", ".join(
    str(file.relative_to(ROOT).with_suffix("")).replace("/", ".")
    for file in sorted((ROOT / "reference").rglob("[!_]*.py"))
)

WALLS = {
    GLM_DSA: ("torch", "transformers", "mlx_lm", "safetensors", "reference", "verify"),
    REFERENCE: ("mlx", "mlx_lm", "glm_dsa", "verify"),
    "reference.equations, reference.layout": ("torch", "transformers", "mlx", "glm_dsa"),
}
FOLDERS = {
    "glm_dsa": ("torch", "transformers", "numpy", "mlx_lm", "reference", "verify", "tests", "docs", "examples"),
    "reference": ("mlx", "mlx_lm", "glm_dsa", "verify", "tests", "docs", "examples"),
    "verify": ("tests", "docs", "examples"),
}


def brought_in(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after a statement."""
    code = f"{statement}\nimport sys\nprint(*sorted({{m.partition('.')[0] for m in sys.modules}}))"
    return set(
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.split()
    )


@pytest.mark.parametrize("modules", WALLS)
def test_what_an_import_brings_in(modules):
    assert not brought_in(f"import {modules}") & set(WALLS[modules])


def test_this_test_can_fail():
    assert "glm_dsa" in brought_in("import glm_dsa")
    assert "transformers" in brought_in("import transformers")


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_file_names_what_is_behind_a_wall(folder):
    """Imports inside functions too, which no import of the module would show."""
    crossed = []
    for file in sorted((ROOT / folder).glob("**/*.py")):
        if file.parent == ROOT / "glm_dsa" / "mlx_lm" or (folder == "verify" and file.name.startswith("test_")):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            crossed += [f"{file.name}: {n}" for n in names if n.partition(".")[0] in FOLDERS[folder]]
    assert not crossed
