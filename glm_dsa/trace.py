"""Stage taps: named points inside the running model where a tensor can be seen, or replaced.

A module says `x = tap(self, "scores", x)`. When nobody listens that is one comparison. Inside `listen(model, ...)`
each tap is reported under its stage name, the module's path without the leading `model.`, then the tap's own name:
`layers.3.self_attn.indexer.scores`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

Listener = Callable[[str, Any], Any]

_listeners: list[tuple[dict[int, str], Listener, Container[str] | None]] = []


def tap(module: nn.Module, name: str, value: Any) -> Any:
    """Reports `value` (an array, or None where a selection is "all keys") as a stage; returns what to go on with."""
    if not _listeners:
        return value
    for names, listener, only in _listeners:
        path = names.get(id(module))
        if path is not None and (only is None or name in only):
            value = listener(f"{path}.{name}" if path else name, value)
    return value


def is_listening(name: str) -> bool:
    """Whether anybody hears taps of this name."""
    return any(only is None or name in only for _, _, only in _listeners)


@contextmanager
def listen(model: nn.Module, listener: Listener, only: Container[str] | None = None) -> Iterator[None]:
    """Calls `listener(stage, value)` at each tap of `model`; what it returns goes on in the model's place. `only`: names of
    taps ("topk"), the last part of a stage; None for all."""
    names = {id(m): path.removeprefix("model").removeprefix(".") for path, m in model.named_modules()}
    entry = (names, listener, only)
    _listeners.append(entry)
    try:
        yield
    finally:
        _listeners.remove(entry)


@contextmanager
def capture(
    model: nn.Module, replace: Mapping[str, Any] | None = None, only: Container[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Collects {stage: array} of what runs inside; `replace` puts given values in the place of the model's own. `only`: as
    `listen` takes it.

    A replaced stage is recorded as the model computed it, before the replacement.
    """
    stages: dict[str, Any] = {}
    replace = replace or {}

    def listener(stage: str, value: Any) -> Any:
        stages[stage] = value
        return replace.get(stage, value)

    with listen(model, listener, only):
        yield stages
    mx.eval([v for v in stages.values() if v is not None])
