"""Mistakes made on purpose in a running definition: one function's source, with a few words changed, is put in its place.

A change is a line of a diff, so that a reader sees the mistake itself; where the words are no longer there, it says so.
"""

from __future__ import annotations
import __future__

import ast
import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import CodeType, FunctionType
from typing import Any

PACKAGE = "glm_dsa"


@dataclass(frozen=True)
class Edit:
    """In the function `where` ("indexer.Indexer.score", a property too), `due` stands once; `wrong` comes in its place."""

    where: str
    due: str
    wrong: str

    def __str__(self) -> str:
        return f"{self.where}: `{self.due}` -> `{self.wrong}`"


@contextmanager
def edited(edits: Iterable[Edit]) -> Iterator[None]:
    """The definition with these edits, for everyone in this process who calls it, until the block ends.

    A model that was built before keeps what its constructor did. Raises LookupError where `due` does not stand once, or
    where nothing that runs is changed.
    """
    changed: dict[FunctionType, str] = {}
    for edit in edits:
        function = find(edit.where)
        source = changed.get(function) or source_of(function)
        if source.count(edit.due) != 1:
            raise LookupError(f"{edit.where}: {edit.due!r} stands there {source.count(edit.due)} times, expected once")
        changed[function] = source.replace(edit.due, edit.wrong)
    codes = {function: compiled(ast.parse(source), function) for function, source in changed.items()}
    for function, code in codes.items():
        if runs_alike(code, compiled(ast.parse(source_of(function)), function)):
            raise LookupError(f"{function.__qualname__}: the change is outside of what runs (a default, a decorator)")
    with swapped(codes):
        yield


@contextmanager
def swapped(codes: dict[FunctionType, CodeType]) -> Iterator[None]:
    """Other code in the place of a function's own: whoever holds the function runs it."""
    own = {function: function.__code__ for function in codes}
    try:
        for function, code in codes.items():
            function.__code__ = code
        yield
    finally:
        for function, code in own.items():
            function.__code__ = code


def find(where: str) -> FunctionType:
    """The function behind "module.name", "module.Class.method", a property's getter, or its setter ("...state.fset")."""
    module, *names = where.split(".")
    found: Any = importlib.import_module(f"{PACKAGE}.{module}")
    for name in names:
        found = found.fset if name == "fset" and isinstance(found, property) else inspect.getattr_static(found, name)
    return unwrapped(found)


def unwrapped(found: Any) -> FunctionType:
    if isinstance(found, property):
        found = found.fget
    elif isinstance(found, (classmethod, staticmethod)):
        found = found.__func__
    return inspect.unwrap(found)


@cache
def source_of(function: FunctionType) -> str:
    """Read once, while the code is still the file's."""
    return textwrap.dedent(inspect.getsource(function))


def text_of(module: Any) -> str:
    return inspect.getsource(module)


def compiled(tree: ast.Module, function: FunctionType) -> CodeType:
    """The code of a function whose definition is `tree`. It stands in a class, so that `super()` finds its cell."""
    definition: Any = tree.body[0]
    definition.decorator_list = []
    tree.body = [ast.ClassDef(name="_", bases=[], keywords=[], body=[definition], decorator_list=[])]
    ast.fix_missing_locations(tree)
    flags = __future__.annotations.compiler_flag
    module = compile(tree, function.__code__.co_filename, "exec", flags=flags, dont_inherit=True)
    code = inner(inner(module, "_"), function.__name__)
    if code.co_freevars != function.__code__.co_freevars:
        raise LookupError(f"{function.__qualname__}: closes over other names when it is changed")
    return code


def runs_alike(a: CodeType, b: CodeType) -> bool:
    """Whether two codes do the same, wherever their lines stand."""
    parts = [(code.co_code, code.co_names, code.co_varnames, len(code.co_consts)) for code in (a, b)]
    return parts[0] == parts[1] and all(
        runs_alike(x, y) if isinstance(x, CodeType) and isinstance(y, CodeType) else (type(x), x) == (type(y), y)
        for x, y in zip(a.co_consts, b.co_consts, strict=True)
    )


def inner(code: CodeType, name: str) -> CodeType:
    return next(c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name)


def functions_of(module: Any) -> Iterator[tuple[str, FunctionType]]:
    """("Class.method", function) of all that a module defines itself, properties included."""

    def own(holder: Any, prefix: str) -> Iterator[tuple[str, FunctionType]]:
        for name, value in vars(holder).items():
            parts: list[tuple[str, Callable | None]] = [(name, value)]
            if isinstance(value, property):
                parts = [(name, value.fget), (f"{name}.fset", value.fset)]
            elif isinstance(value, type) and value.__module__ == module.__name__ and value.__qualname__ == name:
                yield from own(value, f"{name}.")
                continue
            for label, part in parts:
                if callable(part) or isinstance(part, (classmethod, staticmethod)):
                    function = unwrapped(part)
                    written_here = isinstance(function, FunctionType) and function.__module__ == module.__name__
                    if written_here and function.__code__.co_filename == module.__file__:
                        yield prefix + label, function

    yield from own(module, "")
