"""The bare mx primitives of each part, at the shapes of the tiles that run: the sum of their times is the floor.

Only products, softmax, the choice of the best and the gathering are in it: what makes masks, ranks and rotations, joins and
splits, is the distance to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

from glm_dsa.tiles import transposed

from .contenders import Ours
from .timing import of

ROUNDS = 5


@dataclass(frozen=True)
class Primitive:
    """seconds: of one; times: how often it runs for the chunk."""

    what: str
    seconds: float
    times: float

    @property
    def total(self) -> float:
        return self.seconds * self.times


def _timed(what: str, run, times: float) -> Primitive:
    return Primitive(what, of(run, ROUNDS).median, times)


def _random(*shape: int) -> mx.array:
    made = mx.random.normal(shape)
    mx.eval(made)
    return made


def indexer(ours: Ours, batch: int, queries: int, context: int) -> Iterator[Primitive]:
    """Scores of a tile, the sum over heads, and the best of it and of those before."""
    a, module = ours.args, ours.block.indexer
    if context <= a.index_topk:
        return
    block, width = module.tile(batch, queries)
    width = min(width, context)
    times = -(-queries // block) * context / width
    q, k = _random(batch, block * a.index_n_heads, a.index_head_dim), _random(batch, a.index_head_dim, width)
    w, scores = _random(batch, block, 1, a.index_n_heads), _random(batch, block, a.index_n_heads, width)
    yield _timed(
        f"[{block * a.index_n_heads}, {a.index_head_dim}] @ [{a.index_head_dim}, {width}]", lambda: q @ k, times
    )
    yield _timed("relu", lambda: mx.maximum(scores, 0), times)
    yield _timed("sum over heads", lambda: w @ scores, times)
    carried = a.index_topk if width < context else 0
    ranked = (_random(batch, block, width + carried) * 1e9).astype(mx.int64)
    mx.eval(ranked)
    rest = width + carried - a.index_topk
    yield _timed(f"partition of {width + carried}", lambda: mx.partition(ranked, kth=rest, axis=-1), times)
    yield from linear("wq_b, wk, weights", batch * queries, [
        (a.q_lora_rank, a.index_n_heads * a.index_head_dim), (a.hidden_size, a.index_head_dim),
        (a.hidden_size, a.index_n_heads)])  # fmt: skip


def attention(ours: Ours, batch: int, queries: int, context: int) -> Iterator[Primitive]:
    """Of the gathered form: rows taken, scores, softmax, sums."""
    a = ours.args
    width, chosen = a.kv_lora_rank + a.qk_rope_head_dim, min(a.index_topk, context)
    block = min(queries, ours.block.block(batch, chosen))
    times = queries / block
    held = _random(batch * context, width)
    picked = mx.sort(mx.random.randint(0, batch * context, (batch, block, chosen)), axis=-1)
    mx.eval(picked)
    keys, q = _random(batch, block, chosen, width), _random(batch, block, a.num_attention_heads, width)
    scores = _random(batch, block, a.num_attention_heads, chosen)
    yield _timed(f"{block} x {chosen} rows of {context} taken", lambda: mx.take(held, picked, axis=0), times)
    turned = transposed(keys)
    mx.eval(turned)
    yield _timed("scores", lambda: q @ turned, times)
    yield _timed("softmax", lambda: mx.softmax(scores, axis=-1, precise=True), times)
    yield _timed("sums", lambda: scores @ keys, times)


def projections(ours: Ours, batch: int, queries: int) -> Iterator[Primitive]:
    a = ours.args
    heads, tokens = a.num_attention_heads, batch * queries
    yield from linear("q_a, q_b, kv_a, o", tokens, [
        (a.hidden_size, a.q_lora_rank), (a.q_lora_rank, heads * a.qk_head_dim),
        (a.hidden_size, a.kv_lora_rank + a.qk_rope_head_dim), (heads * a.v_head_dim, a.hidden_size)])  # fmt: skip
    yield from linear(
        "W_uk, W_uv", tokens, [(a.qk_nope_head_dim, a.kv_lora_rank), (a.kv_lora_rank, a.v_head_dim)], heads
    )


def linear(what: str, tokens: int, maps: list[tuple[int, int]], heads: int = 1) -> Iterator[Primitive]:
    given = [(_random(heads, tokens, i), _random(heads, o, i)) for i, o in maps]
    yield _timed(what, lambda: [x @ w.swapaxes(-1, -2) for x, w in given], 1)
