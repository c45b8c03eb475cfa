"""Of caches."""

from __future__ import annotations

from collections.abc import Iterator

from ..edits import Edit
from ..fault import ATTENTION, CACHED, CACHES, OPERATIONS, Fault

# fmt: off


def faults() -> Iterator[Fault]:
    def fault(
        name: str, what: str, *edits: Edit, claim: str = OPERATIONS, stage: str, shows: str = CACHED, **more: str
    ):
        return Fault(name, "cache", what, edits, claim, stage, shows, **more)

    yield fault("trim-main-only", "rewind trims the latent but not the indexer keys",
                Edit("cache.LayerCache.trim", "self.index_keys.trim(max(self.index_keys.length - self.latents.length, 0))",
                     "pass"),
                Edit("cache.LayerCache.append_index_keys", "self.index_keys.read()[0]",
                     "self.index_keys.read()[0][:, : self.length + keys.shape[1]]"),
                Edit("model.Model.__call__", "if cache is not None:", "if False:"), claim=CACHES,
                stage="self_attn.indexer.topk", shows="prompt reuse", origin="Rapid-MLX 1469",
                corrected="logits; since then a rewound run that differs is asked once more, choice by choice")
    yield fault("trim-one-too-few", "rewind leaves one token too many",
                Edit("cache.LayerCache.trim", "self.latents.trim(tokens)", "self.latents.trim(max(tokens - 1, 0))"), claim=CACHES,
                stage="logits", shows="prompt reuse")
    yield fault("growth-loses-a-token", "the first token is lost as a buffer grows",
                Edit("store.Columns.append", "buffer[:, : self.length] = old", "buffer[:, 1 : self.length] = old[:, 1:]"),
                claim=CACHES, stage="logits", shows="T > 256")
    yield fault("take-one-further", "the gathered form reads the token after the selected one",
                Edit("store.LatentStore.take", "return self.plain.take(tokens)[0]",
                     "return self.plain.take(mx.minimum(tokens + 1, self.length - 1))[0]"), claim=ATTENTION,
                stage="self_attn.heads", shows="decode beyond index_topk")
    yield fault("take-from-the-first-row", "the gathered form reads every row's tokens from the first row",
                Edit("store.Columns.take",
                     "columns if batch == 1 else columns + mx.arange(0, batch * size, size, dtype=columns.dtype)[:, None, None]",
                     "columns"), claim=ATTENTION, stage="self_attn.heads", shows="batches beyond index_topk")
    yield fault("positions-count-pads", "in a batch, positions start at the pads",
                Edit("cache.LayerCache.offset", "offset - mx.array(self.left_padding)",
                     "offset + 0 * mx.array(self.left_padding)"), stage="self_attn.indexer.topk",
                shows="rows merged after they began", corrected="logits; since then what was chosen in the batch is held first")
    yield fault("extract-takes-a-pad", "a row leaves the batch with one pad",
                Edit("cache.LayerCache.extract", "single = self._rows([row])",
                     "self.left_padding = self.left_padding and [max(pads - 1, 0) for pads in self.left_padding]; "
                     "single = self._rows([row])"), stage="batch", shows="batches of unequal length")
    yield fault("filter-forgets-index-keys", "rows are reordered, their indexer keys are not",
                Edit("cache.LayerCache._rows", "self.index_keys.rows(mx.array(rows))",
                     "self.index_keys.rows(mx.array(sorted(rows)))"), stage="batch", shows="batches whose rows are reordered")
    yield fault("right-padding-stays", "right padding is not rolled to the left",
                Edit("cache.LayerCache.finalize", "if self.right_padding is None:",
                     "if setattr(self, 'right_padding', None) is None:"), stage="batch",
                shows="chunks of unequal length in a batch")
    yield fault("rows-packed-from-one-column", "every row of a batch is packed from the same column on",
                Edit("cache.LayerCache._first", "start + pads for pads in", "start + max(self.left_padding or [0]) for _ in"),
                stage="batch", shows="packed from a later token on, unequal rows")
    yield fault("saved-without-its-start", "a saved cache forgets from which token on it is packed",
                Edit("cache.LayerCache.state", "[q.bits, q.group_size, q.start]", "[q.bits, q.group_size, 0]"),
                stage="raises CacheError",
                shows="saved, packed from a later token on")
    yield fault("start-forgotten-in-a-batch", "a merged cache starts at position 0",
                Edit("cache.LayerCache._twin", "list(left_padding), self.start,", "list(left_padding), 0,"),
                stage="raises CacheError", shows="far positions in a batch",
                corrected="logits; it was missed, until caches of a batch began far off too: then rows no longer go together")
    yield Fault("filter-drops-announced-padding", "cache", "rows are filtered before the pads have come, and come without them",
                (Edit("cache.LayerCache._rows", "min(self.length, *(padding[row] for row in rows))",
                      "min(padding[row] for row in rows)"),), OPERATIONS, "batch", "left padding, filtered before the first token")
