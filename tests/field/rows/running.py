"""The definition called as engines call it: caches, drafts and tokens that cannot be are refused in a line, before any work."""

import mlx.core as mx
import numpy as np

from ..asking import ran
from ..makers import tiny
from ..row import UNREADABLE, Row

PROMPT = list(range(3, 43))


def called(tokens):
    return ran(lambda model: mx.eval(model(mx.array(tokens))))


def padded_batch_emptied_by_one(model):
    """Two rows are announced with padding, one leaves before anything was cached; its like, alone, is the measure."""
    alone = np.array(model(mx.array([PROMPT])).astype(mx.float32))
    cache = model.make_cache(left_padding=[4, 9])
    for entry in cache:
        entry.filter([1])
    rows = mx.array([[0] * 9 + PROMPT])
    found = np.array(model(rows, cache=cache).astype(mx.float32))[:, 9:]
    error = float(np.abs(found - alone).max())
    assert error < 0.05 * np.abs(alone).max(), f"logits off by {error:.2f} behind padding that was announced"


def behind_a_restored_cache(model):
    """The main cache holds a prompt, the MTP cache none of it; the drafter is handed both."""
    cache = model.make_cache()
    hidden = model.model(mx.array([PROMPT]), cache=cache)
    drafted = model.draft(hidden[:, -1:], mx.array([[7]]), model.make_mtp_cache(), 1, main=cache)
    mx.eval([draft.logits for draft in drafted])


def in_step(model):
    """Prompt and draft from the beginning: nothing lags."""
    tokens = mx.array([PROMPT])
    cache, mtp = model.make_cache(), model.make_mtp_cache()
    hidden = model.model(tokens, cache=cache)
    mx.eval([d.logits for d in model.draft(hidden, mx.array([[*PROMPT[1:], 7]]), mtp, 1, main=cache)])


ROWS = [
    Row(
        "padding announced, then a row leaves", "continuous batching filters a batch before it ran", "D15", tiny(),
        ran(padded_batch_emptied_by_one),
    ),
    Row(
        "draft behind a restored prompt cache",
        "the main cache came from a file, the drafter's is empty: other drafts, unseen", "D16, sgl-project/sglang#28895",
        tiny(), ran(behind_a_restored_cache), code=UNREADABLE, says=("cache",),
    ),
    Row(
        "draft from the beginning", "both caches have seen the prompt", "D16", tiny(), ran(in_step),
    ),
    Row(
        "token beyond the vocabulary", "a tokenizer of another release", "D17", tiny(), called([[3, 320]]), code=UNREADABLE,
        says=("320",),
    ),
    Row(
        "negative token", "-1 as padding, as other libraries have it", "D17", tiny(), called([[3, -1]]), code=UNREADABLE,
        says=("-1",),
    ),
    Row(
        "no tokens", "an empty prompt", "D17", tiny(), ran(lambda model: mx.eval(model(mx.zeros((1, 0), mx.int32)))),
        code=UNREADABLE, says=("token",),
    ),
    Row(
        "tokens of one dimension", "the batch forgotten", "D17", tiny(), called([3, 4, 5]), code=UNREADABLE,
        says=(r"\[3\]|\(3,?\)|dimension|batch",),
    ),
    Row(
        "last token of the vocabulary", "319 of 320: the near relative of 320", "D17", tiny(), called([[3, 319]]),
    ),
    Row(
        "one token", "the shortest prompt", "D17", tiny(), called([[3]]),
    ),
]  # fmt: skip
