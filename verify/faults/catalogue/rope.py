"""Of rotations."""

from __future__ import annotations

from collections.abc import Iterator

from ..edits import Edit
from ..fault import ALWAYS, ATTENTION, ROPE, Fault

# fmt: off


def faults() -> Iterator[Fault]:
    init, call = "rope.RotaryEmbedding.__init__", "rope.RotaryEmbedding.__call__"

    def fault(
        name: str, what: str, *edits: Edit, stage: str = "position", claim: str = ROPE, shows: str = ALWAYS, **more: str
    ):
        return Fault(name, "rope", what, edits, claim, stage, shows, **more)

    yield fault("rope-theta-default", "theta not read from rope_parameters", Edit(init, "args.rope_theta", "10000.0"),
                origin="sglang-jax 1384")
    yield fault("rope-dim-from-head-dim", "frequencies spread over head_dim, not over the rotary width",
                Edit(init, "rope_frequencies(args.qk_rope_head_dim,", "rope_frequencies(args.qk_head_dim,"),
                Edit(init, "mx.array(frequencies,", "mx.array(frequencies[: args.qk_rope_head_dim // 2],"),
                shows="GLM-5.2 configs", origin="transformers 5.4-5.9")
    yield fault("rope-backwards", "turns by minus the angle, queries and keys alike",
                Edit(call, "mx.sin(angles) * self.magnitude", "-mx.sin(angles) * self.magnitude"))
    yield fault("rope-positions-in-bf16", "positions in 16 bit before they meet the frequencies",
                Edit(call, "positions.astype(mx.float32)", "positions.astype(mx.bfloat16).astype(mx.float32)"), shows="T > 256")
    yield fault("rope-angles-in-fp16", "angles in half precision",
                Edit(call, "* self.frequencies", "* self.frequencies.astype(mx.float16).astype(mx.float32)"),
                shows="far positions")
    yield fault("rope-frequencies-of-half-the-width", "exponent -i / D in the place of -2 i / D",
                Edit("rope.rope_frequencies", "-2 * i / width", "-i / width"))
    yield fault("yarn-ramp-reversed", "fast pairs are stretched and slow ones kept",
                Edit("rope.rope_frequencies", "p * (1 - r) + s * r", "s * (1 - r) + p * r"), stage="frequencies", shows="YaRN")
    yield fault("yarn-magnitude-forgotten", "cos and sin without YaRN's factor",
                Edit(call, "mx.cos(angles) * self.magnitude, mx.sin(angles) * self.magnitude", "mx.cos(angles), mx.sin(angles)" ),
                stage="magnitude", shows="YaRN")
    yield fault("yarn-scale-forgotten", "softmax scale without mscale squared",
                Edit("rope.softmax_scale", "if args.rope_scaling and all_dim else scale", "if False else scale"),
                stage="softmax scale", shows="YaRN")
    yield fault("yarn-scale-not-squared", "softmax scale with mscale once",
                Edit("rope.softmax_scale", "all_dim) ** 2", "all_dim)"), stage="softmax scale", shows="YaRN")
    yield fault("rope-offset-after-cache", "position restarts at 0 with each call",
                Edit("model.positions", "offset: Any = cache.offset", "offset: Any = cache.start"), claim=ATTENTION,
                stage="self_attn.q_rope", shows="chunked prefill, decode", origin="several")
