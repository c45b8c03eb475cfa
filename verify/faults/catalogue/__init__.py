"""The faults themselves, a file for each part of the definition.

Each says beforehand where the gate must notice it: the claim, and the first stage that differs. The declarations are written
before the gate first meets the fault; where one had to be corrected afterwards, `corrected` says from what.
"""

from . import (
    attention,
    block,
    cache,
    cache_sizes,
    equivalent,
    index_share,
    indexer,
    kv_bits,
    lossy_choices,
    moe,
    mtp,
    norms,
    pairs,
    rope,
    sixteen_bit,
    sizes,
    weights,
)

PARTS = (
    indexer, index_share, rope, attention, block, moe, weights, cache, kv_bits, mtp, pairs, equivalent, lossy_choices, norms,
    sixteen_bit, sizes, cache_sizes,
)  # fmt: skip
CATALOGUE = {fault.name: fault for part in PARTS for fault in part.faults()}
# Each of these was in our definition once, seeded, while every claim agreed.
ONCE_PASSED = frozenset((
    "experts-unordered-from-8192-pairs", "own-chunk-unseen-from-513-queries", "gather-columns-in-16-bit",
    "growth-beyond-16k-loses-a-token", "tiles-forget-at-64-index-topk", "token-ids-in-16-bit",
    "router-logits-in-the-models-dtype", "indexer-scores-in-the-models-dtype", "head-weights-in-the-models-dtype",
    "topk-bucket-overflow", "topk-bucket-overflow-at-8", "topk-bucket-overflow-at-31", "router-weights-from-biased",
))  # fmt: skip
