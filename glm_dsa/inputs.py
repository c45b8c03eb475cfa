"""What a model can be run on: token ids of its vocabulary, or embeddings of its width.

Shape and dtype are checked at every call: they are known without computing. Values are where that costs nothing that
counts: of a prompt. A decode step's token comes from this model's own logits, and to look at it would wait for the step before.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from .errors import InputError


def check_tokens(tokens: mx.array, vocabulary: int, first: bool) -> None:
    """tokens: int [B, S]. `first`: nothing came before. Values are checked of several tokens, and of a first one.

    Raises `InputError`.
    """
    if tokens.ndim != 2 or not tokens.size:
        more = "; tokens[None] is a batch of one" if tokens.ndim == 1 and tokens.size else ""
        raise InputError(f"tokens of shape {list(tokens.shape)}: expected [B, S] with at least one token{more}")
    if not mx.issubdtype(tokens.dtype, mx.integer):
        raise InputError(f"tokens of {tokens.dtype}: expected integers, ids from 0 to {vocabulary - 1:,}")
    if tokens.shape[1] > 1 or first:
        _check_values(tokens, vocabulary)


def check_embeddings(embeddings: mx.array, tokens: mx.array, width: int, what: str = "input_embeddings") -> None:
    """embeddings: float [B, S, width]; of the tokens only the shape counts here, [B, S] or [B, 0]. Raises `InputError`."""
    shape, ids = list(embeddings.shape), list(tokens.shape)
    if len(shape) != 3 or shape[2] != width or not embeddings.size:
        raise InputError(f"{what} of shape {shape}: expected [B, S, {width}] with at least one token")
    if ids not in (shape[:2], [shape[0], 0]):
        raise InputError(f"{what} of shape {shape} beside tokens of {ids}: expected tokens of {shape[:2]}")
    if not mx.issubdtype(embeddings.dtype, mx.floating):
        raise InputError(f"{what} of {embeddings.dtype}: expected a floating dtype")


def _check_values(tokens: mx.array, vocabulary: int) -> None:
    beyond = (tokens < 0) | (tokens >= vocabulary)
    try:
        if not beyond.any().item():
            return
    except (RuntimeError, ValueError):  # inside of mx.compile or another transformation nothing has a value yet
        return
    ids: Any = tokens.tolist()
    row, column = next(
        (r, c) for r, line in enumerate(ids) for c, token in enumerate(line) if not 0 <= token < vocabulary
    )
    raise InputError(
        f"token {ids[row][column]} at [{row}, {column}]: expected 0 to {vocabulary - 1:,}, this model's vocabulary; do tokenizer "
        "and model belong together?"
    )
