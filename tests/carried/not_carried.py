"""The faults of the catalogue that HF's modules are not given, and why: an uncached pass of them over a whole prompt, in float32,
cannot have most of these."""

_WHY = {
    "no output can change": "indexer-width-not-scaled indexer-heads-not-scaled indexer-mirrored indexer-selection-reversed "
    "router-choice-reversed rope-positions-from-one mtp-position-of-the-next-token latent-doubled-scale-halved",
    "a cache's, or of the second call on": "indexer-caches-zeros rope-offset-after-cache trim-main-only trim-one-too-few "
    "growth-loses-a-token extract-takes-a-pad filter-forgets-index-keys rows-packed-from-one-column saved-without-its-start "
    "start-forgotten-in-a-batch",
    "of a packed cache": "kv-bits-no-op kv-quantizes-indexer kv-own-tokens-in-float kv-biases-forgotten kv-scales-in-16-bit "
    "kv-four-bits-for-eight kv-starts-late kv-takes-the-next-token",
    "of batches or padding": "one-rows-selection-for-all take-from-the-first-row pads-are-seen positions-count-pads "
    "right-padding-stays topk-unmasked-decode filter-drops-announced-padding",
    "HF has neither the absorbed nor the gathered form": "absorbed-scale-of-latent absorbed-value-from-the-end gathered-unscaled "
    "take-one-further",
    "HF scores all queries and keys at once: there are no blocks and tiles": "indexer-blocks-share-a-mask "
    "indexer-tiles-forget indexer-tiles-count-from-zero indexer-tiles-overflow",
    "it asks for an indexer whose tensors no checkpoint has: HF would draw them at random": "indexer-on-shared-layers "
    "schedule-offset-ignored",
    "of a file format: HF is handed what is unpacked": "fp8-scale-missed fp8-scale-inverted",
    "from some size on, which no pass there reaches": "experts-unordered-from-8192-pairs own-chunk-unseen-from-513-queries "
    "tiles-forget-at-64-index-topk ninth-row-takes-the-eighth-s-keys router-unnormalized-from-1024-tokens "
    "expanded-unmasked-from-1024-queries absorbed-zeros-from-100000-keys drafts-joined-with-the-first-of-1024-tokens "
    "gather-columns-in-16-bit growth-beyond-16k-loses-a-token trim-of-packed-in-16-bit ninth-row-filtered-as-the-eighth "
    "saved-cache-ends-at-131072 pads-in-16-bit token-ids-in-16-bit draft-choice-in-16-bit packed-experts-in-7-bit "
    "embeddings-of-long-chunks-ignored",
    "HF has no MTP step": "mtp-dropped mtp-concat-order mtp-norms-swapped mtp-head-norm-skipped mtp-uses-main-selection "
    "mtp-reuse-skips-key-write mtp-selects-anew mtp-reuses-the-first-query mtp-hidden-before-norm mtp-keeps-the-first-hidden "
    "mtp-feeds-the-same-token mtp-first-embedding-kept mtp-own-embedding-ignored mtp-own-head-ignored mtp-enorm-magnitude "
    "mtp-hnorm-magnitude mtp-head-norm-magnitude",
    "of a model in 16 bit: in float32 it is no mistake": "router-logits-in-the-models-dtype "
    "correction-bias-in-the-models-dtype router-chooses-in-the-models-dtype routing-weights-in-the-models-dtype "
    "experts-summed-in-the-models-dtype head-weights-in-the-models-dtype indexer-scores-in-the-models-dtype "
    "rope-angles-in-the-models-dtype",
    "not carried yet: of scores that lie close, large biases, norm weights near 0 or below": "topk-bucket-overflow "
    "topk-bucket-overflow-at-8 topk-bucket-overflow-at-31 topk-bucket-overflow-by-one router-weights-from-biased "
    "norm-weight-magnitude norm-weight-floored q-latent-norm-clamped kv-latent-norm-magnitude indexer-norm-magnitude",
    "not carried yet: a sibling of it is": "indexer-eps-zero indexer-sink-forced norm-one-plus-weight",
}
NOT_CARRIED = {name: why for why, names in _WHY.items() for name in names.split()}
