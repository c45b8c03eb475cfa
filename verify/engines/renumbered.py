"""A run whose experts are not numbered as the reference's: what it notes is told in the reference's numbers, and what it is
handed in its own."""

from __future__ import annotations

import numpy as np

from ..core import stages
from .pruning import Numbering, Numberings
from .recording import Hearing

Array = np.ndarray
BY_EXPERT = (stages.ROUTING_LOGITS, stages.ROUTING_WEIGHTS)  # [S, E]


class Renumbered(Hearing):
    """Weights of experts that it has not are 0, their logits NaN. Choices among experts that it has not cannot be handed on."""

    def __init__(self, hearing: Hearing, numberings: Numberings) -> None:
        super().__init__(hearing.into, hearing.reference, hearing.wanted, hearing.keeps)
        self.hearing, self.numberings, self.hands_weights = hearing, numberings, hearing.hands_weights

    def note(self, stage: str, value: Array | None) -> None:
        numbering = self._of(stage)
        if numbering is not None and value is not None:
            value = _theirs(stage, value, numbering)
            if stages.kind(stage) == stages.ROUTING_LOGITS:
                self.into.absent[stage] = numbering.dropped
        self.hearing.note(stage, value)

    def due(self, stage: str) -> Array | None:
        numbering = self._of(stage)
        if numbering is None:
            return self.hearing.due(stage)
        return self._own(stage, self.hearing.due(stage), numbering) if numbering.is_whole else None

    def other(self, stage: str) -> Array | None:
        numbering, value = self._of(stage), self.hearing.other(stage)
        return value if numbering is None else self._own(stage, value, numbering)

    def _of(self, stage: str) -> Numbering | None:
        layer = stages.layer_of(stage)
        is_routed = stages.kind(stage) in (stages.ROUTING, *BY_EXPERT)
        return self.numberings.get(layer) if is_routed and layer is not None else None

    def _own(self, stage: str, value: Array | None, numbering: Numbering) -> Array | None:
        if value is None:
            return None
        if stages.kind(stage) in BY_EXPERT:
            return value[:, numbering.own]
        return numbering.places[value.astype(np.int64)] if numbering.is_whole else None


def _theirs(stage: str, value: Array, numbering: Numbering) -> Array:
    if stages.kind(stage) == stages.ROUTING:
        return numbering.own[value.astype(np.int64)]
    absent = np.nan if stages.kind(stage) == stages.ROUTING_LOGITS else 0.0
    every = np.full((len(value), len(numbering.order)), absent, value.dtype)
    every[:, numbering.own] = value
    return every
