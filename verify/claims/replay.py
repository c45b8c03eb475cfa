"""A prompt's calls on a cache, of one row or a padded batch: free, or under the reference's choices, each judged as a set.

What a free run is to give is certain up to the first query at which the reference itself is torn between two keys, or two
experts. Behind it the same is run once more with the reference's choices put in, so that nothing is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np

from ..cases import Case, Reference
from ..core import compare, sizes, stages
from ..core.checker import Judge
from ..core.compare import as_sets
from ..engines.definition import to_numpy

Array = np.ndarray
HEARD = ("topk", "logits")


@dataclass(frozen=True)
class Row:
    """A row of a batch: a prompt of the reference's (its row `of`), behind `pad` columns."""

    reference: Reference
    pad: int = 0
    of: int = 0
    name: str = ""  # of what is compared; the replay's own where it is empty

    @property
    def tokens(self) -> Array:
        return np.concatenate([np.zeros(self.pad, int), self.reference.tokens[self.of]])

    def choice(self, stage: str, columns: slice, topk: int) -> Array:
        """The reference's, of the tokens in these columns, [n, K]."""
        given, first = self.reference.given[stage][self.of], max(columns.start - self.pad, 0)
        own = given[first : max(columns.stop - self.pad, 0)]
        pads = columns.stop - columns.start - len(own)
        if stages.is_selection(stage):
            return in_columns(own, first, self.pad, pads, columns.stop, topk)
        every = np.broadcast_to(np.arange(given.shape[-1]), (pads, given.shape[-1]))
        return np.concatenate([every, own])

    def judge(self, judge: Judge, name: str, stage: str, ours: Array, columns: slice) -> None:
        """ours [n, K]: what was chosen in these columns; pads may choose what they like."""
        first, end = max(columns.start - self.pad, 0), columns.stop - self.pad
        if end <= first:
            return
        decision = self.reference.decision(stage, local=False)[self.of : self.of + 1, first:end]
        ref, mine = self.reference.given[stage][self.of : self.of + 1, first:end], ours[None, first - end :]
        if stages.is_selection(stage):
            scores = np.pad(decision.scores, ((0, 0), (0, 0), (self.pad, 0)), constant_values=-np.inf)
            decision = replace(decision, scores=scores[..., : columns.stop])
            ref = np.minimum(
                ref + self.pad, columns.stop - 1
            )  # early rows list keys of the future: any masked one will do
        judge.selection(self.reference.case.name, name, mine, ref, decision)


def in_columns(choice: Array, first: int, pad: int, pads: int, width: int, topk: int) -> Array:
    """A selection [n, K] by the tokens from position `first` on, as one among `width` columns of which the first `pad` are
    pads: int [pads + n, topk], ascending, `pads` queries that are pads themselves before them. Rows that see fewer keys than
    topk are filled up with columns that they do not see."""
    chosen = np.zeros((pads + len(choice), width), bool)
    chosen[pads:, pad:] = as_sets(np.minimum(choice, width - pad - 1), width - pad) if len(choice) else False
    at, last = np.arange(width), pad + first + np.arange(len(choice))
    unseen = np.ones(chosen.shape, bool)
    unseen[pads:] = (at[None] < pad) | (at[None] > last[:, None])
    return filled(chosen, unseen, topk)


def filled(chosen: Array, unseen: Array, topk: int) -> Array:
    """Sets of keys, bool [n, T], as int [n, topk], ascending: filled up with keys that the query does not see."""
    rank = np.where(chosen & ~unseen, 0, np.where(unseen, 1, 2))
    return np.sort(np.argsort(rank, axis=-1, kind="stable")[:, :topk], axis=-1)


@dataclass
class Replay:
    """Calls with the next columns, on `cache`; free, or under the reference's choices: then its own are kept in `made`, by
    stage and columns."""

    case: Case
    rows: Sequence[Row]
    cache: Any
    is_free: bool = True
    made: list[tuple[str, slice, Array]] = field(default_factory=list)
    ran: list[dict[str, int]] = field(default_factory=list)  # the sizes of each call
    at: int = 0

    def __call__(self, *cuts: int) -> Array:
        """Logits of the next sum(cuts) columns, [B, .., V]."""
        out = []
        for cut in cuts:
            columns = slice(self.at, self.at + cut)
            tokens = np.stack([row.tokens[columns] for row in self.rows])
            assert tokens.shape[1] == cut, "the cuts go beyond the prompt"
            before = self.cache[0].length
            self.at = columns.stop
            out.append(self._free(tokens) if self.is_free else self._under_choices(tokens, columns))
            pads = max(self.cache[0].left_padding or [0])
            self.ran.append(sizes.of_call(self.case.args, len(self.rows), cut, before, pads))
        return np.concatenate(out, axis=1)

    def _free(self, tokens: Array) -> Array:
        logits = to_numpy(self.case.ours.model(mx.array(tokens), self.cache))
        assert logits is not None
        return logits

    def _under_choices(self, tokens: Array, columns: slice) -> Array:
        topk = self.case.args.index_topk
        chosen = [s for s in self.rows[0].reference.given if columns.stop > topk or not stages.is_selection(s)]
        given = {s: np.stack([row.choice(s, columns, topk) for row in self.rows]) for s in chosen}
        seen = self.case.ours.forward(tokens, self.cache, given, HEARD)
        self.made += [(stage, columns, seen[stage]) for stage in stages.in_order(chosen)]
        return seen["logits"]

    def judge(self, judge: Judge, name: str) -> None:
        """What it would have chosen by itself, on the same inputs."""
        for stage, columns, choices in self.made:
            for row, ours in zip(self.rows, choices, strict=True):
                row.judge(judge, f"{stage} ({row.name or name})", stage, ours, columns)


def hold(
    case: Case, judge: Judge, name: str, rows: Sequence[Row], run: Callable[[Replay], Array], **options: Any
) -> None:
    """run(replay) -> logits of all columns, [B, T, V], on a new cache (made with `options`), against HF's uncached ones."""

    def played(is_free: bool) -> tuple[Replay, list[Array]]:
        replay = Replay(case, rows, case.ours.model.make_cache(**options), is_free)
        logits = run(replay)
        for call in replay.ran:
            judge.report.ran(**call)
        return replay, [logits[i : i + 1, row.pad :] for i, row in enumerate(rows)]

    hf = [row.reference.hf["logits"][row.of : row.of + 1] for row in rows]
    untied = [row.reference.untied[row.of] for row in rows]
    bounds = [row.reference.bound("logits", local=False) for row in rows]
    free = [logits[:, sure] for logits, sure in zip(played(True)[1], untied, strict=True)]
    sure = [ref[:, sure] for ref, sure in zip(hf, untied, strict=True)]
    agrees = all(
        not ref.size or compare.values(ours, ref).error <= bound.value
        for ours, ref, bound in zip(free, sure, bounds, strict=True)
    )
    if not agrees or not all(part.all() for part in untied):
        replay, logits = played(False)
        for row, ours, ref, bound in zip(rows, logits, hf, bounds, strict=True):
            judge.values(case.name, f"logits ({row.name or name})", ours, ref, bound)
        replay.judge(judge, name)
    for row, ours, ref, bound in zip(rows, free, sure, bounds, strict=True):
        if ref.size:
            judge.values(case.name, f"logits ({row.name or name})", ours, ref, bound)
