"""Of MLA."""

from __future__ import annotations

from collections.abc import Iterator

from ..edits import Edit
from ..fault import ALWAYS, ATTENTION, CACHES, INDEXER, Fault

# fmt: off


def faults() -> Iterator[Fault]:
    init, call = "attention.MultiHeadLatentAttention.__init__", "attention.MultiHeadLatentAttention.__call__"
    absorbed, gathered = (f"attention.MultiHeadLatentAttention.attend_{form}" for form in ("absorbed", "gathered"))

    def fault(name: str, what: str, *edits: Edit, stage: str, claim: str = ATTENTION, shows: str = ALWAYS, **more: str):
        return Fault(name, "MLA", what, edits, claim, f"self_attn.{stage}", shows, **more)

    yield fault("latent-eps", "the query latent's eps is rms_norm_eps",
                Edit(init, "self.q_a_layernorm = nn.RMSNorm(args.q_lora_rank, eps=args.latent_norm_eps)",
                     "self.q_a_layernorm = nn.RMSNorm(args.q_lora_rank, eps=args.rms_norm_eps)"), stage="q_latent",
                shows="always, slightly", origin="transformers 48762, vllm 35515")
    yield fault("kv-latent-eps", "the KV latent's eps is rms_norm_eps",
                Edit(init, "self.kv_a_layernorm = nn.RMSNorm(self.latent, eps=args.latent_norm_eps)",
                     "self.kv_a_layernorm = nn.RMSNorm(self.latent, eps=args.rms_norm_eps)"), stage="kv_latent",
                shows="always, slightly", origin="transformers 48762, vllm 35515")
    yield fault("kv-latent-unnormed", "the cache keeps the latent before its norm, and nobody norms it later",
                Edit(call, "self.kv_a_layernorm(latent))", "latent)"), stage="kv_latent")
    yield fault("kv-split-swapped", "rotary key first, latent after it",
                Edit(call, "latent, k_rope = mx.split(self.kv_a_proj_with_mqa(x), [self.latent], axis=-1)",
                     "k_rope, latent = mx.split(self.kv_a_proj_with_mqa(x), [self.rope], axis=-1)"), stage="kv_latent")
    yield fault("mla-rope-half", "main RoPE half-split", Edit(init, "args.main_rope,", "'half-split',"), stage="q_rope",
                origin="transformers 5.2-5.10")
    yield fault("q-split-swapped", "a head's rotary part first",
                Edit(call, "q_nope, q_rope = mx.split(q, [self.nope], axis=-1)",
                     "q_rope, q_nope = mx.split(q, [self.rope], axis=-1)"), stage="q_rope")
    yield fault("q-heads-transposed", "q_b_proj's rows are read as [width, heads]",
                Edit(call, "(batch, length, self.heads, self.nope + self.rope)",
                     "(batch, length, self.nope + self.rope, self.heads).swapaxes(2, 3)"), stage="q_rope")
    yield fault("k-rope-unrotated", "the rotary key is cached before RoPE",
                Edit(call, "rotate(k_rope[:, :, None], rotation, self.layout)[:, :, 0]", "k_rope"), stage="k_rope")
    yield fault("softmax-scale-of-nope", "1 / sqrt(qk_nope_head_dim)",
                Edit("rope.softmax_scale", "args.qk_head_dim**-0.5", "args.qk_nope_head_dim**-0.5"), stage="heads")
    yield fault("absorbed-scale-of-latent", "the absorbed form scales by the width of what it multiplies",
                Edit(absorbed, "(queries * self.scale)", "(queries * (self.latent + self.rope) ** -0.5)"), stage="heads",
                shows="few queries")
    yield fault("gathered-unscaled", "the gathered form does not scale",
                Edit(gathered, "(queries[:, part] * self.scale)", "queries[:, part]"), stage="heads",
                shows="decode beyond index_topk")
    yield fault("absorbed-value-from-the-end", "the value is the last R of [latent | rotary key]",
                Edit(absorbed, "[..., : self.latent]", "[..., self.rope :]"), stage="heads", shows="few queries")
    yield fault("heads-transposed", "heads are joined before they are moved behind the tokens",
                Edit(call, "heads.swapaxes(1, 2).reshape(batch, length, -1)", "heads.reshape(batch, length, -1)"), stage="heads")
    yield fault("latent-in-bf16", "the expanded form rebuilds keys and values from a latent in 16 bit",
                Edit("attention.MultiHeadLatentAttention.attend_expanded", "tokens.read()[:, None]",
                     "tokens.read()[:, None].astype(mx.bfloat16).astype(q_nope.dtype)"), stage="heads", shows="prefill, slightly")
    yield fault("one-rows-selection-for-all", "every row of a batch attends by the first row's selection",
                Edit("attention.selection_mask", "selection, mx.array(True)",
                     "mx.broadcast_to(selection[:1], selection.shape), mx.array(True)"), stage="heads",
                shows="batches beyond index_topk")
    yield fault("selection-beats-mask", "a selected key is attended to though it is masked",
                Edit("attention.selection_mask", "chosen if mask is None else chosen & mask", "chosen"), stage="heads",
                shows="early rows beyond index_topk")
    yield Fault("topk-unmasked-decode", "mask", "sparse decode drops the padding mask",
                (Edit(gathered, "if allowed is not None:", "if allowed is not None and length > 1:"),), CACHES, "logits",
                "left-padded batch beyond index_topk", "mlx-lm 885")
    yield Fault("mask-one-too-far", "mask", "each query sees the key after its own",
                (Edit("mask.CausalMask.sees", "self.first + rows.start, self.first + rows.stop",
                      "self.first + 1 + rows.start, self.first + 1 + rows.stop"),),
                INDEXER, "self_attn.indexer.scores")
    yield Fault("pads-are-seen", "mask", "left padding is not masked",
                (Edit("mask.CausalMask.sees", "else seen & (columns >= mx.array(self.pads)[:, None, None])", "else seen"),),
                INDEXER, "self_attn.indexer.topk", "padded batches")
