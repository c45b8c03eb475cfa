"""What a row of a record rests on, as digests: where one differs, what was found is no longer known to hold.

A row's *key* is of what that row alone rests on: its fault's edits, the modules of the definition that they change, its claim's
files. The *core* is of what every row rests on: how models are run, compared, seeded and judged, the references, the definition's
modules that no fault changes, and the packages' versions. Comments and docstrings decide nothing, and are left out.
"""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from .. import ROOT, faults
from ..faults import Fault, coverage
from ..gate import plugin

ROOMS = ("verify/core", "verify/engines", "verify/cases", "verify/gate")
MACHINERY = ("verify/faults/*.py", "verify/conftest.py", "verify/selftest/judging.py", "conftest.py", "constraints.txt")
TRAINING = "train"  # how those of reference/ begin that made the kept checkpoints: nothing that is judged runs them
LENGTH = 12


def key(fault: Fault) -> str:
    """Of one row: where it differs, that fault is to be judged again."""
    changed = [definition()[module] for module in sorted(modules(fault))]
    return digest([repr(fault.edits), *map(named_code, changed), *map(named_code, claim_files(fault))])


def modules(fault: Fault) -> set[str]:
    """The definition's modules that a fault changes."""
    return {edit.where.split(".")[0] for edit in fault.edits}


def claim_files(fault: Fault) -> list[Path]:
    """Of the claim that is to meet it. What no claim is to meet is asked of those that meet other changes of the same functions."""
    changed = {edit.where for edit in fault.edits}
    claims = {fault.claim} & set(plugin.all_claims()) or {
        other.claim for other in faults.CATALOGUE.values() if changed & {edit.where for edit in other.edits}
    }
    return sorted(plugin.CLAIMS / name for claim in claims for name in plugin.files_of(claim))


@cache
def core() -> str:
    """Of the whole record: where it differs, sentinels are judged, and only a full run renews it."""
    changed = {module for fault in faults.CATALOGUE.values() for module in modules(fault)}
    never = (file for name, file in definition().items() if name not in changed)
    helpers = (file for file in plugin.CLAIMS.glob("*.py") if not file.name.startswith("test_"))
    machinery = (file for pattern in MACHINERY for file in sorted(ROOT.glob(pattern)))
    every = [*(file for room in ROOMS for file in files(room)), *machinery, *sorted(helpers), *references(), *never]
    return digest(map(named_code, every))


def definition() -> dict[str, Path]:
    """The definition's modules by name, without what only others import."""
    return {name: Path(module.__file__) for name, module in sorted(coverage.modules().items())}


def references() -> list[Path]:
    return [
        file for file in files("reference") if not file.relative_to(ROOT / "reference").parts[0].startswith(TRAINING)
    ]


def files(folder: str) -> list[Path]:
    """Every Python file of a folder and of those within it."""
    return sorted((ROOT / folder).rglob("*.py"))


def digest(texts: Iterable[str]) -> str:
    found = hashlib.sha256()
    for text in texts:
        found.update(f"{len(text)} {text}".encode())
    return found.hexdigest()[:LENGTH]


@cache
def named_code(file: Path) -> str:
    """A file's place, and what of its text runs."""
    text = file.read_text(encoding="utf-8")
    return f"{file.relative_to(ROOT)}\n{code_of(text) if file.suffix == '.py' else text}"


def code_of(text: str) -> str:
    """Python source without its comments, docstrings and empty lines."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if first is not None and ast.get_docstring(node) is not None:
                begin, end = first.lineno - 1, first.end_lineno or first.lineno
                before, after = lines[begin][: first.col_offset], lines[end - 1].encode()[first.end_col_offset :]
                if not before.strip() and not after.strip():  # alone on its lines
                    lines[begin:end] = [""] * (end - begin)
    return "\n".join(line.rstrip() for line in lines if line.strip())
