"""The ways of running a side on a prompt: this definition, HF's modules, the equations, somebody's code.

Each run is of the whole model, from tokens to logits, in bounded memory: a large checkpoint is read a layer at a time, its
experts in chunks, and let go again. `Hearing` notes each stage and says what is to stand in its place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import torch

from .recording import Hearing
from .renumbered import Renumbered
from .spec import Side

Array = np.ndarray
CHUNK = 1 << 28  # bytes of experts, in float32, that are unpacked at once
HEAD_ROWS = 8192  # tokens of the vocabulary whose logits are computed at once
TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MX = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
INDEXER = "self_attn.indexer"


class Runner(ABC):
    """`at`: the positions whose logits are asked for."""

    def __init__(self, side: Side) -> None:
        self.side, self.args = side, side.args

    def run(self, tokens: Array, at: Array, hearing: Hearing) -> None:
        """tokens int [1, S]. Raises what the side's code raises."""
        with self.side.within(self.model), torch.no_grad():
            self._run(tokens, at, self.heard(hearing))

    def heard(self, hearing: Hearing) -> Hearing:
        """In the numbers of this side's experts."""
        return Renumbered(hearing, self.side.numberings) if self.side.numberings else hearing

    @property
    def model(self) -> Any:
        """What is there before the run: HF's, without its weights."""
        return None

    @abstractmethod
    def _run(self, tokens: Array, at: Array, hearing: Hearing) -> None: ...

    @property
    def chunk(self) -> int:
        inner = self.args.moe_intermediate_size * self.args.hidden_size * 3 * 4
        return max(1, min(self.args.n_routed_experts, CHUNK // inner))

    def chunks(self) -> Iterator[tuple[int, int]]:
        """(first, how many) of the experts that are read at once."""
        every = self.args.n_routed_experts
        return ((first, min(self.chunk, every - first)) for first in range(0, every, self.chunk))

    def vocabulary(self) -> Iterator[slice]:
        every = self.args.vocab_size
        return (slice(start, min(start + HEAD_ROWS, every)) for start in range(0, every, HEAD_ROWS))


def let_go(layer: Any) -> None:
    """Of a layer that has answered, its weights."""
    for module in layer.modules():
        for name in [n for n, part in module.items() if isinstance(part, mx.array)]:
            module[name] = mx.zeros((0,))


def same_sets(ours: Array, ref: Array) -> Array:
    """bool [S]: where choices [S, K] are the same."""
    if ours.shape != ref.shape:
        return np.zeros(len(ref), bool)
    return (np.sort(ours, -1) == np.sort(ref, -1)).all(-1)
