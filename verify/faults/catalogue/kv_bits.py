"""Of the int8 latent cache."""

from __future__ import annotations

from collections.abc import Iterator

from ..edits import Edit
from ..fault import INT8, Fault

# fmt: off


def faults() -> Iterator[Fault]:
    append, pack, unpack = "store.LatentStore.append", "store.KvQuantization.pack", "store.KvQuantization.unpack"
    packing = "mx.quantize(values, group_size=self.group_size, bits=self.bits)"

    def fault(name: str, what: str, *edits: Edit, stage: str, shows: str = "--kv-bits", **more: str):
        return Fault(name, "int8 cache", what, edits, INT8, stage, shows, **more)

    yield fault("kv-bits-no-op", "KV quantization asked for and silently not done",
                Edit(append, "if self.quantization is None:", "if True:"), stage="cache", origin="mlx-lm 1558, 1323")
    yield fault("kv-quantizes-indexer", "the indexer's keys are quantized too",
                Edit("cache.LayerCache.append_index_keys", "self.index_keys.append(keys)",
                     "self.index_keys.append(keys if self.quantization is None else KvQuantization(8, 32).rounded("
                     "mx.pad(keys, [(0, 0), (0, 0), (0, -keys.shape[-1] % 32)]))[..., : keys.shape[-1]])"),
                stage="cache.index_keys", shows="selection flips", origin="other GLM-5.2 builds")
    yield fault("kv-own-tokens-in-float", "a call's tokens are packed after they have been attended to",
                Edit("cache.LayerCache.append", "return self.latents",
                     "return LatentStore.of(mx.concatenate([self.latents.read()[:, : -joined.shape[1]], joined], axis=1))"),
                stage="self_attn.heads", origin="mlx-lm's switch after each chunk")
    yield fault("kv-biases-forgotten", "unpacked without biases",
                Edit(unpack, "(words, scales, biases,", "(words, scales, mx.zeros_like(biases),"), stage="cache")
    yield fault("kv-scales-in-16-bit", "scales and biases in 16 bit in a float32 model",
                Edit(pack, f"return {packing}",
                     f"return [a.astype(mx.bfloat16).astype(a.dtype) if i else a for i, a in enumerate({packing})]"),
                stage="cache.scales")
    yield fault("kv-four-bits-for-eight", "packed to 4 bits whatever is asked for", Edit(pack, "bits=self.bits", "bits=4"),
                Edit(unpack, "bits=self.bits", "bits=4"), stage="cache.words")
    yield fault("kv-starts-late", "the first token to be packed is not",
                Edit("cache.LayerCache._first", "start + pads", "start + 1 + pads"), stage="cache", shows="--quantized-kv-start")
    yield fault("kv-takes-the-next-token", "unpacking what was selected reads one further",
                Edit("store.LatentStore.take", "mx.maximum(tokens - begin, 0)",
                     "mx.minimum(mx.maximum(tokens + 1 - begin, 0), self.packed.length - 1)"), stage="cache",
                shows="--kv-bits, decode beyond index_topk")
