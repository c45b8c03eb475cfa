"""Somebody's modules, tapped where their paths are known: what they are given and what they give can be seen and replaced.

Nothing of their code is touched: each module's class is exchanged, for a while, for a subclass that calls the original.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

See = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def paths_of(model: Any) -> dict[str, Any]:
    """{path: module}, as HF's paths are, whatever the model is wrapped in. A module at two paths is seen at the first."""
    modules = dict(model.named_modules())
    wrappings = [name.removesuffix("layers.0") for name in modules if f".{name}".endswith(".layers.0")]
    prefix = min(wrappings, key=len, default="model.")
    found: dict[int, tuple[str, Any]] = {}
    for name, module in sorted(modules.items()):
        path = "lm_head" if name.rpartition(".")[2] == "lm_head" else name.removeprefix(prefix)
        if path:
            found.setdefault(id(module), (path, module))
    return dict(found.values())


@contextmanager
def tapped(model: Any, paths: Collection[str], see: See) -> Iterator[None]:
    """`see(path, call, args, kwargs)` stands in the place of each module's call. mx.compile is off: it would hide arrays."""
    mx.disable_compile()
    try:
        with exchanged({path: module for path, module in paths_of(model).items() if path in paths}, see):
            yield
    finally:
        mx.enable_compile()


@contextmanager
def exchanged(modules: Mapping[str, Any], see: See) -> Iterator[None]:
    """As `tapped`, of modules by names of one's own, and nothing else is changed."""
    own = [(module, type(module)) for module in modules.values()]
    try:
        for name, module in modules.items():
            object.__setattr__(module, "__class__", _listening(name, type(module), see))
        yield
    finally:
        for module, kind in own:
            object.__setattr__(module, "__class__", kind)


def _listening(path: str, kind: type, see: See) -> type:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return see(path, lambda *a, **k: kind.__call__(self, *a, **k), args, kwargs)

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
