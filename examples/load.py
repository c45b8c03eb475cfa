"""python -m examples.load [CHECKPOINT]: a prompt, a token more, and back again."""

import sys

import mlx.core as mx

import glm_dsa

# HF layout (bf16, fp16, fp32, FP8 blocks) or MLX (any bits, per module); with mlx-vlm's language_model. prefix too, experts
# or indexer fused, the MTP head as mtp.* or in a file beside (glm_dsa/layouts.py)
model = glm_dsa.load(sys.argv[1] if sys.argv[1:] else "reference/trained/interleaved")

cache = model.make_cache()
prompt = mx.array([[11, 12, 13, 14]])
logits = model(prompt, cache)  # [1, 4, V]
token = mx.argmax(logits[:, -1:], axis=-1)
logits = model(token, cache)  # decode
for layer in cache:
    layer.trim(1)  # rewind
print(f"{cache[0].length} tokens in {sum(layer.nbytes for layer in cache):,} bytes; then comes {token.item()}")
