"""Of the indexer."""

from __future__ import annotations

from collections.abc import Iterator

from ..edits import Edit
from ..fault import CACHES, INDEXER, LAYERS, SPARSE, Fault

# fmt: off


def faults() -> Iterator[Fault]:
    init, score, best = "indexer.Indexer.__init__", "indexer.Indexer.score", "indexer.Indexer.best"
    keys, weights = "indexer.Indexer.keys_so_far", "indexer.Indexer.head_weights"
    layer = "block.DecoderLayer.__call__"
    masked = "scores if mask is None else mx.where(mask, scores, -mx.inf)"

    def fault(name: str, what: str, *edits: Edit, stage: str, claim: str = INDEXER, shows: str = SPARSE, **more: str):
        return Fault(name, "indexer", what, edits, claim, f"self_attn.indexer.{stage}", shows, **more)

    yield fault("indexer-rope-layout", "half-split instead of interleaved, or the reverse",
                Edit(init, "args.indexer_rope,", "{'interleaved': 'half-split'}.get(args.indexer_rope, 'interleaved'),"),
                stage="k", origin="transformers 46842, sglang 13495, vllm 28968, mlx-lm 1431")
    yield fault("indexer-nope-first", "rotates the last dims of a head instead of the first",
                Edit("indexer.Indexer._rotate_first", "turned, rest = mx.split(x, [self.rotary], axis=-1)",
                     "rest, turned = mx.split(x, [x.shape[-1] - self.rotary], axis=-1)"),
                Edit("indexer.Indexer._rotate_first", "[rotate(turned, rotation, self.layout), rest]",
                     "[rest, rotate(turned, rotation, self.layout)]"), stage="k",
                origin="the trainer's layout, swapped on export")
    yield fault("indexer-without-rope", "neither queries nor keys are rotated",
                Edit("indexer.Indexer._rotate_first", "rotate(turned, rotation, self.layout)", "turned"), stage="k")
    yield fault("indexer-keys-unrotated", "keys are cached before RoPE",
                Edit(keys, "self._rotate_first(k, rotation)[:, :, 0]", "k[:, :, 0]"), stage="k")
    yield fault("indexer-eps", "LayerNorm eps 1e-5 instead of 1e-6", Edit(init, "eps=args.indexer_norm_eps", "eps=1e-5"),
                stage="k", shows="keys of small variance", origin="mlx-lm 1419, stock today")
    yield fault("indexer-rmsnorm", "RMSNorm instead of LayerNorm",
                Edit(keys, "self.k_norm(self.wk(x))",
                     "(mx.fast.rms_norm(self.wk(x), self.k_norm.weight, self.k_norm.eps) + self.k_norm.bias)"), stage="k",
                origin="transformers 43912, FastDeploy 7398")
    yield fault("indexer-norm-without-bias", "k_norm's bias is not loaded",
                Edit(keys, "self.k_norm(self.wk(x))", "(self.k_norm(self.wk(x)) - self.k_norm.bias)"), stage="k")
    yield fault("indexer-reads-raw-hidden", "keys are made before input_layernorm",
                Edit(layer, "keys_so_far(normed,", "keys_so_far(x,"), stage="k", claim=LAYERS)
    yield fault("indexer-weighs-raw-hidden", "head weights are made before input_layernorm",
                Edit(layer, "self.self_attn.indexer(normed,", "self.self_attn.indexer(x,"), stage="weights", claim=LAYERS)
    yield fault("indexer-query-before-norm", "queries are made of the latent before its norm",
                Edit(layer, "self.self_attn.indexer(normed, q_latent,",
                     "self.self_attn.indexer(normed, self.self_attn.q_a_proj(normed),"), stage="q", claim=LAYERS)
    yield fault("indexer-heads-transposed", "wq_b's rows are read as [width, heads]",
                Edit("indexer.Indexer.project_queries", "self.heads, self.width)", "self.width, self.heads).swapaxes(2, 3)"),
                stage="q")
    yield fault("indexer-weights-positive", "the magnitude of a head's weight counts, not its sign",
                Edit(weights, "self.weights_proj(x.astype(mx.float32))", "mx.abs(self.weights_proj(x.astype(mx.float32)))"),
                stage="weights")
    yield fault("indexer-weights-softmax", "head weights go through a softmax",
                Edit(weights, "self.weights_proj(x.astype(mx.float32)) * self.heads**-0.5",
                     "mx.softmax(self.weights_proj(x.astype(mx.float32)), axis=-1)"), stage="weights")
    yield fault("indexer-weights-in-bf16", "head weights in the model's 16 bit, not in float32",
                Edit(weights, "self.weights_proj(x.astype(mx.float32))",
                     "self.weights_proj(x).astype(mx.bfloat16).astype(mx.float32)"), stage="weights", shows="near ties")
    yield fault("indexer-no-relu", "score without the ReLU", Edit(score, "mx.maximum(per_head, 0)", "per_head"), stage="scores",
                origin="transformers 44360")
    yield fault("indexer-relu-after-sum", "ReLU on the sum over heads, not on each head",
                Edit(score, "mx.maximum(per_head, 0)", "per_head"),
                Edit(score, "(w[:, :, None] @ per_head)[:, :, 0]", "mx.maximum((w[:, :, None] @ per_head)[:, :, 0], 0)"),
                stage="scores")
    yield fault("indexer-per-head-topk", "no sum over heads: one head selects for all",
                Edit(score, "(w[:, :, None] @ per_head)[:, :, 0]", "w[:, :, :1] * per_head[:, :, 0]"), stage="scores",
                origin="mlx-lm 531")
    yield fault("indexer-unweighted", "heads are summed without their weights",
                Edit(score, "(w[:, :, None] @ per_head)[:, :, 0]", "per_head.sum(axis=2)"), stage="scores")
    yield fault("indexer-queries-in-bf16", "scores in 16 bit",
                Edit(score, "q = q.astype(mx.float32)", "q = q.astype(mx.bfloat16).astype(mx.float32)"), stage="scores",
                shows="near ties")
    yield fault("indexer-selects-padding", "a masked key scores 0, which beats a negative score",
                Edit(score, masked, "scores if mask is None else mx.where(mask, scores, 0.0)"), stage="scores",
                shows="early or padded rows", origin="pypto-lib 368")
    yield fault("indexer-ignores-mask", "keys of the future and pads are scored too", Edit(score, masked, "scores"),
                stage="scores")
    yield Fault("bool-mask-added", "mask", "a boolean mask is added to the scores",
                (Edit(score, masked, "scores if mask is None else scores + mask"),), INDEXER, "self_attn.indexer.scores",
                "padded or chunked prefill", "transformers 48363")
    yield fault("indexer-topk-off-by-one", "selects index_topk - 1 keys",
                Edit(best, "rest = every.shape[-1] - self.topk", "rest = every.shape[-1] - self.topk + 1"),
                stage="topk")
    yield fault("indexer-selects-worst", "the lowest scores are selected",
                Edit("indexer.ranks", "(scores + 0.0)", "(0.0 - scores)"), stage="topk")
    yield fault("indexer-selects-recent", "the most recent keys, as a sliding window has them",
                Edit("indexer.ranks", "(scores + 0.0)",
                     "mx.where(mx.isinf(scores), scores, mx.arange(columns.start, columns.stop))"), stage="topk")
    yield fault("indexer-dense-up-to-twice-topk", "selection begins at 2 index_topk only",
                Edit("indexer.Indexer.__call__", "keys.shape[1] <= self.topk", "keys.shape[1] <= 2 * self.topk"), stage="topk",
                shows="index_topk < T <= 2 index_topk")
    yield fault("indexer-blocks-share-a-mask", "each block of queries is masked as the last one",
                Edit("indexer.Indexer.select_tiled", "mask.tile(rows, columns)",
                     "mask.tile(range(length - len(rows), length), columns)"),
                stage="topk", shows="prompts in blocks")
    yield fault("indexer-tiles-forget", "each tile of keys that is wide enough drops the best of those before it",
                Edit("indexer.Indexer.select_tiled", "[*best, ranks(scores, columns)]",
                     "[ranks(scores, columns)] if len(columns) >= self.topk else [*best, ranks(scores, columns)]"),
                stage="topk", shows="contexts in tiles")
    yield fault("indexer-tiles-count-from-zero", "each tile of keys counts its columns from 0",
                Edit("indexer.Indexer.select_tiled", "ranks(scores, columns)", "ranks(scores, range(len(columns)))"),
                stage="topk", shows="contexts in tiles")
    yield Fault("indexer-caches-zeros", "cache", "stores zeros instead of indexer keys",
                (Edit("cache.LayerCache.append_index_keys", "self.index_keys.append(keys)",
                      "before = self.index_keys.length; self.index_keys.append(mx.zeros_like(keys))"),
                 Edit("cache.LayerCache.append_index_keys", "return self.index_keys.read()[0]",
                      "return mx.concatenate([self.index_keys.read()[0][:, :before], keys], axis=1)")),
                CACHES, "self_attn.indexer.topk", "decode beyond index_topk", "mlx-lm 664",
                corrected="logits; since then a chunked run that differs is asked once more, choice by choice")
