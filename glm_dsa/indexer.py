"""The lightning indexer (DeepSeek-V3.2, section 2.1): which keys each query attends to.

    I[t, s] = sum_h w[t, h] * relu(q[t, h] . k[s]) / sqrt(D),   selection[t] = the top index_topk of I[t, s <= t]

Of equal scores the earlier key's is the better one, so that the selection is one and the same however the work is cut.
DeepSeek rotates q and k by a Hadamard matrix before quantizing them; it is orthogonal on both sides and left out.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from .cache import LayerCache
from .config import ModelArgs
from .mask import CausalMask
from .rope import Rotation, rotate
from .tiles import elements, ranges, transposed
from .trace import is_listening, tap

WIDEST = 4  # times index_topk: the width of a tile of keys, beside which what the best so far cost is little
LOWEST = float(mx.finfo(mx.float32).min)
LAST = (1 << 31) - 1  # a column's rank among equals counts down from here


class Indexer(nn.Module):
    """Scores every key for every query and selects the best. Only full layers have one.

    Scores are float32 whatever the model's dtype, as in HF. RoPE turns the FIRST qk_rope_head_dim of each head.
    """

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.heads, self.width = args.index_n_heads, args.index_head_dim
        self.rotary, self.layout, self.topk = args.qk_rope_head_dim, args.indexer_rope, args.index_topk
        self.wq_b = nn.Linear(args.q_lora_rank, self.heads * self.width, bias=False)
        self.wk = nn.Linear(args.hidden_size, self.width, bias=False)
        self.k_norm = nn.LayerNorm(self.width, eps=args.indexer_norm_eps)
        self.weights_proj = nn.Linear(args.hidden_size, self.heads, bias=False)

    def __call__(
        self, x: mx.array, q_latent: mx.array, keys: mx.array, rotation: Rotation, mask: CausalMask
    ) -> mx.array | None:
        """x [B, S, hidden], q_latent [B, S, Q], keys [B, T, D] -> selection int [B, S, K], or None where T <= K: all keys.

        Ascending. A selected key may still be masked (early rows have fewer than K valid keys): attention masks again.
        """
        if keys.shape[1] <= self.topk:
            return tap(self, "topk", None)
        queries, weights = self.project_queries(q_latent, rotation), self.head_weights(x)
        # Ranks are made of bits: nothing is differentiated from here on.
        queries, keys, weights = map(mx.stop_gradient, (queries, keys, weights))
        return tap(self, "topk", self.select_tiled(queries, keys, weights, mask))

    def keys_so_far(self, x: mx.array, rotation: Rotation, cache: LayerCache | None) -> mx.array:
        """[B, S, hidden] -> the keys of x behind those in the cache, which keeps them: [B, T, D], normalized and rotated."""
        k = self.k_norm(self.wk(x))[:, :, None]
        k = k.astype(self.k_norm.weight.dtype)  # an indexer in another 16-bit dtype than x would make float32
        k = tap(self, "k", self._rotate_first(k, rotation)[:, :, 0])
        return k if cache is None else cache.append_index_keys(k)

    def project_queries(self, q_latent: mx.array, rotation: Rotation) -> mx.array:
        """[B, S, Q] -> [B, S, H, D], rotated."""
        q = self.wq_b(q_latent).reshape(*q_latent.shape[:2], self.heads, self.width)
        return tap(self, "q", self._rotate_first(q, rotation))

    def head_weights(self, x: mx.array) -> mx.array:
        """[B, S, hidden] -> [B, S, H] float32: how much each head's opinion counts."""
        return tap(self, "weights", self.weights_proj(x.astype(mx.float32)) * self.heads**-0.5)

    def select_tiled(self, q: mx.array, k: mx.array, w: mx.array, mask: CausalMask) -> mx.array:
        """q [B, S, H, D], k [B, T, D], w [B, S, H] -> int [B, S, K], ascending: score() in tiles of queries and keys, with
        the best so far carried from tile to tile. In one tile while somebody hears scores: a stage is one array."""
        batch, length = q.shape[:2]
        block, width = (length, k.shape[1]) if is_listening("scores") else self.tile(batch, length)
        selections: list[mx.array] = []
        for rows in ranges(length, block):
            part = slice(rows.start, rows.stop)
            best: list[mx.array] = []
            seen = min(k.shape[1], max(mask.first + rows.stop, self.topk))  # no query of these sees later keys
            for columns in ranges(seen, width):
                # Each tile waits for the one before; evaluating here instead would forbid mx.grad and mx.compile.
                queries, keys = q[:, part], k[:, columns.start : columns.stop]
                if before := best or selections[-1:]:
                    queries, keys = mx.depends([queries, keys], before)
                scores = tap(self, "scores", self.score(queries, keys, w[:, part], mask.tile(rows, columns)))
                best = [self.best([*best, ranks(scores, columns)])]
            selections.append(mx.sort(LAST - best[0].astype(mx.uint32), axis=-1))
        return selections[0] if len(selections) == 1 else mx.concatenate(selections, axis=1)

    def tile(self, batch: int, length: int) -> tuple[int, int]:
        """Queries and keys at a time: per-head scores of so many are held at once."""
        most = elements() // (batch * self.heads)
        block = min(length, max(1, most // (WIDEST * self.topk)))
        return block, max(WIDEST * self.topk, most // block)

    def score(self, q: mx.array, k: mx.array, w: mx.array, mask: mx.array | None) -> mx.array:
        """q [B, S, H, D], k [B, T, D], w [B, S, H], mask bool [1 or B, S, T] -> I [B, S, T] float32, -inf where masked."""
        batch, length, heads, width = q.shape
        q = q.astype(mx.float32).reshape(batch, length * heads, width)
        per_head = (q @ transposed(k.astype(mx.float32))) * width**-0.5  # [B, S*H, T]
        per_head = mx.maximum(per_head, 0).reshape(batch, length, heads, -1)
        # A matmul sums the heads: mx.sum over a middle axis of very large arrays returned zeros on Metal (mlx 3784).
        scores = (w[:, :, None] @ per_head)[:, :, 0]  # [B, S, T]
        # What overflows is the worst of what may be seen, and still before what may not.
        scores = mx.where(scores >= LOWEST, scores, LOWEST)
        return scores if mask is None else mx.where(mask, scores, -mx.inf)

    def best(self, ranked: list[mx.array]) -> mx.array:
        """int64 [B, S, any] of ranks -> [B, S, K]: the K highest, in no order."""
        every = ranked[0] if len(ranked) == 1 else mx.concatenate(ranked, axis=-1)
        rest = every.shape[-1] - self.topk
        return every if rest <= 0 else mx.partition(every, kth=rest, axis=-1)[..., rest:]

    def _rotate_first(self, x: mx.array, rotation: Rotation) -> mx.array:
        turned, rest = mx.split(x, [self.rotary], axis=-1)
        return mx.concatenate([rotate(turned, rotation, self.layout), rest], axis=-1)


def ranks(scores: mx.array, columns: range) -> mx.array:
    """float32 [B, S, t] of these columns -> int64, no two alike in a row: ordered as the scores; of equal ones the earlier."""
    bits = (scores + 0.0).view(mx.int32)  # -0 becomes 0
    ordered = bits ^ ((bits >> 31) & LAST)  # of negative floats the bits count backwards
    among_equals = LAST - mx.arange(columns.start, columns.stop, dtype=mx.int64)
    return (ordered.astype(mx.int64) << 32) | among_equals
