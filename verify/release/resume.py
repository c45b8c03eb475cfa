"""What an interrupted run needs to go on: the streams after the last finished layer, and what was said of it and those before.

One safetensors file in pytest's cache folder, replaced as a whole after each layer; no layer is computed twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..core.files import whole


class Saved:
    """`identity`: all that the run's result depends on; a state under another identity is another run's."""

    def __init__(self, folder: Path | None, identity: Any) -> None:
        text = json.dumps(identity, sort_keys=True, default=str)
        self.key = hashlib.sha256(text.encode()).hexdigest()
        self.file = None if folder is None else folder / f"{self.key[:16]}.safetensors"

    def save(self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        if self.file is None:
            return
        held, text = {n: np.ascontiguousarray(a) for n, a in arrays.items()}, json.dumps(facts)
        with whole(self.file) as part:
            save_file(held, part, {"digest": self._digest(held, text), "facts": text})

    def load(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """None where there is no state of this run, or a damaged one."""
        if self.file is None or not self.file.is_file():
            return None
        try:
            with safe_open(self.file, "numpy") as stored:
                about = stored.metadata() or {}
                arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            is_whole = about["digest"] == self._digest(arrays, about["facts"])
            return (arrays, json.loads(about["facts"])) if is_whole else None
        except (SafetensorError, OSError, KeyError, ValueError):
            return None

    def _digest(self, arrays: Mapping[str, np.ndarray], facts: str) -> str:
        """Of all that the file holds, and of whose it is."""
        digest = hashlib.sha256(f"{self.key} {facts}".encode())
        for name, array in sorted(arrays.items()):
            digest.update(f"{name} {array.dtype} {array.shape} ".encode())
            digest.update(array)  # type: ignore[arg-type]
        return digest.hexdigest()

    def drop(self) -> None:
        if self.file is not None:
            self.file.unlink(missing_ok=True)
