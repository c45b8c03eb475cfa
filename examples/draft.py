"""python -m examples.draft [CHECKPOINT]: multi-token prediction, three drafts in a chain."""

import sys

import mlx.core as mx

import glm_dsa

model = glm_dsa.load(sys.argv[1] if sys.argv[1:] else "reference/trained/interleaved")

cache = model.make_cache()
prompt = mx.array([[11, 12, 13, 14]])
token = mx.argmax(model(prompt, cache)[:, -1:], axis=-1)

hidden = model.model(prompt)  # after the final norm
following = mx.concatenate([prompt[:, 1:], token], axis=1)
mtp_cache = model.make_mtp_cache()
drafts = model.draft(hidden, following, mtp_cache, steps=3, main=cache)
mtp_cache.trim(2)  # what the chain wrote; accepted tokens are handed in again, with the main model's hidden
print("drafts:", [mx.argmax(draft.logits[0, -1]).item() for draft in drafts])
