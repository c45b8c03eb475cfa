"""A fault: a small change to our running definition, and where the gate must notice it."""

from __future__ import annotations

from dataclasses import dataclass

from .edits import Edit

# claims, as the gate's files name them
ATTENTION, BEHAVIOUR = "attention under an injected selection", "a trained model's behaviour"
CACHES, OPERATIONS = "caches: chunks, decode, rewind, padding", "cache operations, any sequence"
CONFIG, INDEXER, LAYERS = "config and schedules", "indexer scores and selections", "each layer on the reference's input"
LOGITS, INT8, MTP = "final logits", "int8 latent cache", "MTP, chained draft steps"
ROPE, ROUTER, SIZES, WEIGHTS = "rope, both layouts", "router and experts", "sizes in use", "weights and formats"

ALWAYS, SPARSE, CACHED = "always", "T > index_topk", "from the second call on"
OWN = "this catalogue"


@dataclass(frozen=True)
class Fault:
    """stage: how the first differing stage begins, without its layer. shows: on what input. origin: who shipped it.

    equivalent: the proof that no output can change, if so; then `stage` is where it is seen all the same, "" for nowhere.
    """

    name: str
    component: str
    what: str
    edits: tuple[Edit, ...]
    claim: str
    stage: str
    shows: str = ALWAYS
    origin: str = OWN
    equivalent: str = ""
    corrected: str = ""
