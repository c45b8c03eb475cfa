"""Mutants of sizes: from some size on, a function is handed its last row, its last token or a number a little wrong.

The sizes lie within use, below the largest that are run: a batch of 9 rows, a call of 1,500 tokens, a context of 150,000, an id of
100,000. What nobody notices here would be a verdict on sizes that never ran.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import mlx.core as mx

FILES = (
    "attention", "block", "cache", "cache_checks", "indexer", "linear", "mask", "model", "moe", "mtp", "rope", "store", "tiles",
)  # fmt: skip
ROWS, CALL, CONTEXT, ID = 9, 1_500, 150_000, 100_000
SPOIL = "_from_some_size_on"

# What a parameter counts, by its name: the sizes from which on it is wrong. Others (widths, bits) have no such size.
NUMBERS = {
    "row": (ROWS,), "rows": (ROWS,), "batch": (ROWS,), "queries": (CALL,), "chosen": (CALL,), "selected": (CALL,),
    "keys": (CONTEXT,), "start": (ID,), "begin": (CALL, CONTEXT), "columns": (CALL, CONTEXT), "end": (CALL, CONTEXT),
    "front": (CALL,), "length": (CALL, CONTEXT), "spare": (CALL,), "tokens": (CALL, ID),
}  # fmt: skip
LISTS = ("left_padding", "right_padding", "rows", "chosen", "first")  # a number for each row of a batch
IDS = ("selection", "columns", "positions", "indices", "inputs", "tokens", "reuse")  # arrays of numbers, among others
HELD = (
    "keys",
    "k",
    "columns",
    "scores",
    "values",
    "words",
    "scales",
    "biases",
    "joined",
    "latent",
)  # as long as a context
HEADED = ("q_nope", "q_rope")  # [B, H, S, D]: tokens are the third axis


@dataclass(frozen=True)
class Kind:
    """axis: of an array, what is counted along it; "": a number, or the numbers in an array. size: from which on."""

    parameter: str
    axis: int | None
    size: int

    def __str__(self) -> str:
        what = {0: "rows", None: "a value"}.get(self.axis, "tokens")
        return f"{self.parameter}: wrong from {what} of {self.size:,} on"


def kinds(source: str) -> Iterator[tuple[int, Kind]]:
    """(line, kind), one for each parameter of a function and each size from which on it may be wrong."""
    function: Any = ast.parse(source).body[0]
    every = function.args
    for argument in (*every.posonlyargs, *every.args, *every.kwonlyargs, *([every.vararg] if every.vararg else [])):
        annotation = "" if argument.annotation is None else ast.unparse(argument.annotation)
        for axis, size in _sizes(argument.arg, annotation):
            yield argument.lineno, Kind(argument.arg, axis, size)


def _sizes(name: str, annotation: str) -> Iterator[tuple[int | None, int]]:
    kind = annotation.removesuffix(" | None")
    if kind == "mx.array":
        yield 0, ROWS
        yield (2 if name in HEADED else 1), CALL
        if name in HELD:
            yield (2 if name == "scores" else 1), CONTEXT
        if name in IDS:
            yield None, ID
    elif kind in ("int", "range"):
        yield from ((None, size) for size in NUMBERS.get(name, ()))
    elif name in LISTS and not kind.startswith("Iterable"):
        yield 0, ROWS


def changed(source: str, number: int) -> ast.Module:
    """A function's tree, that spoils one parameter before anything else."""
    kind = [kind for _, kind in kinds(source)][number]
    tree = ast.parse(source)
    function: Any = tree.body[0]
    call = f"{kind.parameter} = {SPOIL}({kind.parameter}, {kind.axis}, {kind.size})"
    docstring = ast.get_docstring(function) is not None
    function.body[int(docstring) : int(docstring)] = ast.parse(call).body
    return tree


def prepare(function: FunctionType) -> None:
    function.__globals__[SPOIL] = spoiled


def spoiled(value: Any, axis: int | None, size: int) -> Any:
    """From `size` on: the last along an axis is the first again; a number, or each such number of an array, is one less."""
    if isinstance(value, tuple):  # *arguments
        return tuple(spoiled(part, axis, size) for part in value)
    if isinstance(value, range):
        return value if value.stop < size else range(value.start - 1, value.stop - 1)
    if isinstance(value, int):
        return value if value < size else value - 1
    if isinstance(value, mx.array) and axis is None:
        return mx.where(value >= size, value - 1, value) if mx.issubdtype(value.dtype, mx.integer) else value
    if isinstance(value, mx.array) and axis is not None:
        axis = 0 if value.ndim == 1 else axis
        if value.ndim <= axis or value.shape[axis] < size:
            return value
        first, rest = mx.take(value, mx.array([0]), axis=axis), mx.split(value, [value.shape[axis] - 1], axis=axis)[0]
        return mx.concatenate([rest, first], axis=axis)
    if isinstance(value, (list, tuple)) and len(value) >= size:
        return [*value[:-1], value[0]]
    return value
