"""Somebody's model and caches, called as mlx-lm calls them; and the arrays in what their modules take and give."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..core.choices import scatter
from .definition import to_numpy
from .third_party import others_code

Array = np.ndarray


def call_model(model: Any, tokens: Array, cache: Any = None) -> Any:
    """Their model on int [B, S], as mlx-lm calls it. Raises `Failed`, with what it raises."""
    with others_code():
        out = model(mx.array(tokens)) if cache is None else model(mx.array(tokens), cache=cache)
        mx.eval(*arrays(out))
    return out


def arrays(out: Any) -> list[mx.array]:
    parts = out if isinstance(out, (tuple, list)) else [out]
    return [part for part in parts if isinstance(part, mx.array)]


def first(out: Any, kind: Any) -> tuple[mx.array | None, Callable[[Any], Any]]:
    """The first array of a kind in what a call gave, and how to put another in its place."""
    if isinstance(out, mx.array) and mx.issubdtype(out.dtype, kind):
        return out, lambda new: new
    if isinstance(out, (tuple, list)):
        found = [i for i, part in enumerate(out) if isinstance(part, mx.array) and mx.issubdtype(part.dtype, kind)]
        if found:
            at = found[0]
            make = type(out)._make if hasattr(out, "_make") else type(out)  # named tuples
            return out[at], lambda new: make([*out[:at], new, *out[at + 1 :]])
    return None, lambda new: new


def with_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[mx.array], mx.array]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    array, put = first(args, mx.floating)
    if array is not None:
        return put(change(array)), kwargs
    for name, value in kwargs.items():
        if isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating):
            return args, kwargs | {name: change(value)}
    return args, kwargs


def given(args: tuple[Any, ...]) -> Array | None:
    array, _ = first(args, mx.floating)
    return to_numpy(array)


def in_place_of(array: mx.array | None, due: Array) -> mx.array:
    """HF's values or indices in the dtype of theirs, and in its shape as far as their number allows."""
    assert array is not None
    rows = (*array.shape[:-1], due.shape[-1])
    shape = next((s for s in (array.shape, rows) if math.prod(s) == due.size), due.shape)
    kind = np.int64 if due.dtype.kind in "iu" else np.float32
    return mx.array(np.ascontiguousarray(due, dtype=kind)).reshape(shape).astype(array.dtype)


@dataclass(frozen=True)
class Routing:
    """Experts and their weights in what a router gave: as many of both, in any order and shape."""

    out: Any
    experts: mx.array
    weights: mx.array

    @classmethod
    def of(cls, out: Any) -> Routing | None:
        """None where there is none that can be read."""
        experts, weights = (first(out, kind)[0] for kind in (mx.integer, mx.floating))
        if experts is None or weights is None or experts.size != weights.size:
            return None
        return cls(out, experts, weights)

    def chosen(self, *rows: int) -> Array:
        """int [*rows, k]"""
        return to_numpy(self.experts).reshape(*rows, -1)

    def by_expert(self, count: int, *rows: int) -> Array:
        """Weights of all `count` experts, [*rows, count]."""
        return scatter(to_numpy(self.weights).reshape(*rows, -1), self.chosen(*rows), count)

    def exchanged(self, due: Array, by_expert: Array) -> Any:
        """What the router gave, with experts `due` [.., k] and their weights out of [.., count] in the place of its own."""
        out = first(self.out, mx.integer)[1](in_place_of(self.experts, due))
        weights = np.take_along_axis(by_expert, due.astype(np.int64), -1)
        return first(out, mx.floating)[1](in_place_of(self.weights, weights))


def aligned(array: mx.array, shape: tuple[int, ...]) -> Array | None:
    """As [B, S, ..], where axes of one or flattened rows are all that differs; None where more does."""
    if array.shape == shape or (array.size == int(np.prod(shape)) and array.shape[-1] == shape[-1]):
        return to_numpy(array).reshape(shape)
    return None


def max_of(indices: Array) -> int:
    return int(indices.max()) if indices.size else 0


def describe(out: Any) -> str:
    if isinstance(out, mx.array):
        return f"{str(out.dtype).removeprefix('mlx.core.')} {list(out.shape)}"
    if isinstance(out, (tuple, list)):
        return f"{type(out).__name__} of {', '.join(describe(part) for part in out) or 'nothing'}"
    return "nothing (None)" if out is None else type(out).__name__


def new_cache(model: Any) -> Any:
    """As mlx-lm makes it. Raises `Failed`, with what it raises."""
    from mlx_lm.models.cache import make_prompt_cache

    with others_code():
        return make_prompt_cache(model)
