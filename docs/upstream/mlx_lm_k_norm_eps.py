"""mlx-lm, models/deepseek_v32.py: the indexer's k_norm is built with the default eps of 1e-5; the reference has 1e-6.

Expected: `nn.LayerNorm(self.head_dim, eps=1e-6)`, as transformers' GlmMoeDsaIndexer and DeepseekV32Indexer have it.
Matters where indexer keys are small before the norm (their variance is of the order of the eps): other keys are selected, and
only beyond index_topk tokens. On keys of unit variance nothing shows. Runs on a CPU; needs mlx-lm alone.
"""

import sys

import mlx.core as mx
from mlx_lm.models.deepseek_v32 import Indexer, ModelArgs


def bug() -> str:
    """What is wrong; empty where it was mended."""
    args = ModelArgs(
        hidden_size=64, index_head_dim=32, index_n_heads=16, index_topk=16, q_lora_rank=48, qk_rope_head_dim=16
    )
    mx.random.seed(0)
    indexer = Indexer(args)
    indexer.k_norm.bias = (
        mx.random.normal((32,)) * 0.3
    )  # trained norms have one: without it a common factor cancels out
    indexer.wk.weight = mx.random.normal((32, 64)) * 64**-0.5 * 0.003  # small keys: a variance of about 1e-5
    x, qr = mx.random.normal((1, 128, 64)), mx.random.normal((1, 128, 48))
    causal = mx.tril(mx.ones((128, 128), mx.bool_))
    selections = []
    for eps in (indexer.k_norm.eps, 1e-6):
        indexer.k_norm.eps = eps
        selections.append([set(row) for row in indexer(x, qr, causal)[0, 0, 32:].tolist()])
    same = sum(len(a & b) for a, b in zip(*selections, strict=True)) / (16 * len(selections[0]))
    return "" if same == 1 else f"k_norm.eps is not 1e-6: {same:.0%} of the selected keys are those of eps 1e-6"


if __name__ == "__main__":
    print(bug() or "mended")
    sys.exit(bool(bug()))
