"""Ways of running a layer, each of which waits at its experts: HF's module, in float32, in 16 bit, on an original's weights;
the equations; the definition."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import torch

from reference.capture import capture
from reference.equations import Conventions, Equations, add_expert, causal
from reference.layers import Layers
from reference.modules import choosing

from ..core import stages
from ..engines.definition_streamed import OurExperts, OurLayers, Seen
from ..engines.pruning import Numbering

Array = np.ndarray
Weights = tuple[torch.Tensor, torch.Tensor]  # of a chunk: gate_up [n, 2 I, hidden], down [n, hidden, I]


class Hand(ABC):
    """One way of running a layer. `run` calls `wait` where its experts are due, and once more at its end."""

    asked: Any = None  # what it waits with; None: it has no experts in this layer

    def start(self, go_on: Callable[[], None]) -> None:
        self._go_on, self._waited = go_on, False
        self.run()
        self.wait()

    @abstractmethod
    def run(self) -> None: ...

    def wait(self) -> None:
        if not self._waited:
            self._waited = True
            self._go_on()

    @abstractmethod
    def take(self, first: int, weights: Weights) -> None:
        """Experts `first`, ... of the release, unpacked."""


def together(hands: Sequence[Hand], experts: Callable[[], None]) -> None:
    """Starts each hand while those before it wait; `experts` is called when all do."""

    def start(i: int) -> None:
        if i < len(hands):
            hands[i].start(lambda: start(i + 1))
        else:
            experts()

    start(0)


class HfHand(Hand):
    """HF's module. stages: what `capture` sees."""

    def __init__(self, layers: Layers, index: int, x: torch.Tensor, selection: torch.Tensor | None) -> None:
        self.layers, self.index, self.x, self.given = layers, index, x, selection
        self.stages: dict[str, Array] = {}
        self.attended: dict[str, Array] = {}  # by attention module

    def run(self) -> None:
        with self.layers.loaded(self.index, self._experts) as model, capture(model, self.attended) as self.stages:
            self.out, self.selection = self.layers.run(self.index, self.x, self.given)
            self.wait()

    def _experts(self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        self.asked, self.sum = (x, experts, weights), torch.zeros_like(x)
        self.wait()
        return self.sum

    def take(self, first: int, weights: Weights) -> None:
        self.sum += self.layers.chunk(first, *weights)(*self.asked)


class HalfHand(HfHand):
    """HF's module in bfloat16, on HF's input and under its choices: what 16 bit explains."""

    def __init__(self, layers: Layers, hf: HfHand) -> None:
        super().__init__(layers, hf.index, hf.x.bfloat16(), hf.given)
        self.hf = hf

    def run(self) -> None:
        with (
            self.layers.loaded(self.index, self._experts) as model,
            choosing(model, {s.removesuffix(".topk"): v for s, v in self.hf.stages.items() if s.endswith(".topk")}),
            capture(model) as self.stages,
        ):
            self.out, self.selection = self.layers.run(self.index, self.x, self.given)
            self.wait()

    def take(self, first: int, weights: Weights) -> None:
        super().take(first, (weights[0].bfloat16(), weights[1].bfloat16()))


class OriginalHand(HfHand):
    """HF's module on an original's weights: it reads its own experts, and shows them beside the release's. It goes by the
    release's numbers, those that the release dropped behind them."""

    def __init__(
        self, *args: Any, numbering: Numbering, beside: Callable[[int, Weights | None, Weights], None]
    ) -> None:
        super().__init__(*args)
        self.numbering, self.beside = numbering, beside
        self.places = torch.from_numpy(numbering.places)

    def _experts(self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return super()._experts(x, self.places[experts], weights)

    def take(self, first: int, weights: Weights) -> None:
        self._take(first, len(weights[1]), weights)

    def take_dropped(self, chunk: int) -> None:
        """Those that only the original has, so many at once."""
        every = len(self.numbering.order)
        for first in range(self.numbering.count, every, chunk):
            self._take(first, min(chunk, every - first), None)

    def _take(self, first: int, count: int, weights: Weights | None) -> None:
        own = self.layers.some_experts(self.index, self.numbering.order[first : first + count].tolist())
        self.beside(first, weights, own)
        super().take(first, own)


class _Waiting(Equations):
    """The equations, whose experts are somebody else's to run."""

    routed_by: Callable[[Array, Array, Array], Array]

    def routed(self, layer: int, x: Array, experts: Array, weights: Array) -> Array:
        return self.routed_by(x, experts, weights)


class TruthHand(Hand):
    """The equations on HF's input, under its choices, in float64."""

    def __init__(self, hf: HfHand, conventions: Conventions) -> None:
        self.hf, self.conventions = hf, conventions

    def run(self) -> None:
        hf, read = self.hf, self.hf.layers.read
        own = _Waiting(
            hf.layers.config, lambda name: read(name, torch.float32).double().numpy(), self.conventions,
            {s: v for s, v in hf.stages.items() if s.endswith(".topk")},
        )  # fmt: skip
        own.routed_by = self._experts
        shape = tuple(hf.x.shape[:2])
        positions = np.broadcast_to(np.arange(shape[1]), shape)
        handed = None if hf.given is None else hf.given.numpy()
        own.layer(hf.index, hf.x.double().numpy(), positions, causal(shape, None), handed)
        self.stages = own.stages

    def _experts(self, x: Array, experts: Array, weights: Array) -> Array:
        self.asked, self.sum = (x, experts, weights), np.zeros_like(x)
        self.wait()
        return self.sum

    def take(self, first: int, weights: Weights) -> None:
        x, experts, routing = self.asked
        for expert in range(first, first + len(weights[1])):
            if (experts == expert).any():
                gate, up = weights[0][expert - first].chunk(2)
                parts = [w.double().numpy() for w in (gate, up, weights[1][expert - first])]
                add_expert(self.sum, x, experts, routing, expert, *parts)


class OurHand(Hand):
    """The definition, on rows of its own: x [rows, S, hidden] (of the MTP layer: hidden and embeddings). The first is handed
    HF's choices."""

    def __init__(self, ours: OurLayers, hf: HfHand, x: Any, selection: mx.array | None, is_sparse: bool) -> None:
        self.ours, self.hf, self.x, self.given, self.is_sparse = ours, hf, x, selection, is_sparse

    def run(self) -> None:
        chosen = stages.choices(self.hf.stages, self.is_sparse)
        self.seen: Seen = self.ours.run(self.hf.index, self.x, self.given, chosen, OurExperts(self._experts))

    def _experts(self, x: mx.array, experts: mx.array) -> mx.array:
        self.asked = self.chosen, self.rows = np.array(experts), x
        self.answers = np.zeros((*experts.shape, x.shape[-1]), np.float32)
        self.wait()
        return mx.array(self.answers).astype(x.dtype)

    def take(self, first: int, weights: Weights) -> None:
        """Reads them again, as they are stored."""
        slots, answers = self.ours.answers(self.hf.index, first, len(weights[1]), self.rows, self.chosen)
        self.answers.reshape(-1, self.answers.shape[-1])[slots] = np.array(answers.astype(mx.float32))
