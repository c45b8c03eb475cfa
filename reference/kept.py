"""The two checkpoints that this repository keeps, trained by reference/training/train.py, and what is asked of them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from .training.card import MEASURED
from .training.measure import digests

TRAINED = Path(__file__).parent / "trained"


@cache
def check_kept(folder: Path) -> None:
    """Raises ValueError where a kept checkpoint is not what its card was written for."""
    try:
        due, found = _read(folder / MEASURED)["sha256"], digests(folder)
        wrong = [file for file in {**due, **found} if due.get(file) != found.get(file)]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: not as this repository keeps it ({error}); check it out again") from None
    if wrong:
        raise ValueError(
            f"{folder / wrong[0]}: not the file of the model card (SHA-256), or not there; check it out again"
        )


@cache
def probes() -> dict[str, Any]:
    """Texts, and needles ({prompt, value}), for the trained checkpoints. Raises ValueError."""
    file = TRAINED / "probes.json"
    found = _read(file)
    texts, needles = found.get("texts"), found.get("needles", [])
    if not _all_of(texts, str) or not _all_of(needles, dict) or any(set(n) != {"prompt", "value"} for n in needles):
        raise ValueError(f"{file}: not as this repository keeps it; check it out again")
    if not _all_of([text for needle in needles for text in needle.values()], str):
        raise ValueError(f"{file}: expected needles of texts, got others; check it out again")
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not as this repository keeps it ({error}); check it out again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: not as this repository keeps it; check it out again")
    return value


def _all_of(values: Any, kind: type) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(v, kind) and v for v in values)
