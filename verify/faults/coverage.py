"""The definition's functions, and which of them run."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

import glm_dsa

from . import edits

NO_PART = ("__main__", "mlx_lm")  # the command line, and mlx-lm's hooks
RAN = "_functions_that_ran"  # the name under which a definition's module holds them


def modules(package: ModuleType = glm_dsa) -> dict[str, Any]:
    """The definition's modules by name, those of subpackages too; not what only others import (NO_PART)."""
    found: dict[str, Any] = {}
    for info in pkgutil.iter_modules(package.__path__):
        if info.name in NO_PART:  # not even imported: mlx-lm need not be installed
            continue
        found[info.name] = module = importlib.import_module(f"{package.__name__}.{info.name}")
        if info.ispkg:
            found |= {f"{info.name}.{name}": inner for name, inner in modules(module).items()}
    return found


@cache
def functions() -> dict[str, FunctionType]:
    """Every function of the definition: {"indexer.Indexer.score": function}."""
    found: dict[str, FunctionType] = {}
    for name, module in modules().items():
        found |= {f"{name}.{label}": function for label, function in edits.functions_of(module)}
    return found


@contextmanager
def recorded() -> Iterator[set[str]]:
    """The names of the definition's functions that run inside the block."""
    ran: set[str] = set()
    codes: dict[FunctionType, CodeType] = {}
    for name, function in functions().items():
        tree = ast.parse(edits.source_of(function))
        note = ast.parse(f"{RAN}.add({name!r})").body
        tree.body[0].body[:0] = note  # type: ignore[attr-defined]
        codes[function] = edits.compiled(tree, function)
        function.__globals__[RAN] = ran
    with edits.swapped(codes):
        yield ran
