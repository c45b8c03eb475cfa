"""Sizes in use: what is counted, every threshold of the definition, and the case that runs both sides of it.

A verdict speaks of the sizes that were run and of no others. tests/test_sizes.py holds the table to the code: a number, or a
comparison of sizes, in the definition that stands in no row here fails there. Tests say what they ran (`Report.ran`), as
measured; where a claim's run ends without both sides of a threshold, it is not judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CLAIM = "sizes in use"

# what is counted: {name: in words, as the report has it}
AXES = {
    "prompt": "tokens of a first call",
    "chunk": "tokens of a call behind a cache",
    "context": "tokens that a call sees",
    "times": "context beyond index_topk, in times of it",
    "selected": "keys that a query selects",
    "scores": "index scores of a call, head by head",
    "gathered": "values that a call gathers",
    "batch": "rows of a batch",
    "pads": "columns of padding before a row",
    "pairs": "token-expert pairs of a call",
    "trim": "tokens forgotten at once",
    "drafts": "draft steps of one call",
    "saved_pads": "columns of padding of a saved batch",
    "start": "tokens before the first that is packed",
    "vocabulary": "tokens of the vocabulary",
    "bits": "bits of a packed value",
    "group": "values of a packed group",
}
# Of calls behind a cache: each of a few tokens, and both sides of each power of two up to 256.
EVERY_LENGTH = (*range(1, 10), *(n + d for n in (16, 32, 64, 128, 256) for d in (-1, 0, 1)))


@dataclass(frozen=True)
class Threshold:
    """Where the definition does otherwise, or a number could end.

    place: "module.NAME" of a constant, or "module.Class.method: expression" as the code has it; "" for what is usual in use.
    axis: what is counted. at: from which size on; or each of these sizes. case: the file whose tests run sizes on both sides.
    """

    place: str
    axis: str
    at: int | tuple[int, ...]
    case: str = "test_sizes.py"

    def lacks(self, ran: set[int]) -> str:
        """What was not run of it, in words; empty where all was."""
        if isinstance(self.at, tuple):
            absent = [n for n in self.at if n not in ran]
            return f"none of {', '.join(map(str, absent))}" if absent else ""
        sides = {
            f"none below {self.at:,}": any(n < self.at for n in ran),
            f"none from {self.at:,} on": any(n >= self.at for n in ran),
        }
        return ", ".join(side for side, was_run in sides.items() if not was_run)


CACHES, PACKED = "test_cache_sizes.py", "test_packed_sizes.py"
THRESHOLDS = (
    Threshold("indexer.Indexer.__call__: keys.shape[1] <= self.topk", "times", 1),
    Threshold("indexer.Indexer.best: rest <= 0", "times", 1),
    Threshold("indexer.WIDEST", "times", 4),
    Threshold("indexer.LAST", "context", 1 << 16),
    Threshold("indexer.Indexer.select_tiled: mx.uint32", "context", 1 << 16),
    Threshold("indexer.ranks: mx.int32", "context", 1 << 16),
    Threshold("indexer.ranks: mx.int64", "context", 1 << 16),
    Threshold("tiles.ELEMENTS", "scores", 1 << 19),
    Threshold("tiles.ELEMENTS", "gathered", 1 << 19),
    Threshold("mask.CausalMask.tile: columns.stop <= self.first + rows.start + 1", "scores", 1 << 19),
    Threshold("mask.CausalMask.tile: columns.start >= max(self.pads or (0,))", "pads", 1),
    Threshold("mask.CausalMask.picked: columns.shape[-1] <= self.first + rows.start + 1", "times", 1),
    Threshold("mask.CausalMask.sees: columns <= own", "chunk", 2),
    Threshold("mask.CausalMask.sees: columns >= mx.array(self.pads)[:, None, None]", "pads", 1),
    Threshold("inputs.check_tokens: tokens.shape[1] > 1", "chunk", 2),
    Threshold("moe.SORT_FROM", "pairs", 64),
    Threshold("moe.Experts.__call__: flat.size >= SORT_FROM", "pairs", 64),
    Threshold("store.STEP", "context", 256),
    Threshold("store.SHARE", "context", 256 * 64),
    Threshold("store.Columns.append: self.buffers[0].shape[1] < end", "context", 256),
    Threshold("store.LatentStore.take: mx.int32", "context", 1 << 16),
    Threshold("store.LatentStore.rows: len(self.first) > 1", "batch", 2, CACHES),
    Threshold("store.BITS", "bits", (2, 3, 4, 5, 6, 8), CACHES),
    Threshold("store.GROUP_SIZES", "group", (32, 64, 128), CACHES),
    Threshold("store.LatentStore.append: before < end", "start", 1, CACHES),
    Threshold("store.LatentStore.append: before + values.shape[1] > begin", "start", 1, CACHES),
    Threshold("store.LatentStore.read: mx.arange(begin, end) >= mx.array(self.first)[:, None]", "start", 1, CACHES),
    Threshold("store.LatentStore.take: tokens >= mx.array(self.first)[:, None, None]", "start", 1, CACHES),
    Threshold("cache.LayerCache.trim: 0 <= tokens <= there", "trim", 1, CACHES),
    Threshold("cache.LayerCache.prepare: max(right_padding) > 0", "pads", 1, CACHES),
    # usual in use
    Threshold("", "prompt", 2048),
    Threshold("", "chunk", 512),
    Threshold("", "chunk", 2048),
    Threshold("", "chunk", EVERY_LENGTH),
    Threshold("", "context", 131_072),
    Threshold("", "context", 200_000),
    Threshold("", "times", 8),
    Threshold("", "times", 32),
    Threshold("", "selected", 2048),
    Threshold("", "batch", 16),
    Threshold("", "pairs", 8192),
    Threshold("", "trim", 2, CACHES),
    Threshold("", "drafts", 9),
    Threshold("", "saved_pads", 1 << 16, CACHES),
    Threshold("", "vocabulary", 1 << 16, PACKED),
    Threshold("", "vocabulary", 154_880, PACKED),
)

_REFUSED, _CONFIG, _EMPTY = "what is refused beyond it", "a config's, no size's", "an empty part, and one that is not"
NO_SIZE = {
    "attention.EXPONENTIAL": "the cost of a form, by which none is wrong",
    "cache.LayerCache.__init__: start < 0": _REFUSED,
    "cache.LayerCache.__init__: min(left_padding) < 0": _REFUSED,
    "cache.LayerCache.has_indexer: self.widths.index > 0": _CONFIG,
    "cache.LayerCache.prepare: min(padding) < 0": _REFUSED,
    "cache.LayerCache.state.fset: 0 <= n < 1 << 31": _REFUSED,
    "cache.LayerCache.state.fset: 31": _REFUSED,
    "cache.LayerCache._rows: 0 <= row < there": _REFUSED,
    "cache.LayerCache._check_whole: 32": "bits of a word",
    "cache.LayerCache._check_whole: len(latents) > 1": _REFUSED,
    "cache.LayerCache._check_whole: mx.uint32": _REFUSED,
    "cache.LayerCache._check_alike: len(set(kinds)) > 1": _REFUSED,
    "cache_checks.check_caches: len(lengths) > 1": _REFUSED,
    "cache_checks.check_in_step: rows > 1": "words of a message",
    "indexer.Indexer.score: scores >= LOWEST": "a score, no size",
    "indexer.ranks: 31": "bits of a score",
    "indexer.ranks: 32": "bits of a score",
    "inputs._check_values: tokens < 0": _REFUSED,
    "inputs._check_values: tokens >= vocabulary": _REFUSED,
    "inputs._check_values: 0 <= token < vocabulary": _REFUSED,
    "model.Model.draft: steps < 1": _REFUSED,
    "model.Model.fingerprint: 12": "letters of a name",
    "moe.Router.choose: self.groups > 1": _CONFIG,
    "rope.rope_frequencies: 32": _CONFIG,
    "rope.yarn_mscale: factor <= 1": _CONFIG,
    "store.KvQuantization.check: self.start < 0": _REFUSED,
    "store.KvQuantization.bytes_per_token: 8": "bits of a byte",
    "store.Columns.between: end > begin": _EMPTY,
    "store.Columns.placed: length <= 0": _EMPTY,
}


def of_call(args: Any, batch: int, queries: int, before: int, pads: int = 0) -> dict[str, int]:
    """The sizes of a call of the model: [batch, queries] tokens behind `before` others, padding included."""
    context, topk = before + queries, args.index_topk
    found = {
        "chunk" if before else "prompt": queries, "context": context, "batch": batch, "pads": pads,
        "pairs": batch * queries * args.num_experts_per_tok,
    }  # fmt: skip
    if topk:
        found |= {"times": (context - 1) // topk, "scores": batch * queries * context * args.index_n_heads}
    if topk and context > topk:
        width = args.kv_lora_rank + args.qk_rope_head_dim
        found |= {"selected": topk, "gathered": batch * queries * topk * width}
    return found


def missing(ran: Mapping[str, set[int]]) -> list[str]:
    """Of which thresholds a side was not run."""
    lacking = {t: t.lacks(ran.get(t.axis, set())) for t in THRESHOLDS}
    return [f"{AXES[t.axis]}: {what} ({t.place or 'usual in use'})" for t, what in lacking.items() if what]


def lines(ran: Mapping[str, set[int]]) -> list[str]:
    """What was run, an axis a line."""

    def told(sizes: set[int]) -> str:
        if len(sizes) <= 6:
            return ", ".join(f"{n:,}" for n in sorted(sizes))
        return f"{min(sizes):,} to {max(sizes):,} ({len(sizes)} sizes)"

    return [f"{words}: {told(ran[axis])}" for axis, words in AXES.items() if axis in ran]
