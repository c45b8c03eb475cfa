"""Somebody else's MLX code of this architecture: found, imported, and loaded on a checkpoint as mlx-lm would load it.

What is asked of it is mlx-lm's contract: the module exports `ModelArgs` (with `from_dict`) and a model class.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from glm_dsa.errors import printable

from .. import FOLDER
from ..core import stages

FILES_PACKAGE = "mlx_lm.models"  # what a file's relative imports are relative to, as if it lay in mlx-lm
MISSING = re.compile(r"Missing \d+ parameters?: *\n?(.*)", re.DOTALL)
OUTCOMES = (pytest.skip.Exception, pytest.fail.Exception, pytest.exit.Exception)  # would end tests in its own favour
INDEXER = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.indexer\.")


class Failed(Exception):
    """What somebody's code did instead of its work, told in one line."""


@dataclass(frozen=True)
class Implementation:
    """`--implementation MODULE[:Class]`."""

    text: str
    model: type
    args: type

    @classmethod
    def of(cls, text: str, option: str = "--implementation ") -> Implementation:
        """Imports it. Raises ValueError, in one line that begins with `option`, where there is nothing to judge."""
        source, _, name = text.partition(":")
        is_file = source.endswith(".py")
        try:
            import mlx_lm.utils  # noqa: F401
        except ModuleNotFoundError:
            raise ValueError(
                f"{option}{printable(text)}: expected mlx-lm, which loads the model: pip install mlx-lm"
            ) from None
        if not source:
            raise ValueError(
                f"{option or 'implementation'}: expected MODULE or FILE.py, with :Class behind it where the class is not Model"
            )
        if is_file and not Path(source).is_file():
            raise ValueError(f"{option}{printable(text)}: no such file")
        try:
            with others_code():
                module = _import_file(Path(source)) if is_file else importlib.import_module(source)
        except Failed as error:
            why = error.__cause__
            if isinstance(why, ModuleNotFoundError) and not is_file and f"{source}.".startswith(f"{why.name}."):
                raise ValueError(
                    f"{option}{printable(text)}: no module of that name; expected MODULE or FILE.py, with :Class "
                    "behind it where the class is not Model"
                ) from None
            raise ValueError(f"{option}{printable(text)}: its import raises {error}") from None
        for due in (name or "Model", "ModelArgs"):
            if not isinstance(getattr(module, due, None), type):
                raise ValueError(f"{option}{printable(text)}: it has no class {due}")
        if not callable(getattr(module.ModelArgs, "from_dict", None)):
            raise ValueError(f"{option}{printable(text)}: its ModelArgs has no from_dict")
        return cls(text, getattr(module, name or "Model"), module.ModelArgs)

    def load(
        self,
        folder: Path,
        changes: Mapping[str, Any],
        shared: Iterable[int],
        dtype: mx.Dtype = mx.float32,
        lazy: bool = False,
    ) -> Any:
        """Its model on a checkpoint, in `dtype`. `changes`: config keys to replace; `shared`: layers without an indexer.
        `lazy`: weights are read as they are used.

        Raises `Failed` with the cause.
        """
        from mlx_lm.utils import load_model

        try:
            with others_code():
                model, _ = load_model(
                    folder, lazy, model_config=dict(changes), get_model_classes=lambda config: (self.model, self.args)
                )
                model.set_dtype(dtype)
                if not lazy:
                    mx.eval(model.parameters())
        except Failed as error:
            raise Failed(_why_not_loaded(error, set(shared))) from None
        return model


def _import_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"{FILES_PACKAGE}.{path.stem}_on_trial", path)
    assert spec is not None  # nor is its loader, for any name that ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their module up
    sys.path.insert(0, str(path.resolve().parent))
    importlib.import_module(FILES_PACKAGE)
    spec.loader.exec_module(module)
    return module


@contextmanager
def others_code() -> Iterator[None]:
    """Whatever it raises, down to SystemExit, comes out as `Failed`, with the error as its cause. Its warnings are its own."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Failed:
        raise
    except (Exception, SystemExit, GeneratorExit, *OUTCOMES) as error:
        raise Failed(told(error)) from error


def told(error: BaseException) -> str:
    """Type, message and place of an error: one line."""
    message = " ".join(str(error).split())
    passed_by = (FOLDER, Path(mx.__file__).parent)  # and whatever lies in folders inside them
    every = traceback.extract_tb(error.__traceback__)
    frames = [
        f for f in every
        if not f.filename.startswith("<") and not any(Path(f.filename).is_relative_to(folder) for folder in passed_by)
    ]  # fmt: skip
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    if isinstance(error, SyntaxError):  # says where by itself
        place = ""
    return printable(f"{type(error).__name__}: {message[:300]}{place}")


def _why_not_loaded(error: Failed, shared: set[int]) -> str:
    cause = error.__cause__
    if isinstance(cause, TypeError) and (keys := re.search(r"missing \d+ required .*?arguments?: (.*)", str(cause))):
        return printable(f"its ModelArgs asks for keys that config.json has not: {keys[1]}")
    if not isinstance(cause, ValueError) or not (match := MISSING.match(str(cause))):
        return str(error)
    names = [name.strip(" ,") for name in match[1].splitlines() if name.strip(" ,.")]
    layers = {int(found[1]) for name in names if (found := INDEXER.search(name))}
    if layers and layers <= shared:
        text = f"IndexShare not implemented: it expects indexer tensors on shared layers {stages.compact(layers)}"
        others = [name for name in names if not INDEXER.search(name)]
        return f"{text}, of which the checkpoint has none" + (f"; and {others[0]}, ..." if others else "")
    return printable(f"it expects tensors that the checkpoint has not: {', '.join(names[:4])}")
