"""mlx-lm's loading of a model: what it cannot read is named, what it takes is told first."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import foreign, memory
from ..checkpoint import add_mtp, assemble, read_headers
from ..config import HEADS_ALONE, MODEL_TYPES, ModelArgs
from ..config_reader import read_json
from ..errors import CheckpointError, ConfigError
from ..model import Model
from ..storage import stored_headers
from .attachment import MODEL_FILE, is_attached

log = logging.getLogger("glm_dsa")


def load_config(original: Callable[[Path], dict[str, Any]], model_path: Path) -> dict[str, Any]:
    """What `attach` wrote leads here: no code of the checkpoint's need be trusted to come back to it."""
    try:
        config = original(model_path)
    except (OSError, ValueError, TypeError):
        foreign.refuse_folder(Path(model_path))
        read_json(Path(model_path) / "config.json")  # names the file, where it is that
        raise
    if is_attached(config, Path(model_path)):
        del config["model_file"]
    return config


def load_model(original: Callable[..., Any], model_path: Path, lazy: bool = False, **kwargs: Any) -> Any:
    """What mlx-lm cannot read is named, an MTP head elsewhere is added; what the model takes is told before its weights are
    read, and one that cannot fit is refused."""
    try:
        if kwargs.get("strict", True):  # else a hub's, whose weights may come later (`sharded_load`)
            check_headers(Path(model_path))
        model, config = original(model_path, lazy=True, **kwargs)
    except (RuntimeError, ValueError, OSError) as error:
        foreign.refuse_folder(Path(model_path))
        _name_what_does_not_fit(Path(model_path), error)
        for name, tensor in stored_headers(Path(model_path)).items() if isinstance(error, RuntimeError) else ():
            if tensor.dtype == "F64":
                raise CheckpointError(
                    f"{tensor.file}: {name} is F64: expected F32, BF16 or F16, all that mlx-lm's loader reads; cast it first "
                    "(glm_dsa.load reads it)"
                ) from None
        raise
    if isinstance(model, Model) and add_mtp(model, Path(model_path)):
        log.info("MTP layer: read from a file beside those that mlx-lm reads")
    if isinstance(model, Model) and lazy:
        log.info("%s: weights take %s; they are read as they are needed", model_path, memory.gib(memory.taken(model)))
    elif isinstance(model, Model):
        memory.check_model(str(model_path), model)
    if not lazy:
        mx.eval(model.parameters())
    return model, config


def sharded_load(original: Callable[..., Any], repo: str, *args: Any, **kwargs: Any) -> Any:
    """mlx-lm then takes whatever weights there are; what a folder lacks would be random."""
    if Path(repo).is_dir():
        check_headers(Path(repo))
    return original(repo, *args, **kwargs)


def check_headers(folder: Path) -> None:
    """What headers tell of a folder that this definition is to run: a shard that is missing is named before any is read.

    Raises `ConfigError` or `CheckpointError`.
    """
    if _is_for_ours(folder):
        read_headers(folder, ModelArgs.from_file(folder))


def _is_for_ours(folder: Path) -> bool:
    """A draft model may be of another kind, and somebody's own code may read names of its own."""
    try:
        config = read_json(folder / "config.json")
    except ConfigError:  # mlx-lm meets it too
        return False
    kind = config.get("model_type")
    is_of_others = isinstance(kind, str) and kind not in (*MODEL_TYPES, *HEADS_ALONE)
    return not is_of_others and config.get("model_file") in (None, MODEL_FILE)


def _name_what_does_not_fit(folder: Path, error: Exception) -> None:
    """mlx-lm lists every tensor that is too many or too few, and no file."""
    what, *rest = str(error).split(": \n")
    if not rest:
        return
    if _is_for_ours(folder):
        assemble(folder)
        return
    known = ", ".join(map(repr, MODEL_TYPES))
    raise CheckpointError(
        f"{folder / 'config.json'}: model_type = {read_json(folder / 'config.json')['model_type']!r}, and mlx-lm's definition of "
        f"that does not fit these tensors ({what}); this definition's are {known}: does config.json belong to these weights?"
    ) from None
