"""Of the router and the experts."""

from __future__ import annotations

from collections.abc import Iterator

from ..edits import Edit
from ..fault import ALWAYS, ROUTER, Fault

# fmt: off


def faults() -> Iterator[Fault]:
    call, choose, experts = "moe.Router.__call__", "moe.Router.choose", "moe.Experts.__call__"
    mixture = "moe.MixtureOfExperts.__call__"
    shared = 'tap(self, "shared_experts", self.shared_experts(x))'

    def fault(name: str, component: str, what: str, *edits: Edit, stage: str, shows: str = ALWAYS, **more: str):
        return Fault(name, component, what, edits, ROUTER, f"mlp.{stage}", shows, **more)

    yield fault("router-bias-in-weights", "router", "the correction bias leaks into the weights",
                Edit(call, "mx.take_along_axis(scores,", "mx.take_along_axis(scores + self.e_score_correction_bias,"),
                stage="gate.weights", shows="non-zero bias", origin="vllm 12002, transformers 41647")
    yield fault("router-bias-ignored", "router", "experts are chosen without the correction bias",
                Edit(choose, "scores + self.e_score_correction_bias.astype(mx.float32)", "scores"), stage="gate.topk",
                shows="non-zero bias")
    yield fault("router-group-fill-zero", "router", "losing groups filled with 0 instead of -inf",
                Edit(choose, "mx.array(-mx.inf)", "mx.array(0.0)"), stage="gate.topk", shows="negative biased scores, groups > 1",
                origin="vllm 13474, mlx-lm today")
    yield fault("router-group-by-best", "router", "a group counts by its best expert, not by its two best",
                Edit(choose, "mx.topk(grouped, 2, axis=-1).sum(axis=-1)", "grouped.max(axis=-1)"), stage="gate.topk",
                shows="groups > 1", origin="DeepSeek-V2's rule")
    yield fault("router-groups-ignored", "router", "experts are chosen from all groups",
                Edit(choose, "if self.groups > 1:", "if False:"), stage="gate.topk", shows="groups > 1")
    yield fault("router-one-expert-less", "router", "top k - 1 experts",
                Edit(choose, "kth=self.topk - 1, axis=-1)[..., : self.topk]", "kth=self.topk - 2, axis=-1)[..., : self.topk - 1]"),
                stage="gate.topk")
    yield fault("router-no-norm", "router", "norm_topk_prob ignored", Edit(call, "if self.normalize:", "if False:"),
                stage="gate.weights", origin="several")
    yield fault("router-always-norm", "router", "weights are normalized where the config says not to",
                Edit(call, "if self.normalize:", "if True:"), stage="gate.weights", shows="norm_topk_prob = false")
    yield fault("router-norm-over-all", "router", "normalized by all experts' scores, not by the chosen ones'",
                Edit(call, "weights.sum(axis=-1, keepdims=True)", "scores.sum(axis=-1, keepdims=True)"), stage="gate.weights")
    yield fault("router-no-scale", "router", "routed_scaling_factor ignored", Edit(call, "weights * self.scale", "weights"),
                stage="gate.weights", origin="several")
    yield fault("router-softmax", "router", "softmax in the place of the sigmoid",
                Edit(call, "mx.sigmoid(logits)", "mx.softmax(logits, axis=-1)"), stage="gate.weights")
    yield fault("router-bf16", "router", "logits in low precision",
                Edit(call, "x.astype(mx.float32) @ self.weight.astype(mx.float32).T",
                     "(x.astype(mx.bfloat16) @ self.weight.astype(mx.bfloat16).T).astype(mx.float32)"), stage="gate.logits",
                shows="near ties", origin="several")
    yield fault("routing-weights-in-bf16", "MoE", "experts are summed under weights in 16 bit",
                Edit(mixture, "weights[..., None]", "weights[..., None].astype(mx.bfloat16).astype(mx.float32)"), stage="experts",
                shows="always, slightly")
    yield fault("experts-gate-up-swapped", "MoE", "silu on up, not on gate",
                Edit(experts, "nn.silu(self.gate_proj(x, flat, is_sorted)) * self.up_proj(x, flat, is_sorted)",
                     "nn.silu(self.up_proj(x, flat, is_sorted)) * self.gate_proj(x, flat, is_sorted)"), stage="experts")
    yield fault("experts-gelu", "MoE", "GELU in the place of SiLU", Edit(experts, "nn.silu(", "nn.gelu("), stage="experts")
    yield fault("experts-left-sorted", "MoE", "answers are not put back in the tokens' order",
                Edit(experts, "out = out[mx.argsort(order)]", "pass"), stage="experts", shows="64 pairs or more")
    yield fault("experts-of-another-token", "MoE", "the i-th pair reads token i mod S, not i div k",
                Edit(experts, "x[order // k]", "x[order % (flat.size // k)]"), stage="experts")
    yield fault("shared-expert-missing", "MoE", "shared expert dropped", Edit(mixture, shared, f"0 * {shared}"), stage="output",
                origin="conversions")
    yield fault("shared-expert-scaled", "MoE", "routed_scaling_factor on the shared expert too",
                Edit(mixture, shared, f"self.gate.scale * {shared}"), stage="output")
    yield fault("mlp-gate-up-swapped", "MoE", "silu on up, not on gate, in the shared expert and the dense MLP",
                Edit("moe.MLP.__call__", "nn.silu(self.gate_proj(x)) * self.up_proj(x)",
                     "nn.silu(self.up_proj(x)) * self.gate_proj(x)"), stage="shared_experts")
