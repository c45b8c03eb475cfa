"""What a layer takes at least: one read, one unpacking, HF's pass and ours, as plain loops. `--timings` prints it."""

from __future__ import annotations

import time

import torch

from ..engines.base import Underway, chunks
from ..engines.run_definition import DefinitionEngine
from ..engines.run_hf import Asked
from .layerwise import Pass


class Bare:
    """Remembers what a layer was given, and times it again when it has passed."""

    def __init__(self, run: Pass) -> None:
        self.run, self.given = run, (run.hf, run.hf_selection, run.own, run.own_selection)

    def seconds(self, index: int) -> float:
        run = self.run
        hf, selection, own, own_selection = self.given
        theirs, ours = run.theirs.layers, DefinitionEngine(run.ours.side)  # names and shapes only
        asked: list[Asked] = []

        def answer(*given: torch.Tensor) -> torch.Tensor:
            asked.append(Asked(theirs, *given))
            return asked[0].sum

        begun = time.monotonic()
        with theirs.loaded(index, answer):
            theirs.run(index, hf, selection)
        mine = Underway(ours.layer(index, own, own_selection, {}))
        if mine.request is not None:
            for first, count in chunks(run.args, run.chunk):
                unpacked = theirs.experts(index, first, count)
                asked[0].take(first, unpacked)
                mine.request.take(first, unpacked)
                del unpacked
        mine.finish()
        return time.monotonic() - begun
