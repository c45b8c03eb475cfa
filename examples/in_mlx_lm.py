"""python -m examples.in_mlx_lm [CHECKPOINT]: mlx-lm's own functions on this definition."""

import sys

import mlx_lm

import glm_dsa.mlx_lm

glm_dsa.mlx_lm.register()  # from now on mlx_lm.load gives this definition

model, tokenizer = mlx_lm.load(sys.argv[1] if sys.argv[1:] else "reference/trained/interleaved")
text = mlx_lm.generate(model, tokenizer, "import os\nimport ", max_tokens=60)
print(text)
