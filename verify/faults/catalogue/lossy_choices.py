"""A choice that loses some of the best, and weights that lose digits: seen only where scores lie close, or biases are large."""

from __future__ import annotations

from collections.abc import Iterator

from ..edits import Edit
from ..fault import INDEXER, ROUTER, SPARSE, Fault

# fmt: off


def faults() -> Iterator[Fault]:
    best, every = "indexer.Indexer.best", "every.shape[-1]"
    far = "T well above index_topk, clustered scores"

    def overflow(name: str, what: str, room: str, **more: str) -> Fault:
        """Sought among the keys whose upper bits (sign, exponent, two of the fraction) rank first; of equal ones, the earlier."""
        kept = (f"size = {every}; room = min({room}, size); coarse = (every >> 53 << 32) | (every & LAST); "
                "every = mx.take_along_axis(every, mx.argpartition(coarse, kth=size - room, axis=-1)[..., size - room :], "
                f"axis=-1); rest = {every} - self.topk")
        edit = Edit(best, f"rest = {every} - self.topk", kept)
        return Fault(name, "indexer", what, (edit,), INDEXER, "self_attn.indexer.topk", far, **more)

    sglang = "sglang 37591"
    yield overflow("topk-bucket-overflow", "winners are lost when the bucket of their upper bits overflows: room for 2 index_topk",
                   "2 * self.topk", origin=sglang)
    yield overflow("topk-bucket-overflow-at-8", "as above, with room for 8 index_topk", "8 * self.topk", origin=sglang)
    yield overflow("topk-bucket-overflow-at-31", "as above, with room for 31 index_topk", "31 * self.topk", origin=sglang)
    yield overflow("topk-bucket-overflow-by-one", "as above, with room for all keys but one", f"{every} - 1")
    yield Fault("indexer-tiles-overflow", "indexer", "a tile of keys behind the first hands on half of index_topk at most",
                (Edit("indexer.Indexer.select_tiled", "[*best, ranks(scores, columns)]",
                      "[*best, mx.sort(ranks(scores, columns), axis=-1)[..., -max(self.topk // 2, 1) :]] if best "
                      "else [ranks(scores, columns)]"),), INDEXER, "self_attn.indexer.topk", "contexts in tiles")
    yield Fault("indexer-eps-zero", "indexer", "LayerNorm eps never set: 0 (mlx refuses 0 itself)",
                (Edit("indexer.Indexer.__init__", "eps=args.indexer_norm_eps", "eps=1e-30"),), INDEXER, "self_attn.indexer.k",
                "keys of small variance", "llama.cpp today")
    yield Fault("indexer-sink-forced", "indexer", "the first token is forced into every selection",
                (Edit("indexer.ranks", "(scores + 0.0)",
                      "mx.where(mx.arange(columns.start, columns.stop) == 0, mx.array(mx.inf), scores + 0.0)"),), INDEXER,
                "self_attn.indexer.topk", SPARSE, "ik_llama.cpp --dsa")
    yield Fault("router-weights-from-biased", "router", "weights recovered as (score + bias) - bias",
                (Edit("moe.Router.__call__", "mx.take_along_axis(scores, experts, axis=-1)",
                      "mx.take_along_axis(scores + self.e_score_correction_bias, experts, axis=-1) "
                      "- self.e_score_correction_bias[experts]"),), ROUTER, "mlp.gate.weights", "large biases; slightly",
                "flashinfer 3875")
