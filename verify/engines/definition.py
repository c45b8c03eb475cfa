"""What is on trial. Today: `glm_dsa` on a checkpoint, whole, one layer, or from a cache.

The only place where mlx arrays become numpy ones.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, overload

import mlx.core as mx
import numpy as np

import glm_dsa
from glm_dsa import tiles, trace

Stages = dict[str, Any]


@overload
def to_numpy(array: mx.array) -> np.ndarray: ...
@overload
def to_numpy(array: mx.array | None) -> np.ndarray | None: ...
def to_numpy(array: mx.array | None) -> np.ndarray | None:
    if array is None:
        return None
    return np.array(array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array)


class Ours:
    """Our definition, in float32, on a checkpoint folder."""

    def __init__(self, folder: str | Path, **overrides: Any) -> None:
        self.model = glm_dsa.load(folder, dtype=mx.float32, **overrides)

    @property
    def args(self) -> glm_dsa.ModelArgs:
        return self.model.args

    def forward(
        self,
        tokens: np.ndarray,
        cache: Any = None,
        replace: Mapping[str, np.ndarray] | None = None,
        only: Container[str] | None = None,
    ) -> Stages:
        """Runs int [B, S]; returns the stages seen. `replace` injects indices (selections, routings) by stage. `only`: the last
        names of the stages that are heard; where scores are not, the indexer works in tiles as it does for users."""
        with self.captured(replace, only) as seen:
            self.model(mx.array(tokens), cache)
        return {stage: to_numpy(value) for stage, value in seen.items()}

    def layer(
        self,
        index: int,
        x: np.ndarray,
        selection: np.ndarray | None = None,
        replace: Mapping[str, np.ndarray] | None = None,
    ) -> Stages:
        """One decoder layer on x [B, S, hidden]; a shared layer is handed the selection of the layer below."""
        rotation, mask = self.model.model.rotation_and_mask(x.shape[1], None)
        with self.captured(replace) as seen:
            handed = None if selection is None else mx.array(selection)
            self.model.model.layers[index](mx.array(x), rotation, mask, None, handed)
        return {stage: to_numpy(value) for stage, value in seen.items()}

    def captured(self, replace: Mapping[str, np.ndarray] | None = None, only: Container[str] | None = None) -> Any:
        return trace.capture(self.model, {k: mx.array(v) for k, v in (replace or {}).items()}, only)


def in_tiles_of(monkeypatch: Any, elements: int) -> None:
    """From now on our definition works on so many values at a time, whatever it runs on."""
    for device in tiles.ELEMENTS:
        monkeypatch.setitem(tiles.ELEMENTS, device, elements)
