"""mlx-lm, generate.py, maybe_quantize_kv_cache: `kv_bits` does nothing on glm_moe_dsa, in silence.

Expected: a packed cache, or an error. Its layers keep a CacheList, which has no `to_quantized`, so that every one is passed
over: the bytes and the logits of the cache are those of 16 bit. Runs on a CPU; needs mlx-lm alone.
"""

import sys

import mlx.core as mx
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.glm_moe_dsa import Model, ModelArgs

SMALL = {
    "model_type": "glm_moe_dsa", "vocab_size": 128, "hidden_size": 64, "index_head_dim": 64, "index_n_heads": 16, "index_topk": 16,
    "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "n_shared_experts": 1, "n_routed_experts": 8, "routed_scaling_factor": 2.5, "kv_lora_rank": 64,
    "q_lora_rank": 48, "qk_rope_head_dim": 64, "v_head_dim": 32, "qk_nope_head_dim": 32, "topk_method": "noaux_tc",
    "scoring_func": "sigmoid", "norm_topk_prob": True, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
    "moe_layer_freq": 1, "first_k_dense_replace": 1, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "attention_bias": False,
}  # fmt: skip


def bug() -> str:
    """What is wrong; empty where it was mended."""
    model = Model(ModelArgs.from_dict(SMALL))
    cache = model.make_cache()
    mx.eval(model(mx.arange(64)[None], cache=cache))
    before = sum(entry.nbytes for entry in cache)
    maybe_quantize_kv_cache(cache, 0, 64, 8)
    after = sum(entry.nbytes for entry in cache)
    return "" if after < before else f"kv_bits=8: the cache takes {after:,} bytes, as before, and nothing is said"


if __name__ == "__main__":
    print(bug() or "mended")
    sys.exit(bool(bug()))
