"""Logits of a side on windows of a text, a few positions at a time: [n, vocabulary] of a large one is big enough.

This definition goes a layer at a time through all windows: each layer is read once, and one is in memory. HF, the equations and
somebody's code are run on each window as `drift` runs them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from glm_dsa import memory
from glm_dsa.cache import LayerCache
from glm_dsa.store import KvQuantization

from ..engines import base
from ..engines.definition_streamed import OurLayers
from ..engines.recording import Hearing, Recording
from ..engines.registry import engine_of
from ..engines.spec import OURS, Side

Array = np.ndarray
Tell = Callable[[str], None]


class Run(ABC):
    """Of one side, on all windows (int [S] each)."""

    @abstractmethod
    def logits(self, window: int, rows: slice) -> Array:
        """float32 [rows, vocabulary]."""


def run_of(side: Side, windows: Sequence[Array], tell: Tell) -> Run:
    return RUNS.get(side.implementation, OtherRun)(side, windows, tell)


class OurRun(Run):
    def __init__(self, side: Side, windows: Sequence[Array], tell: Tell) -> None:
        self.layers = OurLayers(side.folder, base.MX[side.dtype], **side.overrides)
        model = self.layers.model
        model.drop_mtp()
        memory.check(
            f"{side.checkpoint}: weights"
            if side.is_small
            else f"{side.checkpoint}: weights of a layer, in {side.dtype},",
            memory.taken(model) if side.is_small else max(map(memory.taken, model.model.layers)),
            "dtype=bfloat16 takes half of float32",
        )
        self.quantization = _quantization(side)
        if side.is_small:
            model.set_dtype(self.layers.dtype)  # scales too: an embedding is unpacked in their dtype
            hidden = [model.model.embed_tokens(mx.array(w[None])) for w in windows]
        else:
            hidden = [self.layers.embed(w[None]) for w in windows]
        self._through(hidden, tell)
        self.head = model.logits if side.is_small else self.layers.head_of(slice(0, side.args.vocab_size))

    def _through(self, hidden: list[mx.array], tell: Tell) -> None:
        backbone = self.layers.model.model
        selections: list[mx.array | None] = [None] * len(hidden)
        for index, layer in enumerate(backbone.layers):
            for i, x in enumerate(hidden):
                tell(f"layer {index + 1} of {len(backbone.layers)}, window {i + 1} of {len(hidden)}")
                cache = None
                if self.quantization is not None:
                    cache = LayerCache(self.layers.model._widths(layer), self.quantization)
                rotation, mask = backbone.rotation_and_mask(x.shape[1], cache)
                hidden[i], selections[i] = layer(x, rotation, mask, cache, selections[i])
                mx.eval(hidden[i], *([] if selections[i] is None else [selections[i]]))
            base.let_go(layer)
        self.hidden = [backbone.norm(x) for x in hidden]
        mx.eval(self.hidden)

    def logits(self, window: int, rows: slice) -> Array:
        return np.array(self.head(self.hidden[window][:, rows])[0].astype(mx.float32))


class OtherRun(Run):
    """The last window's logits are kept: they are asked for in order."""

    def __init__(self, side: Side, windows: Sequence[Array], tell: Tell) -> None:
        self.engine, self.windows, self.tell = engine_of(side), windows, tell
        self.last: tuple[int, Array] | None = None

    def logits(self, window: int, rows: slice) -> Array:
        if self.last is None or self.last[0] != window:
            self.tell(f"window {window + 1} of {len(self.windows)}")
            into, tokens = Recording(), self.windows[window]
            hearing = Hearing(into, keeps=lambda stage: stage == "logits")
            self.last = None
            base.run(self.engine, tokens[None], np.arange(len(tokens)), hearing)
            found = into.get("logits")
            if found is None:
                raise ValueError(f"{self.engine.side.text}: it gives no logits [tokens, vocabulary]")
            self.last = window, np.asarray(found, dtype=np.float32)
        return self.last[1][rows]


RUNS: dict[str, Callable[[Side, Sequence[Array], Tell], Run]] = {OURS: OurRun}


def _quantization(side: Side) -> KvQuantization | None:
    options: Any = side.options
    return KvQuantization(options["kv_bits"], options.get("kv_group_size", 64)) if "kv_bits" in options else None
