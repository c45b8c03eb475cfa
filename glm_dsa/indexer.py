"""The lightning indexer (DeepSeek-V3.2, section 2.1): which keys each query attends to.

    I[t, s] = sum_h w[t, h] * relu(q[t, h] . k[s]) / sqrt(D),   selection[t] = the top index_topk of I[t, s <= t]

DeepSeek rotates q and k by a Hadamard matrix before quantizing them; it is orthogonal on both sides and left out.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from .cache import LayerCache
from .config import ModelArgs
from .rope import Rotation, rotate
from .trace import is_listening, tap

SCORE_ELEMENTS = 1 << 26  # per-head scores held at once (256 MB): long prompts go through in blocks of queries


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
        self, x: mx.array, q_latent: mx.array, keys: mx.array, rotation: Rotation, mask: mx.array | None
    ) -> mx.array | None:
        """x [B, S, hidden], q_latent [B, S, Q], keys [B, T, D] -> selection int [B, S, K], or None where T <= K: all keys.

        A selected key may still be masked (early rows have fewer than K valid keys): attention masks again.
        """
        if keys.shape[1] <= self.topk:
            return tap(self, "topk", None)
        queries, weights = self.project_queries(q_latent, rotation), self.head_weights(x)
        return tap(self, "topk", mx.stop_gradient(self.select_blockwise(queries, keys, weights, mask)))

    def keys_so_far(self, x: mx.array, rotation: Rotation, cache: LayerCache | None) -> mx.array:
        """[B, S, hidden] -> the keys of x behind those in the cache, which keeps them: [B, T, D], normalized and rotated."""
        k = self.k_norm(self.wk(x))[:, :, None]
        k = tap(self, "k", self._rotate_first(k, rotation)[:, :, 0])
        return k if cache is None else cache.append_index_keys(k)

    def project_queries(self, q_latent: mx.array, rotation: Rotation) -> mx.array:
        """[B, S, Q] -> [B, S, H, D], rotated."""
        q = self.wq_b(q_latent).reshape(*q_latent.shape[:2], self.heads, self.width)
        return tap(self, "q", self._rotate_first(q, rotation))

    def head_weights(self, x: mx.array) -> mx.array:
        """[B, S, hidden] -> [B, S, H] float32: how much each head's opinion counts."""
        return tap(self, "weights", self.weights_proj(x.astype(mx.float32)) * self.heads**-0.5)

    def select_blockwise(self, q: mx.array, k: mx.array, w: mx.array, mask: mx.array | None) -> mx.array:
        """score() and select() over blocks of queries, so that the heads' scores never stand in memory all at once.

        In one block while somebody listens: a stage is one array.
        """
        batch, length = q.shape[:2]
        block = length if is_listening() else max(1, SCORE_ELEMENTS // (batch * self.heads * k.shape[1]))
        selections: list[mx.array] = []
        for start in range(0, length, block):
            rows = slice(start, start + block)
            # Each block waits for the one before; evaluating here instead would forbid mx.grad and mx.compile.
            queries = mx.depends(q[:, rows], selections[-1]) if selections else q[:, rows]
            scores = self.score(queries, k, w[:, rows], None if mask is None else mask[:, 0, rows])
            selections.append(self.select(tap(self, "scores", scores)))
        return selections[0] if len(selections) == 1 else mx.concatenate(selections, axis=1)

    def score(self, q: mx.array, k: mx.array, w: mx.array, mask: mx.array | None) -> mx.array:
        """q [B, S, H, D], k [B, T, D], w [B, S, H], mask bool [1 or B, S, T] -> I [B, S, T] float32, -inf where masked."""
        batch, length, heads, width = q.shape
        q = q.astype(mx.float32).reshape(batch, length * heads, width)
        per_head = (q @ k.astype(mx.float32).swapaxes(-1, -2)) * width**-0.5  # [B, S*H, T]
        per_head = mx.maximum(per_head, 0).reshape(batch, length, heads, -1)
        # A matmul sums the heads: mx.sum over a middle axis of very large arrays returned zeros on Metal (mlx 3784).
        scores = (w[:, :, None] @ per_head)[:, :, 0]  # [B, S, T]
        return scores if mask is None else mx.where(mask, scores, -mx.inf)

    def select(self, scores: mx.array) -> mx.array:
        """[B, S, T] -> int [B, S, K]: the K best, in no order."""
        return mx.argpartition(-scores, kth=self.topk - 1, axis=-1)[..., : self.topk]

    def _rotate_first(self, x: mx.array, rotation: Rotation) -> mx.array:
        turned, rest = mx.split(x, [self.rotary], axis=-1)
        return mx.concatenate([rotate(turned, rotation, self.layout), rest], axis=-1)
