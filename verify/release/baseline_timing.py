"""What a layer takes at least: one read, one unpacking, HF's pass and ours, as plain loops. `--timings` prints it."""

from __future__ import annotations

import time
from typing import Any

import mlx.core as mx
import numpy as np
import torch

from ..engines.definition_streamed import OurExperts, OurLayers
from .layerwise import Pass


class Bare:
    """Remembers what a layer was given, and times it again when it has passed."""

    def __init__(self, run: Pass) -> None:
        self.run, self.given = run, (run.hf, run.hf_selection, run.own, run.own_selection)

    def seconds(self, index: int) -> float:
        run = self.run
        hf, selection, own, own_selection = self.given
        ours = OurLayers(run.theirs.read.folder, run.ours.dtype, **run.overrides)  # names and shapes only
        asked: list[Any] = []

        def of_torch(*given: torch.Tensor) -> torch.Tensor:
            asked.append(given)
            return torch.zeros_like(given[0])

        def of_mlx(x: mx.array, experts: mx.array) -> mx.array:
            asked.append((x, np.array(experts)))
            return mx.zeros((*experts.shape, x.shape[-1]))

        begun = time.monotonic()
        with run.theirs.loaded(index, of_torch):
            run.theirs.run(index, hf, selection)
        ours.run(index, own, own_selection, {}, OurExperts(of_mlx))
        if asked:
            (x, experts, weights), (rows, chosen) = asked
            for first in range(0, run.args.n_routed_experts, run.chunk):
                unpacked = run.theirs.experts(index, first, min(run.chunk, run.args.n_routed_experts - first))
                run.theirs.chunk(first, *unpacked)(x, experts, weights)
                mx.eval(ours.answers(index, first, len(unpacked[1]), rows, chosen)[1])
                del unpacked
        return time.monotonic() - begun
