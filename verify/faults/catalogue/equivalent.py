"""Changes that no output can show."""

from __future__ import annotations

from collections.abc import Iterator

from ..edits import Edit
from ..fault import ATTENTION, INDEXER, MTP, ROPE, SPARSE, Fault

# fmt: off


def faults() -> Iterator[Fault]:
    order = "index scores are compared with each other only, and a positive factor keeps their order"
    shift = "rotations are orthogonal: R(p) q . R(s) k = q . R(s - p) k, so that a shift of all positions cancels in each score"
    yield Fault("indexer-width-not-scaled", "indexer", "scores without 1 / sqrt(D)",
                (Edit("indexer.Indexer.score", " * width**-0.5", ""),), INDEXER, "self_attn.indexer.scores", SPARSE,
                equivalent=order)
    yield Fault("indexer-heads-not-scaled", "indexer", "head weights without 1 / sqrt(H)",
                (Edit("indexer.Indexer.head_weights", " * self.heads**-0.5", ""),), INDEXER, "self_attn.indexer.weights", SPARSE,
                equivalent=order)
    yield Fault("indexer-mirrored", "indexer", "queries and keys both negated",
                (Edit("indexer.Indexer._rotate_first", "return mx.concatenate(", "return -mx.concatenate("),), INDEXER,
                "self_attn.indexer.k", SPARSE,
                equivalent="(-q) . (-k) = q . k; so for any orthogonal matrix, DeepSeek's Hadamard too")
    yield Fault("indexer-selection-reversed", "indexer", "selected keys in another order",
                (Edit("indexer.Indexer.best", "[..., rest:]", "[..., rest:][..., ::-1]"),
                 Edit("indexer.Indexer.select_tiled", "mx.sort(LAST - best[0].astype(mx.uint32), axis=-1)",
                      "LAST - best[0].astype(mx.uint32)")), INDEXER, "self_attn.indexer.topk", SPARSE,
                equivalent="attention sums over the selected set; its order changes rounding only")
    yield Fault("router-choice-reversed", "router", "chosen experts in another order",
                (Edit("moe.Router.choose", "axis=-1)[..., : self.topk]", "axis=-1)[..., : self.topk][..., ::-1]"),), "", "",
                equivalent="experts and their weights are permuted alike, and summed; the order changes rounding only")
    yield Fault("rope-positions-from-one", "rope", "positions count from 1",
                (Edit("rope.RotaryEmbedding.__call__", "positions.astype(mx.float32)", "(positions + 1).astype(mx.float32)"),),
                ROPE, "position", equivalent=shift)
    yield Fault("mtp-position-of-the-next-token", "MTP", "token t+1 is fed at position t+1, not t",
                (Edit("model.Model.draft", "rotation, mask = self.model.rotation_and_mask(tokens.shape[1], cache)",
                      "length = tokens.shape[1]; "
                      "rotation, mask = self.model._rotary(positions(length, cache) + 1), cache.mask(length)"),),
                MTP, "mtp cache", equivalent=shift + "; the MTP layer's keys are all its own",
                corrected="nowhere; the keys that are written show it")
    yield Fault("latent-doubled-scale-halved", "MLA", "query latent times 2, softmax scale divided by 2",
                (Edit("attention.MultiHeadLatentAttention.query_latent", "self.q_a_layernorm(self.q_a_proj(x))",
                      "2 * self.q_a_layernorm(self.q_a_proj(x))"),
                 Edit("attention.MultiHeadLatentAttention.__init__", "softmax_scale(args)", "softmax_scale(args) / 2")),
                ATTENTION, "self_attn.q_latent",
                equivalent="W_uq is linear and 2 is exact: attention's scores keep every bit; index scores double in order")
