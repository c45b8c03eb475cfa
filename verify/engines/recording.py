"""What a run leaves behind: its stages, in memory or on disk, and which of them another run's are to take the place of.

A stage is noted as the run computed it, before anything is put in its place. Arrays are of one prompt, without the batch axis:
values [S, W], scores [S, T], choices int [S, K] (None: every key), routing weights by expert [S, E].
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..core import stages

Array = np.ndarray
HIDDEN = ("embed", "output", "norm")  # what the next layer (or the head) is given


class Recording(Mapping[str, Any]):
    """{stage: array or None}. With a folder, arrays lie there and are read as they are asked for: a large model's do not fit."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._held: dict[str, Any] = {}
        self.handed: set[str] = set()  # stages whose values the run was handed, and went on with
        self.absent: dict[str, Array] = {}  # of values by expert [S, E]: numbers of experts that the run's side has not
        if folder is not None:
            folder.mkdir(parents=True)

    def drop(self) -> None:
        """What lies on disk."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._held.clear()

    def put(self, stage: str, value: Array | None) -> None:
        if self.folder is None or value is None:
            self._held[stage] = value
            return
        np.save(self.folder / f"{stage}.npy", value)
        self._held[stage] = self.folder / f"{stage}.npy"

    def __getitem__(self, stage: str) -> Array | None:
        held = self._held[stage]
        return np.load(held) if isinstance(held, Path) else held

    def __iter__(self) -> Iterator[str]:
        return iter(stages.in_order(self._held))

    def __len__(self) -> int:
        return len(self._held)


class Hearing:
    """A run's other end: `note` keeps what it computes; `due` says what it is to go on with in its place: the reference's
    values at the stages that are `wanted` (None: its own). keeps: what is noted at all."""

    def __init__(
        self,
        into: Recording,
        reference: Recording | None = None,
        wanted: Callable[[str], bool] = lambda stage: False,
        keeps: Callable[[str], bool] = lambda stage: True,
    ) -> None:
        self.into, self.reference, self.wanted, self.keeps = into, reference, wanted, keeps
        # of tokens whose experts are handed in, the weights too: as it must be where only the chosen ones' can be seen
        self.hands_weights = False

    def note(self, stage: str, value: Array | None) -> None:
        if self.keeps(stage):
            self.into.put(stage, value)

    def due(self, stage: str) -> Array | None:
        found = self.other(stage) if self.wanted(stage) else None
        if found is not None:
            self.into.handed.add(stage)
        return found

    def other(self, stage: str) -> Array | None:
        """The reference's, whether wanted or not."""
        return None if self.reference is None else self.reference.get(stage)


class Enough(Exception):
    """Raised out of a run by whoever listens and has heard what he wanted."""


def is_given(stage: str, is_sparse: bool) -> bool:
    """What a layer is handed where its errors are to be its own: the input, and the choices that it goes on under."""
    kind = stages.kind(stage)
    return kind in HIDDEN or kind == stages.ROUTING or (is_sparse and kind == "self_attn.indexer.topk")
