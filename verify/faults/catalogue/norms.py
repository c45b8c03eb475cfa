"""Mistakes about norm weights that are near 0 or negative."""

from __future__ import annotations

from collections.abc import Iterator

from ..edits import Edit
from ..fault import ALWAYS, ATTENTION, INDEXER, LAYERS, LOGITS, MTP, Fault

# fmt: off


def faults() -> Iterator[Fault]:
    layer, negative = "block.DecoderLayer.__call__", "negative norm weights"

    def fault(name: str, component: str, what: str, edit: Edit, claim: str, stage: str, shows: str = negative) -> Fault:
        return Fault(name, component, what, (edit,), claim, stage, shows)

    def normed(norm: str, x: str, weight: str) -> str:
        return f"mx.fast.rms_norm({x}, {weight.format(f'{norm}.weight')}, {norm}.eps)"

    yield fault("norm-weight-magnitude", "decoder layer", "the magnitude of input_layernorm's weight counts, not its sign",
                Edit(layer, "self.input_layernorm(x)", normed("self.input_layernorm", "x", "mx.abs({})")), LAYERS,
                "input_layernorm")
    yield fault("norm-one-plus-weight", "decoder layer", "post_attention_layernorm times 1 + weight, as Gemma has it",
                Edit(layer, "self.post_attention_layernorm(x)", normed("self.post_attention_layernorm", "x", "1 + {}")), LAYERS,
                "post_attention_layernorm", ALWAYS)
    yield fault("norm-weight-floored", "decoder layer", "a final norm's weight below 0.01 counts as 0.01",
                Edit("model.Backbone.__call__", "self.norm(x)", normed("self.norm", "x", "mx.maximum({}, 0.01)")), LOGITS, "norm",
                "norm weights near 0 or below")
    yield fault("q-latent-norm-clamped", "MLA", "negative weights of q_a_layernorm count as 0",
                Edit("attention.MultiHeadLatentAttention.query_latent", "self.q_a_layernorm(self.q_a_proj(x))",
                     normed("self.q_a_layernorm", "self.q_a_proj(x)", "mx.maximum({}, 0)")), ATTENTION, "self_attn.q_latent")
    yield fault("kv-latent-norm-magnitude", "MLA", "the magnitude of kv_a_layernorm's weight counts",
                Edit("attention.MultiHeadLatentAttention.__call__", "self.kv_a_layernorm(latent))",
                     f"{normed('self.kv_a_layernorm', 'latent', 'mx.abs({})')})"), ATTENTION, "self_attn.kv_latent")
    yield fault("indexer-norm-magnitude", "indexer", "the magnitude of k_norm's weight counts",
                Edit("indexer.Indexer.keys_so_far", "self.k_norm(self.wk(x))",
                     "mx.fast.layer_norm(self.wk(x), mx.abs(self.k_norm.weight), self.k_norm.bias, self.k_norm.eps)"), INDEXER,
                "self_attn.indexer.k")
    for norm, x in (("enorm", "embeddings"), ("hnorm", "hidden"), ("shared_head.norm", "x")):
        name = "mtp-head-norm-magnitude" if "." in norm else f"mtp-{norm}-magnitude"
        yield fault(name, "MTP", f"the magnitude of {norm}'s weight counts",
                    Edit("mtp.MtpLayer.step", f"self.{norm}({x})", normed(f"self.{norm}", x, "mx.abs({})")), MTP,
                    "mtp step 0 hidden")
