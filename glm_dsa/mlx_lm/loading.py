"""mlx-lm's loading of a model: what it cannot read is named, what it takes is told first."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import foreign, memory
from ..checkpoint import add_mtp
from ..errors import CheckpointError
from ..model import Model
from ..storage import stored_headers
from .attachment import is_attached

log = logging.getLogger("glm_dsa")


def load_config(original: Callable[[Path], dict[str, Any]], model_path: Path) -> dict[str, Any]:
    """What `attach` wrote leads here: no code of the checkpoint's need be trusted to come back to it."""
    try:
        config = original(model_path)
    except (OSError, ValueError):
        foreign.refuse_folder(Path(model_path))
        raise
    if is_attached(config, Path(model_path)):
        del config["model_file"]
    return config


def load_model(original: Callable[..., Any], model_path: Path, lazy: bool = False, **kwargs: Any) -> Any:
    """What mlx-lm cannot read is named, an MTP head elsewhere is added; what the model takes is told before its weights are
    read, and one that cannot fit is refused."""
    try:
        model, config = original(model_path, lazy=True, **kwargs)
    except (RuntimeError, ValueError, OSError) as error:
        foreign.refuse_folder(Path(model_path))
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
