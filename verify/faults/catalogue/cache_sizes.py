"""The same of caches, ids and packed weights."""

from __future__ import annotations

from collections.abc import Iterator

from ..edits import Edit
from ..fault import SIZES, Fault

# fmt: off


def faults() -> Iterator[Fault]:

    def fault(name: str, component: str, what: str, *edits: Edit, stage: str, shows: str, **more: str):
        return Fault(name, component, what, edits, SIZES, stage, shows, **more)

    yield fault("gather-columns-in-16-bit", "cache", "columns to be gathered are cut to 16 bit",
                Edit("store.Columns.take", "rows = columns if batch", "rows = columns.astype(mx.uint16) if batch"),
                stage="self_attn.heads", shows="contexts of 65,536: some of many keys, slightly",
                corrected="gather; the whole model's contexts are asked before the caches alone")
    yield fault("growth-beyond-16k-loses-a-token", "cache", "growing beyond 16,384 tokens, the last one is lost",
                Edit("store.Columns.append", "buffer[:, : self.length] = old",
                     "keep = self.length - (self.length > 16_384); buffer[:, :keep] = old[:, :keep]"),
                stage="self_attn.indexer.topk", shows="contexts of 16,384",
                corrected="cache growth; the whole model's contexts are asked before the caches alone")
    yield fault("trim-of-packed-in-16-bit", "cache", "no more than 65,535 packed tokens are forgotten at once",
                Edit("store.LatentStore.trim", "min(self.packed.length, tokens)", "min(self.packed.length, tokens, 65_535)"),
                stage="trim", shows="rewinding by 65,536 under --kv-bits")
    yield fault("ninth-row-filtered-as-the-eighth", "cache", "rows from the ninth on are the eighth once a batch was filtered",
                Edit("store.Columns.rows", "part[indices]", "part[mx.minimum(indices, 7)]"), stage="batch",
                shows="batches of more than 8")
    yield fault("saved-cache-ends-at-131072", "cache", "a cache is saved up to token 131,072",
                Edit("cache._parts", "list(columns.read())", "[part[:, :131_072] for part in columns.read()]"),
                stage="cache growth", shows="prompt caches of more")
    yield fault("pads-in-16-bit", "mask", "a row's padding counts in 16 bit", Edit("mask.CausalMask.sees", "mx.array(self.pads)",
                     "mx.array(self.pads).astype(mx.uint16)"), stage="mask", shows="rows behind 65,536 pads")
    yield fault("token-ids-in-16-bit", "embedding", "token ids are cut to 16 bit",
                Edit("model.Backbone.__call__", "self.embed_tokens(tokens)", "self.embed_tokens(tokens.astype(mx.uint16))"),
                stage="embedding", shows="ids beyond 65,535")
    yield fault("draft-choice-in-16-bit", "MTP", "the token that a draft chooses is cut to 16 bit",
                Edit("model.Model.draft", "mx.argmax(logits, axis=-1))", "mx.argmax(logits, axis=-1).astype(mx.uint16))"),
                stage="draft's tokens", shows="drafts of ids beyond 65,535")
    yield fault("packed-experts-in-7-bit", "MoE", "packed experts from the 129th on are those from the first on",
                Edit("linear.QuantizedSwitchLinear.__call__", "rhs_indices=experts", "rhs_indices=experts & 127"), stage="experts",
                shows="256 packed experts")
    yield fault("embeddings-of-long-chunks-ignored", "embedding", "of more than 1024 tokens, the tokens count, not the embeddings",
                Edit("model.Backbone.__call__", "if input_embeddings is None else",
                     "if input_embeddings is None or tokens.size > 1024 else"),
                stage="logits", shows="embeddings for more than 1024 tokens",
                corrected="input_embeddings; the whole model against HF is asked before")
