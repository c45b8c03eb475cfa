"""Two mistakes whose effects partly cancel."""

from __future__ import annotations

from collections.abc import Iterator

from ..edits import Edit
from ..fault import ATTENTION, INDEXER, ROPE, ROUTER, SPARSE, Fault

# fmt: off


def faults() -> Iterator[Fault]:
    call, init = "attention.MultiHeadLatentAttention.__call__", "attention.MultiHeadLatentAttention.__init__"
    yield Fault("pair-scale-doubled-nope-halved", "MLA", "twice the softmax scale, half the queries but for their rotary part",
                (Edit("rope.softmax_scale", "scale = args.qk_head_dim**-0.5", "scale = 2 * args.qk_head_dim**-0.5"), Edit(call,
                     "q_nope = q_nope.swapaxes(1, 2)", "q_nope = 0.5 * q_nope.swapaxes(1, 2)")), ROPE, "softmax scale")
    yield Fault("pair-eps-up-and-down", "MLA", "the query latent's eps ten times too large, the KV latent's ten times too small",
                (Edit(init, "self.q_a_layernorm = nn.RMSNorm(args.q_lora_rank, eps=args.latent_norm_eps)",
                     "self.q_a_layernorm = nn.RMSNorm(args.q_lora_rank, eps=10 * args.latent_norm_eps)"), Edit(init,
                     "self.kv_a_layernorm = nn.RMSNorm(self.latent, eps=args.latent_norm_eps)",
                     "self.kv_a_layernorm = nn.RMSNorm(self.latent, eps=0.1 * args.latent_norm_eps)")), ATTENTION,
                "self_attn.q_latent", "always, slightly")
    yield Fault("pair-no-norm-mean-scale", "router", "weights not normalized, the factor divided by what their sum usually is",
                (Edit("moe.Router.__call__", "if self.normalize:", "if False:"), Edit("moe.Router.__call__",
                     "weights * self.scale", "weights * self.scale / (0.6 * self.topk)")), ROUTER, "mlp.gate.weights")
    yield Fault("pair-no-relu-positive-weights", "indexer", "no ReLU on the heads' products, only positive head weights",
                (Edit("indexer.Indexer.score", "mx.maximum(per_head, 0)", "per_head"), Edit("indexer.Indexer.head_weights",
                     "self.weights_proj(x.astype(mx.float32))", "mx.maximum(self.weights_proj(x.astype(mx.float32)), 0)")),
                INDEXER, "self_attn.indexer.weights", SPARSE)
    yield Fault("pair-experts-stronger-shared-weaker", "MoE", "routed experts 1.1 times, the shared one 0.9 times",
                (Edit("moe.MixtureOfExperts.__call__", "weights[..., None]", "weights[..., None] * 1.1"),
                Edit("moe.MixtureOfExperts.__call__", 'tap(self, "shared_experts", self.shared_experts(x))',
                     '0.9 * tap(self, "shared_experts", self.shared_experts(x))')), ROUTER, "mlp.experts")
