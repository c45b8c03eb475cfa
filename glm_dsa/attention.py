"""Multi-head latent attention (DeepSeek-V2, section 2.1). It is handed a selection, and never makes one.

    q = W_uq norm(W_dq x) = [q_nope | q_rope],   c = norm(W_dkv x),   k_rope = RoPE(W_kr x)
    k = [W_uk c | k_rope],   v = W_uv c,   out = W_o softmax(q . k / sqrt(d)) v

Three forms of the same equation, chosen by cost:
  expanded   keys and values rebuilt from the latent: many queries
  absorbed   W_uk moved onto the query and W_uv behind the sum, so that the latent itself is key and value: few queries
  gathered   absorbed, over the selected latents only: work set by the selection, not by the context
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from .cache import LayerCache
from .config import ModelArgs
from .indexer import Indexer
from .linear import MultiLinear
from .mask import CausalMask
from .rope import Rotation, rotate, softmax_scale
from .store import LatentStore
from .tiles import elements, ranges, transposed
from .trace import tap

EXPANDED, ABSORBED, GATHERED = "expanded", "absorbed", "gathered"
EXPONENTIAL = 16  # multiplications that a score's mask and softmax take the time of: on a CPU more, on a GPU fewer


class MultiHeadLatentAttention(nn.Module):
    """MLA with an optional indexer as its child (the checkpoints' place for it; the decoder layer is who asks it)."""

    def __init__(self, args: ModelArgs, with_indexer: bool) -> None:
        super().__init__()
        self.heads = args.num_attention_heads
        self.nope, self.rope = args.qk_nope_head_dim, args.qk_rope_head_dim
        self.latent, self.value = args.kv_lora_rank, args.v_head_dim
        self.layout, self.scale = args.main_rope, softmax_scale(args)
        bias = args.attention_bias

        self.q_a_proj = nn.Linear(args.hidden_size, args.q_lora_rank, bias=bias)
        self.q_a_layernorm = nn.RMSNorm(args.q_lora_rank, eps=args.latent_norm_eps)
        self.q_b_proj = nn.Linear(args.q_lora_rank, self.heads * (self.nope + self.rope), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(args.hidden_size, self.latent + self.rope, bias=bias)
        self.kv_a_layernorm = nn.RMSNorm(self.latent, eps=args.latent_norm_eps)
        self.embed_q = MultiLinear(self.heads, self.latent, self.nope)  # W_uk, transposed: [H, R, nope]
        self.unembed_out = MultiLinear(self.heads, self.value, self.latent)  # W_uv: [H, value, R]
        self.o_proj = nn.Linear(self.heads * self.value, args.hidden_size, bias=bias)
        if with_indexer:
            self.indexer = Indexer(args)

    def query_latent(self, x: mx.array) -> mx.array:
        """[B, S, hidden] -> [B, S, Q]: shared by the heads' queries and the indexer's."""
        return tap(self, "q_latent", self.q_a_layernorm(self.q_a_proj(x)))

    def __call__(
        self,
        x: mx.array,
        q_latent: mx.array,
        rotation: Rotation,
        mask: CausalMask,
        cache: LayerCache | None,
        selection: mx.array | None,
    ) -> mx.array:
        """x [B, S, hidden], selection int [B, S, K] or None for every key -> [B, S, hidden]."""
        batch, length, _ = x.shape
        selection = tap(self, "selection", selection)

        q = self.q_b_proj(q_latent).reshape(batch, length, self.heads, self.nope + self.rope)
        q_nope, q_rope = mx.split(q, [self.nope], axis=-1)
        q_nope = q_nope.swapaxes(1, 2)  # [B, H, S, nope]
        q_rope = tap(self, "q_rope", rotate(q_rope, rotation, self.layout)).swapaxes(1, 2)  # [B, H, S, rope]

        latent, k_rope = mx.split(self.kv_a_proj_with_mqa(x), [self.latent], axis=-1)
        latent = tap(self, "kv_latent", self.kv_a_layernorm(latent))  # [B, S, R]
        k_rope = tap(self, "k_rope", rotate(k_rope[:, :, None], rotation, self.layout)[:, :, 0])  # [B, S, rope]
        joined = mx.concatenate([latent, k_rope], axis=-1)  # [B, S, R + rope]
        tokens = LatentStore.of(joined) if cache is None else cache.append(joined)  # all T of them

        form = self.cheapest_form(length, tokens.length, None if selection is None else selection.shape[-1])
        if form == GATHERED:
            assert selection is not None
            heads = self.attend_gathered(q_nope, q_rope, tokens, selection, mask)
        else:
            seen = mask.whole()
            if selection is not None:
                seen = selection_mask(selection, tokens.length, seen)
            attend = self.attend_expanded if form == EXPANDED else self.attend_absorbed
            heads = attend(q_nope, q_rope, tokens, seen)  # [B, H, S, value]
        heads = tap(self, "heads", heads.swapaxes(1, 2).reshape(batch, length, -1))
        return tap(self, "output", self.o_proj(heads))

    def cheapest_form(self, queries: int, keys: int, selected: int | None) -> str:
        """The form with the least work in the part where they differ, in multiplications; per head, for one row of a batch."""
        up = self.latent * (self.nope + self.value)  # one token through W_uk and W_uv
        # a query-key pair: scored, weighted, summed (in the latent over the rotary key too, and that is dropped)
        pair = self.nope + self.rope + EXPONENTIAL + self.value
        pair_in_latent = 2 * (self.latent + self.rope) + EXPONENTIAL
        cost = {
            EXPANDED: keys * up + queries * keys * pair,
            ABSORBED: queries * up + queries * keys * pair_in_latent,
        }
        if selected is not None:
            cost[GATHERED] = queries * up + queries * selected * pair_in_latent
        return min(cost, key=lambda form: cost[form])

    def attend_expanded(
        self, q_nope: mx.array, q_rope: mx.array, tokens: LatentStore, mask: mx.array | None
    ) -> mx.array:
        """q [B, H, S, ..], tokens [B, T, R + rope] -> [B, H, S, value]."""
        latent, k_rope = mx.split(tokens.read()[:, None], [self.latent], axis=-1)  # [B, 1, T, ..]
        latent = mx.contiguous(latent)  # once: both maps below would copy a view, and for each head
        k_nope = self.embed_q(latent, transpose=False)  # [B, H, T, nope]
        k_rope = mx.broadcast_to(k_rope, (*k_nope.shape[:-1], self.rope))
        return mx.fast.scaled_dot_product_attention(
            mx.concatenate([q_nope, q_rope], axis=-1),
            mx.concatenate([k_nope, k_rope], axis=-1),
            self.unembed_out(latent),  # [B, H, T, value]
            scale=self.scale,
            mask=mask,
        )

    def attend_absorbed(
        self, q_nope: mx.array, q_rope: mx.array, tokens: LatentStore, mask: mx.array | None
    ) -> mx.array:
        """The same, with [latent | rotary key] as the one key of all heads, and the latent as their one value."""
        keys = tokens.read()  # [B, T, R + rope]
        queries = mx.concatenate([self.embed_q(q_nope), q_rope], axis=-1)  # [B, H, S, R + rope]
        # Heads and queries are rows of one product: as heads of their own they would each have a copy of the keys.
        scores = ((queries * self.scale).flatten(1, 2) @ keys.swapaxes(-1, -2)).reshape(*queries.shape[:3], -1)
        if mask is not None:
            scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
        weights = mx.softmax(scores, axis=-1, precise=True)
        # Summed over the rotary key too, and that part dropped: cheaper than a copy of the latents.
        summed = (weights.flatten(1, 2) @ keys)[..., : self.latent]
        return self.unembed_out(summed.reshape(*queries.shape[:3], -1))

    def attend_gathered(
        self, q_nope: mx.array, q_rope: mx.array, tokens: LatentStore, selection: mx.array, mask: CausalMask
    ) -> mx.array:
        """The absorbed form over selection [B, S, K], in blocks of queries. Nothing here is as long as the context."""
        batch, length, chosen = selection.shape
        queries = mx.concatenate([self.embed_q(q_nope), q_rope], axis=-1).swapaxes(1, 2)  # [B, S, H, R + rope]
        block = self.block(batch, chosen)
        summed: list[mx.array] = []
        for rows in ranges(length, block):
            part = slice(rows.start, rows.stop)
            picked = selection[:, part]  # [B, s, K]
            if summed:  # each block waits for the one before, so that only one of them is in memory
                picked = mx.stop_gradient(mx.depends(picked, summed[-1]))
            keys = tokens.take(picked)  # [B, s, K, R + rope]
            scores = (queries[:, part] * self.scale) @ transposed(keys)  # [B, s, H, K]
            allowed = mask.picked(rows, picked)
            if allowed is not None:
                scores = mx.where(allowed[:, :, None], scores, mx.finfo(scores.dtype).min)
            weights = mx.softmax(scores, axis=-1, precise=True)
            summed.append((weights @ keys)[..., : self.latent])  # [B, s, H, R]; as in the absorbed form
        return self.unembed_out(mx.concatenate(summed, axis=1).swapaxes(1, 2))

    def block(self, batch: int, chosen: int) -> int:
        """Queries at a time: gathered vectors of so many are held at once."""
        return max(1, elements() // (batch * chosen * (self.latent + self.rope)))


def selection_mask(selection: mx.array, keys: int, mask: mx.array | None) -> mx.array:
    """selection int [B, S, K] -> bool [B, 1, S, T]: selected, and not masked."""
    chosen = mx.zeros((*selection.shape[:2], keys), dtype=mx.bool_)
    chosen = mx.put_along_axis(chosen, selection, mx.array(True), axis=-1)[:, None]
    return chosen if mask is None else chosen & mask
