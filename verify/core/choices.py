"""Choices: what they are made by, how far that may be off, and so what is a tie. The one definition.

A *tie* swaps candidates that all lie within the noise of the boundary: either choice is right. Where scores are equal to the
bit (the ReLU makes many of an indexer of few heads exactly 0) the tie is *exact*: HF differs from itself there, by how a
prompt is cut. Nobody is condemned for a tie; whatever lies behind one is judged with the reference's choice put in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from glm_dsa import ModelArgs

from . import bounds, stages
from .compare import LOWEST, as_sets

Array = np.ndarray


@dataclass(frozen=True)
class Difference:
    """How two choices differ as sets, by queries."""

    queries: int
    differing: int
    ties: int
    first: str = ""

    @property
    def faults(self) -> int:
        return self.differing - self.ties


@dataclass(frozen=True)
class Decision:
    """What a choice is made by. scores [B, S, N]: -inf (or below -1e38) on what may not be chosen; k: how many are; noise: how
    far a score may be off, absolutely. Experts in groups are chosen among those of the `top_groups` whose best two sum highest.
    """

    scores: Array
    k: int
    noise: float
    noun: str = "keys"
    groups: int = 1
    top_groups: int = 1

    def __post_init__(self) -> None:
        scores = np.asarray(self.scores, np.float64)
        object.__setattr__(self, "scores", np.where(scores < LOWEST, -np.inf, scores))

    def __getitem__(self, rows: Any) -> Decision:
        """Of some queries."""
        return replace(self, scores=self.scores[rows])

    @property
    def allowed(self) -> Array:
        """Scores without the losing groups, [B, S, N]."""
        return in_best_groups(self.scores, self.groups, self.top_groups)

    @property
    def torn(self) -> Array:
        """bool [B, S]: queries of which the noise could swap a choice."""
        torn = _gap(self.allowed, self.k) <= 2 * self.noise
        if self.groups > 1:
            torn |= _gap(group_scores(self.scores, self.groups), self.top_groups) <= 4 * self.noise
        return torn

    @property
    def exact(self) -> Array:
        """bool [B, S]: queries of which the last that is chosen and the first that is not score the same."""
        return _gap(self.allowed, self.k) == 0

    def difference(self, ours: Array | None, ref: Array) -> Difference:
        """ours, ref: indices [B, S, K] (ours None: every key).

        What may not be chosen is dropped before sets are compared, and queries that see nothing (pads) with it.
        """
        valid = np.isfinite(self.scores)
        mine = valid if ours is None else as_sets(ours, valid.shape[-1]) & valid
        theirs = as_sets(ref, valid.shape[-1]) & valid
        rows = valid.any(-1)
        differing = (mine != theirs).any(-1) & rows
        ties, first = 0, ""
        for row in np.argwhere(differing):
            at = tuple(row)
            if self._is_tie(self.scores[at], mine[at], theirs[at]):
                ties += 1
            elif not first:
                first = self._told(at, mine[at], theirs[at])
        return Difference(int(rows.sum()), int(differing.sum()), ties, first)

    def _is_tie(self, scores: Array, mine: Array, theirs: Array) -> bool:
        if self.groups == 1:
            return _swaps_at_boundary(scores, mine, theirs, self.k, self.noise)
        return self._may_be(scores, mine) and self._may_be(scores, theirs)

    def _may_be(self, scores: Array, chosen: Array) -> bool:
        """Whether this is a right choice for some of the groups that may win."""
        for winners in self._possible_groups(scores):
            within = np.where(np.repeat(winners, len(scores) // self.groups), scores, -np.inf)
            best = as_sets(np.argsort(-within, kind="stable")[: self.k], len(scores))
            if _swaps_at_boundary(within, chosen, best, self.k, self.noise):
                return True
        return False

    def _possible_groups(self, scores: Array) -> list[Array]:
        """Which groups may win, the noise of two scores allowed for."""
        sums = group_scores(scores, self.groups)
        boundary = np.sort(sums)[-self.top_groups]
        near = np.abs(sums - boundary) <= 4 * self.noise
        sure = np.flatnonzero((sums > boundary) & ~near)
        found = []
        for others in combinations(np.flatnonzero(near), self.top_groups - len(sure)):
            winners = np.zeros(self.groups, bool)
            winners[[*sure, *others]] = True
            found.append(winners)
        return found

    def _told(self, at: tuple[int, ...], mine: Array, theirs: Array) -> str:
        scores, allowed = self.scores[at], self.allowed[at]
        finite = np.sort(allowed[np.isfinite(allowed)])
        boundary = finite[-min(self.k, len(finite))]
        extra, lost = np.flatnonzero(mine & ~theirs), np.flatnonzero(theirs & ~mine)
        parts = [f"query {int(at[1])}" + (f" of row {int(at[0])}" if self.scores.shape[0] > 1 else "")]
        if extra.size:
            parts.append(f"picks {int(extra[0])} (score {scores[extra[0]]:.6g})")
        if lost.size:
            parts.append(f"ref picks {int(lost[0])} (score {scores[lost[0]]:.6g})")
        counts = f"{extra.size} {self.noun} too many, {lost.size} missing"
        return ", ".join(parts) + f"; boundary {boundary:.6g}, {counts}"


def of_keys(scores: Array, topk: int, noise: float) -> Decision:
    """An indexer's."""
    return Decision(scores, topk, noise)


