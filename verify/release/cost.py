"""What quantization cost: a release beside its original, by layer and at the end. Figures; judged by `--limit` alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..core import compare, stages
from ..engines.pruning import Numbering

Array = np.ndarray
# at least, or at most, what the limit says
LIMITS = {"kl_mean": "most", "kl_p95": "most", "kl_max": "most", "perplexity": "most", "top1": "least"}


@dataclass(frozen=True)
class LayerCost:
    """On the same input: relative errors of what attention and MLP add; shares of selected keys and experts that are the same;
    `lost`: the share of the original's attention that falls on keys which the release does not select; dropped,
    dropped_weight: of a pruned build, the shares of the original's choices, and of its routing weight, that go to experts which
    are not there. And after this layer, each on its own: the relative error of the hidden state."""

    attention: float
    mlp: float
    selection: float | None
    lost: float | None
    routing: float | None
    hidden: float
    dropped: float | None = None
    dropped_weight: float | None = None

    def __str__(self) -> str:
        parts = [f"relative error of attention {self.attention:.2%}, MLP {self.mlp:.2%}"]
        parts += [f"selection {self.selection:.2%} the same"] if self.selection is not None else []
        parts += [f"attention lost {self.lost:.2%}"] if self.lost is not None else []
        parts += [f"experts {self.routing:.2%} the same"] if self.routing is not None else []
        if self.dropped is not None:
            parts.append(f"of the original's {self.dropped:.2%} dropped ({self.dropped_weight:.2%} of their weight)")
        return "; ".join([*parts, f"hidden so far {self.hidden:.2%}"])


def of_layer(
    layer: int,
    release: Mapping[str, Array],
    original: Mapping[str, Array],
    attended: Array | None,
    is_sparse: bool,
    numbering: Numbering | None = None,
) -> LayerCost:
    """release: stages of one row. original: of two, [the release's input, its own]. attended [S, T]: its attention there.
    numbering: of the release's experts, where it is not the original's."""
    prefix = f"layers.{layer}."
    attention, mlp, output = (prefix + s for s in ("self_attn.output", "mlp_output", "output"))
    chosen, experts = f"{prefix}self_attn.indexer.topk", prefix + stages.ROUTING
    length = release[output].shape[1]
    selection = lost = routing = None
    if is_sparse and chosen in release:
        mine, theirs = release[chosen][0], original[chosen][0]
        selection = compare.same(mine, theirs, np.tril(np.ones((length, length), bool)))
        if attended is not None:
            lost = float(np.where(compare.as_sets(mine, length), 0, attended).sum() / attended.sum())
    if experts in release:
        mine = release[experts][0]
        routing = compare.same(mine if numbering is None else numbering.own[mine.astype(np.int64)], original[experts][0])
    dropped: tuple[float, float] | tuple[None, None] = (None, None)
    if numbering is not None and numbering.dropped.size and experts in original:
        dropped = of_dropped(original[experts][0], original[prefix + stages.ROUTING_WEIGHTS][0], numbering)
    return LayerCost(
        compare.relative(release[attention][0], original[attention][0]), compare.relative(release[mlp][0], original[mlp][0]),
        selection, lost, routing, compare.relative(release[output][0], original[output][1]), *dropped,
    )  # fmt: skip


def of_dropped(experts: Array, weights: Array, numbering: Numbering) -> tuple[float, float]:
    """experts int [S, k], weights [S, k] of the original -> (share of the choices, share of the weight) that is gone."""
    gone = np.isin(experts, numbering.dropped)
    return float(gone.mean()), float(weights[gone].sum() / weights.sum())


def dropped_line(shares: Mapping[int, tuple[float, float]]) -> str:
    """{layer: what `of_dropped` said} -> a line."""
    choices, weight = np.mean([*shares.values()], axis=0)
    worst = max(shares, key=lambda layer: shares[layer][1])
    return (
        f"of the original's choices of experts on this prompt {choices:.1%} go to dropped ones, {weight:.1%} of the routing "
        f"weight (most in layer {worst}: {shares[worst][0]:.1%}, {shares[worst][1]:.1%})"
    )


@dataclass(frozen=True)
class Cost:
    """At the end. KL(original || release) in nats over positions; top1: most likely token the same; perplexities of the
    prompt; `perplexity`: the release's over the original's."""

    kl_mean: float
    kl_p95: float
    kl_max: float
    top1: float
    original_perplexity: float
    release_perplexity: float

    @property
    def perplexity(self) -> float:
        return self.release_perplexity / self.original_perplexity

    def __str__(self) -> str:
        return (
            f"KL(original || release) in nats: mean {self.kl_mean:.4g}, p95 {self.kl_p95:.4g}, max {self.kl_max:.4g}; "
            f"top-1 {self.top1:.1%}; perplexity {self.original_perplexity:.4g} -> {self.release_perplexity:.4g} "
            f"({self.perplexity:.4f} times)"
        )

    def over(self, limits: Mapping[str, float]) -> list[str]:
        """Which limits it does not keep."""
        wrong = []
        for name, limit in limits.items():
            value = getattr(self, name)
            kept = value <= limit if LIMITS[name] == "most" else value >= limit
            if not kept:
                wrong.append(f"{name} {value:.4g}, at {LIMITS[name]} {limit:g} is asked for")
        return wrong


def of_logits(release: Array, original: Array, following: Array) -> Cost:
    """Logits [positions, V] of both, and the token that follows each position."""
    d = compare.distributions(release, original)
    mine, theirs = (perplexity(logits, following) for logits in (release, original))
    return Cost(d.kl_mean, d.kl_p95, d.kl_max, d.top1, theirs, mine)


@dataclass(frozen=True)
class Perplexity:
    """Of a text: the release's, and the original's where there is one. vocabulary: that of a guess; of_what: text, length."""

    release: float
    original: float | None
    vocabulary: int
    of_what: str

    def __str__(self) -> str:
        parts = [f"release {self.release:.4g}"]
        if self.original is not None:
            parts.append(f"original {self.original:.4g} ({self.release / self.original:.4f} times)")
        return f"{', '.join(parts)}, {self.of_what}{self.doubt}"

    @property
    def doubt(self) -> str:
        """Worse than knowing nothing."""
        if self.release <= self.vocabulary:
            return ""
        too = ", and so is the original" if self.original is not None and self.original > self.vocabulary else ""
        return f". WARNING: worse than a guess among all {self.vocabulary:,} tokens{too}: no model of this text"


def perplexity(logits: Array, following: Array) -> float:
    """Logits [positions, V], and the token that follows each position."""
    return float(np.exp(np.mean(compare.nll(compare.log_softmax(logits), following))))


def parse_limits(texts: list[str]) -> dict[str, float]:
    """["kl_mean=0.05", ...]. Raises ValueError in a line."""
    limits = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name in limits:
            raise ValueError(f"--limit {text}: {name} has a limit already")
        try:
            limits[name] = float(value)
        except ValueError:
            limits[name] = np.nan
        if name not in LIMITS or not 0 <= limits[name] < np.inf:
            raise ValueError(f"--limit {text}: expected NAME=NUMBER, NAME one of {', '.join(LIMITS)}")
    return limits
