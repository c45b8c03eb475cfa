"""Of multi-token prediction."""

from __future__ import annotations

from collections.abc import Iterator

from ..edits import Edit
from ..fault import ALWAYS, MTP, SPARSE, Fault

# fmt: off


def faults() -> Iterator[Fault]:
    step, draft = "mtp.MtpLayer.step", "model.Model.draft"
    joined = "[self.enorm(embeddings), self.hnorm(hidden)]"
    run = "x, selection = self(x, rotation, mask, cache, reuse, reuse=reuse is not None)"

    def fault(name: str, what: str, *edits: Edit, stage: str, shows: str = ALWAYS, **more: str):
        return Fault(name, "MTP", what, edits, MTP, stage, shows, **more)

    yield fault("mtp-concat-order", "hidden first instead of embedding first",
                Edit(step, joined, "[self.hnorm(hidden), self.enorm(embeddings)]"), stage="mtp step 0 hidden",
                origin="sglang 6423")
    yield fault("mtp-norms-swapped", "enorm on the hidden, hnorm on the embedding",
                Edit(step, joined, "[self.hnorm(embeddings), self.enorm(hidden)]"), stage="mtp step 0 hidden")
    yield fault("mtp-head-norm-skipped", "no norm before the shared head", Edit(step, "self.shared_head.norm(x)", "x"),
                stage="mtp step 0 hidden")
    yield fault("mtp-uses-main-selection", "the first step reuses a selection that is not its own (here: the oldest keys)",
                Edit(step, run, "reuse = mx.broadcast_to(mx.arange(min(self.self_attn.indexer.topk, cache.length + x.shape[1])), "
                     "(*x.shape[:2], min(self.self_attn.indexer.topk, cache.length + x.shape[1]))) "
                     f"if reuse is None and self.runs_indexer else reuse; {run}"), stage="mtp step 3 hidden", shows=SPARSE,
                origin="ROCm/ATOM 1362",
                corrected="mtp step 0 hidden; the short prompt is asked first, whose drafts pass index_topk at step 3")
    yield fault("mtp-reuse-skips-key-write", "steps that reuse a selection do not append their indexer key",
                Edit("block.DecoderLayer.__call__", "if self.runs_indexer:", "if self.runs_indexer and not reuse:"),
                stage="mtp cache, indexer keys", shows="second draft on", origin="xllm 2339")
    yield fault("mtp-selects-anew", "later steps make their own selection instead of the first one's",
                Edit(draft, "if reuse is None and self.args.mtp_reuses_selection:", "if False:"), stage="mtp step 1 hidden",
                shows=SPARSE)
    yield fault("mtp-reuses-the-first-query", "the selection reused is the first query's, not the last one's",
                Edit("mtp.last_selection", "selection[:, -1:]", "selection[:, :1]"), stage="mtp step 1 hidden", shows=SPARSE)
    yield fault("mtp-hidden-before-norm", "the next step is fed the hidden before the shared-head norm",
                Edit(step, "return tap(", "self._raw = x; return tap("),
                Edit(draft, "hidden = out[:, -1:]", "hidden = mtp._raw[:, -1:]"), stage="mtp step 1 hidden")
    yield fault("mtp-keeps-the-first-hidden", "each step is fed the main model's hidden",
                Edit(draft, "hidden = out[:, -1:]", "hidden = hidden[:, -1:]"), stage="mtp step 1 hidden")
    yield fault("mtp-feeds-the-same-token", "each step is fed the first step's token",
                Edit(draft, "tokens = choose(step, logits[:, -1])[:, None]", "tokens = tokens[:, -1:]"),
                stage="mtp step 1 tokens",
                corrected="mtp step 1 hidden, until the tokens that a step was fed were compared before it")
    yield fault("mtp-first-embedding-kept", "the embedding at position 0 is kept where it is to be zero",
                Edit("model.Model._draft_embeddings", "if not self.args.mtp_zero_first_embedding:", "if True:"),
                stage="mtp step 0 hidden", shows="mtp_zero_first_embedding")
    yield fault("mtp-own-embedding-ignored", "the main embedding, where the MTP layer has one of its own",
                Edit("model.Model._draft_embeddings", "self._mtp_layer().embed_tokens if", "self.model.embed_tokens if"),
                stage="mtp step 0 hidden", shows="GLM-4.7-Flash")
    yield fault("mtp-own-head-ignored", "the main head, where the MTP layer has one of its own",
                Edit(draft, "mtp.shared_head.head(out) if self.args.mtp_owns_embeddings else self.logits(out)",
                     "self.logits(out)"), stage="mtp step 0 logits", shows="GLM-4.7-Flash")