def of_experts(logits: Array, bias: Array, args: ModelArgs, noise: float) -> Decision:
    """A router's, by sigmoid(logits) + bias. noise: of the logits. The sigmoid passes on a quarter of it at most, errs itself,
    and the sum with the bias is rounded, which counts where the bias is large."""
    scores = biased_scores(logits, bias)
    rounding = bounds.HALF_ULP * float(np.abs(scores).max()) + bounds.sigmoid_error()
    return Decision(scores, args.num_experts_per_tok, noise / 4 + rounding, "experts", args.n_group, args.topk_group)


def of_stage(
    stage: str,
    args: ModelArgs,
    values: Callable[[str], Array],
    bound: Callable[[str], bounds.Bound],
    weights: Callable[[str], Array],
) -> Decision:
    """What a selection or a routing is made by, from a reference's stages, their bounds and its weights by HF's names."""
    own = made_by(stage, args)
    noise = bound(own).absolute(values(own))
    if stages.kind(stage) == stages.ROUTING:
        bias = weights("model." + stage.removesuffix("topk") + "e_score_correction_bias")
        return of_experts(values(own), bias, args, noise)
    return of_keys(values(own), args.index_topk, noise)


def made_by(stage: str, args: ModelArgs) -> str:
    """The stage that a choice is read from: a router's logits; the scores of the full layer whose selection it is."""
    layer = stages.layer_of(stage)
    assert layer is not None
    if stages.kind(stage) == stages.ROUTING:
        return stage.removesuffix("topk") + "logits"
    full = max((i for i in range(layer + 1) if args.runs_indexer(i)), default=0)
    return f"layers.{full}.self_attn.indexer.scores"


def biased_scores(logits: Array, bias: Array) -> Array:
    """sigmoid + bias: what routing chooses by."""
    return 1 / (1 + np.exp(-logits.astype(np.float64))) + bias


def group_scores(scores: Array, groups: int) -> Array:
    """[.., E] -> the sum of each group's best two, [.., groups]."""
    grouped = scores.reshape(*scores.shape[:-1], groups, -1)
    return np.sort(grouped, -1)[..., -2:].sum(-1)


def in_best_groups(scores: Array, groups: int, top_groups: int) -> Array:
    """-inf in groups that lost, [.., E]."""
    if groups == 1:
        return scores
    best = group_scores(scores, groups)
    threshold = np.sort(best, -1)[..., -top_groups, None]
    grouped = scores.reshape(*scores.shape[:-1], groups, -1)
    return np.where((best >= threshold)[..., None], grouped, -np.inf).reshape(scores.shape)


def scatter(weights: Array, experts: Array, count: int) -> Array:
    """Routing weights [.., k] at experts [.., k] -> [.., E]: comparable whatever the order."""
    dense = np.zeros((*weights.shape[:-1], count))
    np.put_along_axis(dense, experts.astype(np.int64), weights, axis=-1)
    return dense


def _gap(scores: Array, k: int) -> Array:
    """Between the k-th best and the next; infinite where there is no next."""
    if scores.shape[-1] <= k:
        return np.full(scores.shape[:-1], np.inf)
    best = -np.partition(-scores, [k - 1, k], axis=-1)
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(best[..., k]), best[..., k - 1] - best[..., k], np.inf)


def _swaps_at_boundary(scores: Array, mine: Array, theirs: Array, k: int, noise: float) -> bool:
    """Whether as many are chosen, and all that are swapped lie within the noise of the last that is."""
    finite = np.sort(scores[np.isfinite(scores)])
    swapped = mine != theirs
    if len(finite) <= k or mine.sum() != theirs.sum():
        return not swapped.any()
    return bool((np.abs(scores[swapped] - finite[-k]) <= 2 * noise).all())
