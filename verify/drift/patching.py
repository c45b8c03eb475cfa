"""Where the final KL comes from: the smallest component whose outputs, put in the place of the candidate's own, repair the
logits. Components first, each in all layers; then the fewest layers, by halving."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..core import compare, stages
from ..engines.recording import Hearing, Recording
from ..engines.runner import Runner

Array = np.ndarray
ENOUGH = 0.9  # of the KL that is explained by all components together
NEGLIGIBLE = 1e-9  # nats: float noise
# small ones first: what fits in the first needs no larger one
REPAIRS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("selections", ("self_attn.indexer.topk",)),
    ("routing", ("mlp.gate.topk",)),
    ("embedding", ("embed",)),
    ("query latents", ("self_attn.q_latent",)),
    ("KV latents", ("self_attn.kv_latent",)),
    ("shared experts", ("mlp.shared_experts",)),
    ("routed experts", ("mlp.experts",)),
    ("selections and routing", ("self_attn.indexer.topk", "mlp.gate.topk")),
    ("feed-forward", ("mlp_output",)),
    ("attention", ("self_attn.output",)),
)


@dataclass(frozen=True)
class Repaired:
    """kinds of stages, replaced in these layers (none: outside of layers); kl: what is left of the mean, in nats."""

    what: str
    kinds: tuple[str, ...]
    layers: tuple[int, ...]
    kl: float
    explained: float


@dataclass
class Repair:
    """kl: the candidate's own; tried: every component in all layers; best: the smallest that explains enough."""

    kl: float
    tried: list[Repaired] = field(default_factory=list)
    best: Repaired | None = None

    def lines(self) -> list[str]:
        others = [r for r in self.tried if self.best is None or r.what != self.best.what][:4]
        return ["replaced in all layers: " + ", ".join(f"{r.what} {r.explained:.1%}" for r in others)] if others else []

    def title(self) -> str:
        assert self.best is not None
        layers = self.best.layers
        where = f" of layer{'s' if len(layers) > 1 else ''} {stages.compact(layers)}" if layers else ""
        return f"{self.best.explained:.1%} of the KL comes from: {self.best.what}{where}"

    def as_dict(self) -> dict[str, Any]:
        return {"kl": self.kl, "tried": [asdict(r) for r in self.tried], "best": self.best and asdict(self.best)}


def repair(
    runner: Runner,
    tokens: Array,
    at: Array,
    recordings: tuple[Recording, Recording, Recording],
    tell: Callable[[str], None],
) -> Repair | None:
    """recordings: the reference's, the candidate's on its inputs, and its own. None where there is nothing to repair, or no
    logits to tell by."""
    reference, local, own = recordings
    due, mine = reference.get("logits"), own.get("logits")
    if due is None or mine is None or (kl := compare.distributions(mine, due).kl_mean) < NEGLIGIBLE:
        return None
    found = Repair(kl)

    def replaced(what: str, kinds: Sequence[str], layers: Sequence[int] | None) -> Repaired:
        tell(f"repair: {what}")
        into = Recording()
        wanted = _wanted(kinds, layers)
        runner.run(tokens, at, Hearing(into, reference, wanted, lambda stage: stage == "logits"))
        left = compare.distributions(into["logits"], due).kl_mean  # type: ignore[arg-type]
        touched = {stages.layer_of(s) for s in own if wanted(s)} - {None}
        return Repaired(what, tuple(kinds), tuple(sorted(touched)), left, 1 - left / kl)  # type: ignore[arg-type]

    shown = {stages.kind(stage) for stage in own if stage in reference}
    for what, kinds in REPAIRS:
        if set(kinds) <= shown and all(_differs(kind, own, reference) for kind in kinds[:1]):
            found.tried.append(replaced(what, kinds, None))
    if (alone := local.get("logits")) is not None:  # the head (and final norm) on the reference's hidden
        own_share = compare.distributions(alone, due).kl_mean / kl
        found.tried.append(Repaired("head", ("logits",), (), kl * (1 - own_share), own_share))
    if not found.tried:
        return found
    most = max(r.explained for r in found.tried)
    best = next((r for r in found.tried if r.explained >= ENOUGH * min(most, 1.0) > 0), None)
    found.tried.sort(key=lambda r: -r.explained)
    if best is None:
        return found
    found.best = _fewest(best, lambda layers: replaced(f"{best.what}", best.kinds, layers))
    return found


def _wanted(kinds: Sequence[str], layers: Sequence[int] | None) -> Callable[[str], bool]:
    return lambda stage: stages.kind(stage) in kinds and (layers is None or stages.layer_of(stage) in (*layers, None))


def _differs(kind: str, own: Recording, reference: Recording) -> bool:
    same = [s for s in own if stages.kind(s) == kind and s in reference]
    return any(not _equal(own[s], reference[s]) for s in same)


def _equal(a: Array | None, b: Array | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and np.array_equal(a, b)


def _fewest(best: Repaired, again: Callable[[Sequence[int]], Repaired]) -> Repaired:
    """Halves of the layers, for as long as one of them explains nearly as much."""
    while len(best.layers) > 1:
        middle = len(best.layers) // 2
        halves = [again(half) for half in (best.layers[:middle], best.layers[middle:])]
        better = max(halves, key=lambda r: r.explained)
        if better.explained < ENOUGH * best.explained:
            return best
        best = better
    return best
