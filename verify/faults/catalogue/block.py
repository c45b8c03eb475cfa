"""Of the decoder layer."""

from __future__ import annotations

from collections.abc import Iterator

from ..edits import Edit
from ..fault import LAYERS, LOGITS, Fault

# fmt: off


def faults() -> Iterator[Fault]:
    layer = "block.DecoderLayer.__call__"

    def fault(name: str, what: str, *edits: Edit, stage: str, claim: str = LAYERS, **more: str):
        return Fault(name, "decoder layer", what, edits, claim, stage, **more)

    yield fault("residual-from-norm", "the residual is the normed hidden",
                Edit(layer, "x = x + self.self_attn(", "x = normed + self.self_attn("), stage="post_attention_layernorm")
    yield fault("mlp-reads-raw-hidden", "the feed-forward is fed before its norm", Edit(layer, "self.mlp(normed)", "self.mlp(x)"),
                stage="mlp_output")
    yield fault("norms-swapped", "post_attention_layernorm's weight before attention",
                Edit(layer, "self.input_layernorm(x)", "self.post_attention_layernorm(x)"), stage="input_layernorm")
    yield fault("rms-eps-1e-6", "the latents' eps for the layer's norms",
                Edit("block.DecoderLayer.__init__", "self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)",
                     "self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=1e-6)"), stage="input_layernorm",
                shows="slightly; plainly where rms_norm_eps is large")
    yield fault("final-norm-skipped", "the head reads the last layer's output",
                Edit("model.Backbone.__call__", 'tap(self, "norm", self.norm(x))', 'tap(self, "norm", x)'), stage="norm",
                claim=LOGITS)
    yield fault("embedding-scaled", "the embedding times sqrt(hidden), as Gemma has it",
                Edit("model.Backbone.__call__", "self.embed_tokens(tokens) if",
                     "self.embed_tokens(tokens) * self.embed_tokens.weight.shape[-1] ** 0.5 if"), stage="embed", claim=LOGITS)
