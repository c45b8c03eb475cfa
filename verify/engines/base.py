"""What a way of running a model is: this definition, HF's modules, the equations, somebody's code; each in a file of its own.

Whole, from tokens to logits, or a layer at a time; in bounded memory either way: a large checkpoint is read a layer at a time,
its experts in chunks, and let go again. A layer that is run by itself stops at its experts and says what it asks of them;
whoever runs it hands them over and lets it go on. So several engines share one read of a release's experts.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import torch

from glm_dsa import ModelArgs

from .recording import Hearing
from .renumbered import Renumbered
from .spec import Side

Array = np.ndarray
Weights = tuple[
    torch.Tensor, torch.Tensor
]  # of a chunk of experts, float32: gate_up [n, 2 I, hidden], down [n, hidden, I]
Calls = Callable[[Array], Any]
T = TypeVar("T")

CHUNK = 1 << 28  # bytes of experts, in float32, that are unpacked at once
HEAD_ROWS = 8192  # tokens of the vocabulary whose logits are computed at once
TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MX = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


class Engine(Protocol):
    side: Side

    @property
    def model(self) -> Any:
        """What is there before a run, and `Side.within` may change: HF's model, without its weights; None elsewhere."""

    def whole(self, tokens: Array, at: Array, hearing: Hearing) -> None:
        """tokens int [1, S] through all of the model, each stage noted; logits of the positions `at`. Raises what the side's
        code raises."""

    def cached(self) -> Calls | None:
        """The model with a new cache, to be called with one part int [1, s] of a prompt after another; what it gives holds
        logits. None where no cache is to be tried."""


def run(engine: Engine, tokens: Array, at: Array, hearing: Hearing) -> None:
    """`Engine.whole`, in the side's surroundings, and told in the numbers of its reference's experts."""
    with engine.side.within(engine.model), torch.no_grad():
        engine.whole(tokens, at, renumbered(engine.side, hearing))


def renumbered(side: Side, hearing: Hearing) -> Hearing:
    return Renumbered(hearing, side.numberings) if side.numberings else hearing


# -- a layer by itself


class Request(Protocol):
    """What a layer that stands at its experts asks of them."""

    @property
    def stages(self) -> Mapping[str, Any]:
        """What was seen of it until there."""

    def take(self, first: int, weights: Weights) -> None:
        """Adds what experts `first`, ... answer."""


@dataclass
class Answer(Generic[T]):
    """Of a layer: its stages, its output, and the selection that it used."""

    stages: Mapping[str, Any]
    out: T
    selection: T | None


Steps = Generator[Request, None, Answer[T]]


class Layered(Engine, Protocol[T]):
    """An engine whose layers run by themselves, on its own kind of arrays."""

    def layer(self, index: int, x: T, selection: T | None, choices: Mapping[str, Array]) -> Steps[T]:
        """A layer on x [B, S, hidden] and the selection of the layer below. choices: what goes on in the place of its own."""


class Underway(Generic[T]):
    """A layer that was begun: it stands at its experts, and has a `request`, or (request: None) it has none."""

    def __init__(self, steps: Steps[T]) -> None:
        self._steps, self._answer = steps, None
        self.request: Request | None = None
        try:
            self.request = next(steps)
        except StopIteration as end:
            self._answer = end.value

    @property
    def stages(self) -> Mapping[str, Any]:
        """Those so far: all choices are among them."""
        return self.finish().stages if self.request is None else self.request.stages

    def finish(self) -> Answer[T]:
        """What became of it, once its request was taken care of."""
        if self._answer is None:
            try:
                next(self._steps)
            except StopIteration as end:
                self._answer = end.value
        assert self._answer is not None  # a layer asks once
        return self._answer


class AtExperts(Exception):
    """Raised out of a layer that has come to its experts. Nobody's forward can be left in the middle and taken up again: it is
    called anew, and its attention, and whatever else costs before the experts, gives again what it gave."""


# -- multi-token prediction


def first_draft(tokens: Array, args: ModelArgs) -> tuple[Array, int]:
    """The first draft step over the whole prompt, int [1, S] -> (what the MTP layer is fed, int [1, S]: each position the next
    token, the last one the first; how many of the first embeddings are zeroed)."""
    return np.roll(tokens, -1, axis=1), int(args.mtp_zero_first_embedding)


# -- what is done at once


def experts_at_once(args: ModelArgs) -> int:
    inner = args.moe_intermediate_size * args.hidden_size * 3 * 4
    return max(1, min(args.n_routed_experts, CHUNK // inner))


def chunks(args: ModelArgs, size: int | None = None) -> Iterator[tuple[int, int]]:
    """(first, how many) of the experts that are read at once."""
    every, size = args.n_routed_experts, size or experts_at_once(args)
    return ((first, min(size, every - first)) for first in range(0, every, size))


def vocabulary(args: ModelArgs) -> Iterator[slice]:
    every = args.vocab_size
    return (slice(start, min(start + HEAD_ROWS, every)) for start in range(0, every, HEAD_ROWS))


def let_go(layer: nn.Module) -> None:
    """Of a layer that has answered, its weights."""
    for module in layer.modules():
        for name in [n for n, part in module.items() if isinstance(part, mx.array)]:
            module[name] = mx.zeros((0,))
