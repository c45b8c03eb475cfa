"""`attach`: the file in a checkpoint's folder by which any mlx-lm loads it with this definition."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from ..checkpoint import assemble
from ..errors import CheckpointError

MODEL_FILE = "glm_dsa_model.py"
MODEL_FILE_TEXT = '''\
"""Written by `python -m glm_dsa attach`: mlx-lm runs it when it loads this model with trust_remote_code=True."""

try:
    from glm_dsa.mlx_lm import Model, ModelArgs, register
except ImportError as error:
    raise ImportError("this model runs on glm-dsa, with mlx-lm: pip install 'glm-dsa[mlx-lm]'") from error

register()
'''


def attach(folder: str | Path, force: bool = False) -> Path:
    """Writes a `model_file` into a checkpoint folder, and its name into config.json: with trust_remote_code, any mlx-lm
    then loads this checkpoint with this definition. Returns the file. Repeating it is harmless.

    Raises `CheckpointError`, having changed nothing, where the folder holds none of our models, or names another file.
    """
    folder = Path(folder)
    config_file = folder / "config.json"
    assemble(folder)  # or refuses it
    config = json.loads(config_file.read_text(encoding="utf-8"))  # as it stands: read_json makes floats of what JSON has none for
    known = config.get("model_file")
    if known not in (None, MODEL_FILE) and not force:
        raise CheckpointError(
            f"{config_file}: model_file is {known!r} already; --force puts {MODEL_FILE!r} in its place"
        )
    target = folder / MODEL_FILE
    is_new = not target.exists()
    if not is_new and not target.is_file():
        raise CheckpointError(f"{target}: is there already, and no file")
    if not is_new and target.read_bytes() != MODEL_FILE_TEXT.encode() and not force:
        raise CheckpointError(f"{target}: is there already, and not what would be written; --force overwrites it")
    _replace(target, MODEL_FILE_TEXT)
    try:
        if known != MODEL_FILE:
            _replace(config_file, json.dumps(config | {"model_file": MODEL_FILE}, indent=2, ensure_ascii=False) + "\n")
    except CheckpointError:
        if is_new:
            target.unlink()
        raise
    return target


def is_attached(config: dict[str, Any], folder: Path) -> bool:
    """Whether a folder's model_file is the one that `attach` writes, unchanged."""
    file = folder / MODEL_FILE
    return config.get("model_file") == MODEL_FILE and file.is_file() and file.read_bytes() == MODEL_FILE_TEXT.encode()


def _replace(file: Path, text: str) -> None:
    """All of it, or none."""
    new = None
    try:
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}.", delete=False) as new:
            new.write(text.encode())
        os.chmod(new.name, file.stat().st_mode & 0o777 if file.exists() else 0o644)
        os.replace(new.name, file)
    except (OSError, UnicodeError) as error:
        if new is not None:
            Path(new.name).unlink(missing_ok=True)
        raise CheckpointError(f"{file}: cannot be written: {getattr(error, 'strerror', None) or error}") from None
