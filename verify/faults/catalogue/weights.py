"""Of loading and conversion."""

from __future__ import annotations

from collections.abc import Iterator

from ..edits import Edit
from ..fault import CONFIG, WEIGHTS, Fault

# fmt: off


def faults() -> Iterator[Fault]:
    split = "weights._split_kv_b"

    def fault(name: str, what: str, *edits: Edit, stage: str, claim: str = WEIGHTS, **more: str):
        return Fault(name, "weights", what, edits, claim, stage, **more)

    yield fault("fp8-scale-missed", "cast without weight_scale_inv",
                Edit("weights.dequantize_fp8", "(mx.from_fp8(weight, dtype=mx.float32) * scale)",
                     "mx.from_fp8(weight, dtype=mx.float32)"), stage="weight", shows="FP8 checkpoints", origin="abliterix 94")
    yield fault("fp8-scale-inverted", "weight_scale_inv is divided by, as its name suggests",
                Edit("weights.dequantize_fp8", "dtype=mx.float32) * scale)", "dtype=mx.float32) / scale)"), stage="weight",
                shows="FP8 checkpoints")
    yield fault("kv-b-halves-swapped", "kv_b_proj read as [W_uv; W_uk]",
                Edit(split, "w_uk, w_uv = mx.split(weight.reshape(heads), [args.qk_nope_head_dim], axis=1)",
                     "w_uv, w_uk = mx.split(weight.reshape(heads), [args.v_head_dim], axis=1)"),
                stage="self_attn.embed_q.weight")
    yield fault("kv-b-heads-last", "kv_b_proj's rows are read as [width, heads]",
                Edit(split, "weight.reshape(heads)", "weight.reshape(heads[1], heads[0], heads[2]).swapaxes(0, 1)"),
                stage="self_attn.embed_q.weight")
    yield fault("experts-in-text-order", "experts are stacked in the order of their names: 0, 1, 10, 11, ..., 2",
                Edit("weights._stack_experts", "tensors.pop(n) for n in names", "tensors.pop(n) for n in sorted(names)"),
                stage="mlp.switch_mlp", shows="more than 10 experts")
    yield Fault("mtp-dropped", "MTP", "the MTP layer silently discarded",
                (Edit("weights.to_modules", "if not args.num_nextn_predict_layers:", "if True:"), Edit("model.Model.sanitize",
                     "if not weights.has_mtp(self.args, tensors):", "if True:")), CONFIG, "parameters", "conversion",
                "ds4 458, every MLX build")
