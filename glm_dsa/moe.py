"""Feed-forward: the SwiGLU MLP, the router, and the experts that it chooses (DeepSeek-V3, section 2.1.2)."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import sum_gradients

from .config import ModelArgs
from .linear import SwitchLinear
from .trace import tap

SORT_FROM = 64  # from so many token-expert pairs on, sorting by expert pays


class MLP(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Which experts a token goes to, and with what weight. All of it in float32: near ties must not flip."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.topk, self.groups, self.top_groups = args.num_experts_per_tok, args.n_group, args.topk_group
        self.normalize, self.scale = args.norm_topk_prob, args.routed_scaling_factor
        self.weight = mx.zeros((args.n_routed_experts, args.hidden_size))
        self.e_score_correction_bias = mx.zeros((args.n_routed_experts,), dtype=mx.float32)

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """[B, S, hidden] -> experts int [B, S, k] in no order, weights float32 [B, S, k]."""
        logits = tap(self, "logits", x.astype(mx.float32) @ self.weight.astype(mx.float32).T)
        scores = mx.sigmoid(logits)  # [B, S, E]
        experts = tap(self, "topk", mx.stop_gradient(self.choose(scores)))
        # The correction bias chooses, but does not weigh.
        weights = mx.take_along_axis(scores, experts, axis=-1)
        if self.normalize:
            weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
        return experts, tap(self, "weights", weights * self.scale)

    def choose(self, scores: mx.array) -> mx.array:
        """sigmoid scores [B, S, E] -> the top k of score + bias, within the best groups."""
        biased = scores + self.e_score_correction_bias.astype(mx.float32)
        if self.groups > 1:
            grouped = mx.unflatten(biased, -1, (self.groups, -1))  # [B, S, G, E/G]
            group_scores = mx.topk(grouped, 2, axis=-1).sum(axis=-1)  # [B, S, G]
            losers = mx.argpartition(-group_scores, kth=self.top_groups - 1, axis=-1)[..., self.top_groups :, None]
            # -inf, not 0: a biased score can be negative, and a lost 0 would beat it.
            biased = mx.put_along_axis(grouped, losers, mx.array(-mx.inf), axis=-2).flatten(-2)
        return mx.argpartition(-biased, kth=self.topk - 1, axis=-1)[..., : self.topk]


class Experts(nn.Module):
    """The routed experts, stacked; each token is gathered to its own."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        count, hidden, intermediate = args.n_routed_experts, args.hidden_size, args.moe_intermediate_size
        self.gate_proj = SwitchLinear(count, intermediate, hidden)
        self.up_proj = SwitchLinear(count, intermediate, hidden)
        self.down_proj = SwitchLinear(count, hidden, intermediate)

    def __call__(self, x: mx.array, experts: mx.array) -> mx.array:
        """x [B, S, hidden], experts int [B, S, k] -> each expert's answer, [B, S, k, hidden]."""
        shape, k = experts.shape, experts.shape[-1]
        flat = experts.reshape(-1)
        x = x.reshape(-1, 1, x.shape[-1])  # [tokens, 1, hidden]
        is_sorted = flat.size >= SORT_FROM
        order = mx.argsort(flat) if is_sorted else mx.arange(flat.size)
        flat = flat[order]
        x = x[order // k]  # [tokens * k, 1, hidden]
        inner = nn.silu(self.gate_proj(x, flat, is_sorted)) * self.up_proj(x, flat, is_sorted)
        out = self.down_proj(inner, flat, is_sorted)[:, 0]
        if is_sorted:
            out = out[mx.argsort(order)]
        return out.reshape(*shape, -1)


class MixtureOfExperts(nn.Module):
    """The routed experts' weighted sum, plus the shared expert."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.gate = Router(args)
        self.switch_mlp = Experts(args)
        self.shared_experts = MLP(args.hidden_size, args.moe_intermediate_size * args.n_shared_experts)
        self.group: mx.distributed.Group | None = None  # the processes among which the experts' width is divided

    def __call__(self, x: mx.array) -> mx.array:
        if self.group is not None:
            x = sum_gradients(self.group)(x)
        experts, weights = self.gate(x)
        routed = (self.switch_mlp(x, experts) * weights[..., None]).sum(axis=-2).astype(x.dtype)
        routed = tap(self, "experts", routed)
        out = routed + tap(self, "shared_experts", self.shared_experts(x))
        return tap(self, "output", out if self.group is None else mx.distributed.all_sum(out, group=self.group))
