"""Right up to some size within use, wrong from there on."""

from __future__ import annotations

from collections.abc import Iterator

from ..edits import Edit
from ..fault import SIZES, Fault

# fmt: off


def faults() -> Iterator[Fault]:

    def fault(name: str, component: str, what: str, *edits: Edit, shows: str, stage: str = "logits", **more: str):
        return Fault(name, component, what, edits, SIZES, stage, shows, **more)

    yield fault("experts-unordered-from-8192-pairs", "MoE", "from 8192 token-expert pairs on, answers stay in their experts' order",
                Edit("moe.Experts.__call__", "    if is_sorted:\n", "    if is_sorted and flat.size < 8192:\n"),
                shows="1024 tokens at top 8")
    yield fault("own-chunk-unseen-from-513-queries", "mask", "more than 512 queries behind a cache do not see their own chunk",
                Edit("mask.CausalMask.sees", "[:, None]\n    seen", "[:, None]\n    own = mx.minimum(own, self.first - 1) "
                     "if self.first and self.queries > 512 else own\n    seen"),
                stage="self_attn.indexer.topk", shows="chunks of more than 512 behind a cache",
                corrected="logits; under the reference's choices no key of the own chunk needs a mask")
    yield fault("tiles-forget-at-64-index-topk", "indexer", "the best of the tiles before are forgotten from key 64 index_topk on",
                Edit("indexer.Indexer.select_tiled", "[*best, ranks(scores, columns)]",
                     "[*(best if columns.start < 64 * self.topk else []), ranks(scores, columns)]"),
                stage="self_attn.indexer.topk", shows="contexts of 64 index_topk")
    yield fault("ninth-row-takes-the-eighth-s-keys", "attention", "rows from the ninth on attend to what the eighth selected",
                Edit("attention.MultiHeadLatentAttention.attend_gathered", "picked = selection[:, part]",
                     "picked = selection[mx.minimum(mx.arange(batch), 7), part]"), shows="batches of more than 8")
    yield fault("router-unnormalized-from-1024-tokens", "router", "from 1024 tokens on weights are not normalized",
                Edit("moe.Router.__call__", "if self.normalize:", "if self.normalize and x.shape[1] < 1024:"),
                shows="chunks of 1024")
    yield fault("expanded-unmasked-from-1024-queries", "attention", "from 1024 queries on the expanded form is not causal",
                Edit("attention.MultiHeadLatentAttention.attend_expanded", "mask=mask",
                     "mask=mask if q_nope.shape[2] < 1024 else None"), shows="chunks of 1024 within index_topk")
    yield fault("absorbed-zeros-from-100000-keys", "attention", "from 100,000 keys on the absorbed form reads zeros for the first",
                Edit("attention.MultiHeadLatentAttention.attend_absorbed", "keys = tokens.read()",
                     "keys = tokens.read(); "
                     "keys = keys if keys.shape[1] < 100_000 else keys * (mx.arange(keys.shape[1]) > 9999)[:, None]"),
                stage="self_attn.heads", shows="contexts of 100,000, no indexer: a twentieth of the keys, slightly")
    yield fault("drafts-joined-with-the-first-of-1024-tokens", "MTP", "from 1024 hiddens on each is joined with the first token",
                Edit("mtp.MtpLayer.step", "self.enorm(embeddings)", "self.enorm(embeddings if embeddings.shape[1] < 1024 "
                     "else mx.broadcast_to(embeddings[:, :1], embeddings.shape))"),
                stage="mtp step 0 hidden", shows="prompts of 1024 handed in at once")
