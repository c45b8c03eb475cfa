"""The record of what drift names, as JSON lines, and which of its rows a change asks for again: as verify.selftest.changed has it.

A row's key is of its mistakes, as they are carried and as the catalogue has them, and of what is withheld. The core is of what
every row rests on: drift, what it runs models by, the references, and the definition, in which drift tries its suspects.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from verify import ROOT
from verify.faults import CATALOGUE
from verify.selftest import keys, record

from .in_hf import IN_HF, Edit
from .in_stock import IN_STOCK

KEPT = Path(__file__).with_name("diagnosed.jsonl")
HF = "hf"
ROOMS = ("verify/drift", "verify/engines", "verify/core", "verify/cases")
MACHINERY = ("verify/faults/*.py", "tests/carried/compared.py", "tests/carried/diagnos*.py", "conftest.py", "constraints.txt")
TABLES = ("tests/carried/in_hf.py", "tests/carried/in_stock.py")
BEFORE = "# -- the table\n"  # what stands behind it is in the keys
SENTINELS = 12


@dataclass(frozen=True)
class Task:
    what: str
    names: tuple[str, ...]
    where: str
    dtype: str = "float32"
    without: tuple[str, ...] = ()


Identity = tuple[str, tuple[str, ...], str, str]


def identity(row: dict) -> Identity:
    return row["what"], tuple(row["names"]), row["where"], row["dtype"]


def of_task(task: Task) -> Identity:
    return task.what, task.names, task.where, task.dtype


# -- keys


def key(task: Task) -> str:
    table: Any = IN_HF if task.where == HF else IN_STOCK
    declared = [(fault.edits, fault.stage, fault.component) for fault in map(CATALOGUE.__getitem__, task.names)]
    return keys.digest([repr(task), repr(declared), *(carried_text(table[name]) for name in task.names)])


def carried_text(carried: Any) -> str:
    changes = getattr(carried, "changes", None)
    if changes is None:
        return repr(carried)
    texts = [tuple(c) if isinstance(c, Edit) else (c.where, c.attribute, text_of(c.value)) for c in changes]
    return repr((carried.name, carried.case, carried.length, texts))


def text_of(value: Callable) -> str:
    """What was written for a function, or for the lambdas that begin on its line: the same in every version of Python."""
    if isinstance(value, partial):
        return repr((text_of(value.func), value.args, value.keywords))
    code = inspect.unwrap(value).__code__
    text = Path(code.co_filename).read_text(encoding="utf-8")
    begin_there = [node for node in functions_in(text) if node.lineno == code.co_firstlineno]
    assert begin_there, f"{value}: no function begins in line {code.co_firstlineno} of {code.co_filename}"
    return "\n".join(ast.get_source_segment(text, node) or "" for node in begin_there)


@cache
def functions_in(text: str) -> list[ast.Lambda | ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Lambda, ast.FunctionDef))]


@cache
def core() -> str:
    machinery = (file for pattern in MACHINERY for file in sorted(ROOT.glob(pattern)))
    rooms = (file for room in ROOMS for file in keys.files(room))
    every = [*rooms, *machinery, *keys.references(), *keys.definition().values()]
    before = [(ROOT / table).read_text(encoding="utf-8").partition(BEFORE) for table in TABLES]
    return keys.digest([*map(keys.named_code, every), *(keys.code_of(text) for text, _, _ in before)])


# -- the file


def as_lines(full: str, rows: Sequence[dict]) -> str:
    return record.lines({"full": full}, rows)


def read() -> tuple[str, list[dict]]:
    """(the core of its full run, rows)."""
    header, rows = record.parse(KEPT.read_text(encoding="utf-8"))
    return header["full"], rows


# -- what is to be diagnosed again


def stale(tasks: Sequence[Task], rows: Sequence[dict]) -> list[Task]:
    """Those that the record does not have, or has of other mistakes."""
    kept = {identity(row): row["key"] for row in rows}
    return [task for task in tasks if kept.get(of_task(task)) != key(task)]


def due(tasks: Sequence[Task], full: str, rows: Sequence[dict], keep: bool) -> dict[Task, str]:
    """{task: why}: stale rows; where nothing is kept, those that were diagnosed since the full run; sentinels where the core
    differs."""
    since = {identity(row) for row in rows if "since" in row}
    chosen = {} if full == core() else dict.fromkeys(tasks[:: -(-len(tasks) // SENTINELS)], "sentinels, of a core that changed")
    chosen |= {task: "kept since the full run" for task in tasks if of_task(task) in since and not keep}
    chosen |= dict.fromkeys(stale(tasks, rows), "of changed mistakes")
    return {task: chosen[task] for task in tasks if task in chosen}


def differences(rows: Sequence[dict], found: Sequence[dict]) -> list[str]:
    """What was right on record, and is no longer; of the same mistakes, what is met elsewhere."""
    kept, lines = {identity(row): row for row in rows}, []
    for row in found:
        before = kept.get(identity(row), {})
        name = f"{row['what']} {'+'.join(row['names'])} in {row['where']}, {row['dtype']}"
        if before.get("right", True) and not row["right"]:
            lines.append(f"{name}: expected it named as the record has it, got {row['found']}")
        elif before.get("key") == row["key"] and met(before) != met(row):
            lines.append(f"{name}: expected {met(before)}, as the record has it, got {met(row)}")
    return lines


def met(row: dict) -> str:
    return row["found"] if isinstance(row["found"], str) else row["found"]["stage"]


def renewed(tasks: Sequence[Task], rows: Sequence[dict], found: Sequence[dict]) -> list[dict]:
    """The record's rows, of today's tasks, with those that were stale as they are now."""
    old = {of_task(task) for task in stale(tasks, rows)}
    each = {identity(row): row for row in rows}
    each |= {identity(row): row | {"since": core()} for row in found if identity(row) in old}
    return [each[of_task(task)] for task in tasks if of_task(task) in each]


def caption(full: str, rows: Sequence[dict]) -> str:
    since = sum("since" in row for row in rows)
    parts = [f"full run at {full}"] + ([f"{since} rows diagnosed since"] if since else [])
    return "; ".join([*parts, *(["core changed since"] if full != core() else [])])
