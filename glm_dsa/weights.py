"""Which tensors a checkpoint must hold, and how its names and formats become the model's.

`inventory` is the one source of names and shapes: it counts, it checks, and loading is held to it.

    HF layout (zai-org, transformers)              modules (and mlx-lm's checkpoints)
    self_attn.kv_b_proj [H (nope + v), R]          self_attn.embed_q [H, R, nope], self_attn.unembed_out [H, v, R]
    mlp.experts.E.gate_proj (up, down)             mlp.switch_mlp.gate_proj [E, out, in]
    *.weight (FP8) + *.weight_scale_inv            *.weight
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import mlx.core as mx

from .config import ModelArgs
from .errors import WeightsError
from .store import BITS, GROUP_SIZES

FP8_BLOCK = 128
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
PACKED = ("weight", "scales", "biases")  # the parts of a quantized matrix in MLX
LAYER = re.compile(r"model\.layers\.([0-9]{1,6})\.(.*)", re.DOTALL)
# Only affine keeps scales in the weights' dtype; each other mode has one (bits, group size) and scales of one byte.
AFFINE_BITS, AFFINE_GROUPS = BITS, GROUP_SIZES
MODES = {(4, 16): "nvfp4", (4, 32): "mxfp4", (8, 32): "mxfp8"}


class TensorSpec(NamedTuple):
    """A tensor as HF checkpoints hold it. `component` groups tensors as people talk about them: all of the MTP layer's are
    "mtp", and `part` says what they are there ("attention", "experts", ..); elsewhere both are the same."""

    name: str
    shape: tuple[int, ...]
    component: str
    part: str = ""

    @property
    def is_packable(self) -> bool:
        """Whether it can be kept in few bits: matrices can, but for the router's."""
        return len(self.shape) > 1 and self.part != "router"


def inventory(args: ModelArgs) -> Iterator[TensorSpec]:
    """Every tensor of the model in HF layout, in order. No weights are touched."""
    hidden, vocabulary = args.hidden_size, args.vocab_size
    yield _tensor("model.embed_tokens.weight", (vocabulary, hidden), "embedding")
    for layer in range(args.num_hidden_layers + args.num_nextn_predict_layers):
        prefix = f"model.layers.{layer}."
        is_mtp = layer >= args.num_hidden_layers
        for spec in _layer(args, layer, is_mtp):
            yield spec._replace(name=prefix + spec.name, component="mtp" if is_mtp else spec.component)
    yield _tensor("model.norm.weight", (hidden,), "norms")
    if not args.tie_word_embeddings:
        yield _tensor("lm_head.weight", (vocabulary, hidden), "head")


def _tensor(name: str, shape: tuple[int, ...], component: str) -> TensorSpec:
    return TensorSpec(name, shape, component, component)


def _layer(args: ModelArgs, layer: int, is_mtp: bool) -> Iterator[TensorSpec]:
    hidden, heads, latent = args.hidden_size, args.num_attention_heads, args.kv_lora_rank
    rows = latent + args.qk_rope_head_dim
    yield _tensor("input_layernorm.weight", (hidden,), "norms")
    yield _tensor("post_attention_layernorm.weight", (hidden,), "norms")
    attention = {
        "q_a_proj.weight": (args.q_lora_rank, hidden),
        "q_a_layernorm.weight": (args.q_lora_rank,),
        "q_b_proj.weight": (heads * args.qk_head_dim, args.q_lora_rank),
        "kv_a_proj_with_mqa.weight": (rows, hidden),
        "kv_a_layernorm.weight": (latent,),
        "kv_b_proj.weight": (heads * (args.qk_nope_head_dim + args.v_head_dim), latent),
        "o_proj.weight": (hidden, heads * args.v_head_dim),
    }
    if args.attention_bias:
        attention |= {
            "q_a_proj.bias": (args.q_lora_rank,),
            "kv_a_proj_with_mqa.bias": (rows,),
            "o_proj.bias": (hidden,),
        }
    for name, shape in attention.items():
        yield _tensor(f"self_attn.{name}", shape, "attention")
    if args.runs_indexer(layer):
        for name, shape in {
            "wq_b.weight": (args.index_n_heads * args.index_head_dim, args.q_lora_rank),
            "wk.weight": (args.index_head_dim, hidden),
            "k_norm.weight": (args.index_head_dim,),
            "k_norm.bias": (args.index_head_dim,),
            "weights_proj.weight": (args.index_n_heads, hidden),
        }.items():
            yield _tensor(f"self_attn.indexer.{name}", shape, "indexer")
    if args.is_sparse(layer):
        inner = args.moe_intermediate_size
        yield _tensor("mlp.gate.weight", (args.n_routed_experts, hidden), "router")
        yield _tensor("mlp.gate.e_score_correction_bias", (args.n_routed_experts,), "router")
        for expert in range(args.n_routed_experts):
            yield from _swiglu(f"mlp.experts.{expert}", hidden, inner, "experts")
        yield from _swiglu("mlp.shared_experts", hidden, inner * args.n_shared_experts, "shared experts")
    else:
        yield from _swiglu("mlp", hidden, args.intermediate_size, "dense mlp")
    if is_mtp:
        yield _tensor("eh_proj.weight", (hidden, 2 * hidden), "mtp")
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            yield _tensor(f"{norm}.weight", (hidden,), "norms")
        if args.mtp_owns_embeddings:
            yield _tensor("embed_tokens.weight", (args.vocab_size, hidden), "embedding")
            yield _tensor("shared_head.head.weight", (args.vocab_size, hidden), "head")


def _swiglu(prefix: str, hidden: int, inner: int, component: str) -> Iterator[TensorSpec]:
    for name in PROJECTIONS:
        yield _tensor(f"{prefix}.{name}.weight", (hidden, inner) if name == "down_proj" else (inner, hidden), component)


def module_inventory(args: ModelArgs) -> Iterator[TensorSpec]:
    """`inventory` under the model's own names, as an MLX build holds it: experts stacked, kv_b_proj in its two halves."""
    return _as_modules(args, lambda layer: True, lambda layer: True)


def stored_inventory(args: ModelArgs, found: Iterable[str]) -> Iterator[TensorSpec]:
    """`inventory`, as this checkpoint names it: layer by layer, experts apart or stacked, kv_b_proj whole or split."""
    names = set(found)
    stacked = {n.split(".mlp.")[0] for n in names if ".mlp.switch_mlp." in n}
    split = {n.split(".self_attn.")[0] for n in names if ".self_attn.embed_q." in n or ".self_attn.unembed_out." in n}
    return _as_modules(args, stacked.__contains__, split.__contains__)


def stored_parts(name: str, found: Container[str]) -> list[str]:
    """The tensors that a checkpoint keeps one as: itself, and its scales and biases where it is packed."""
    path = name.removesuffix(".weight")
    every = [name, f"{name}_scale_inv"]
    if name.endswith(".weight"):
        every += [f"{path}.{part}" for part in ("scales", "biases", "global_scale")]
    return [part for part in every if part in found]


def _as_modules(
    args: ModelArgs, is_stacked: Callable[[str], bool], is_split: Callable[[str], bool]
) -> Iterator[TensorSpec]:
    heads = args.num_attention_heads
    for spec in inventory(args):
        layer, _, rest = spec.name.partition(".self_attn." if ".self_attn." in spec.name else ".mlp.")
        if rest.startswith("experts.") and is_stacked(layer):
            _, expert, projection = rest.split(".", 2)
            if expert == "0":
                name, shape = f"{layer}.mlp.switch_mlp.{projection}", (args.n_routed_experts, *spec.shape)
                yield spec._replace(name=name, shape=shape)
        elif rest == "kv_b_proj.weight" and is_split(layer):
            for part, shape in (
                ("embed_q", (heads, args.kv_lora_rank, args.qk_nope_head_dim)),
                ("unembed_out", (heads, args.v_head_dim, args.kv_lora_rank)),
            ):
                yield spec._replace(name=f"{layer}.self_attn.{part}.weight", shape=shape)
        else:
            yield spec


def is_ignorable(args: ModelArgs, name: str) -> bool:
    """Tensors that some builds carry for nothing: indexers on shared layers, RoPE tables, a head beside a tied embedding."""
    if name.startswith("lm_head."):
        return args.tie_word_embeddings
    match = LAYER.fullmatch(name)
    if match is None:
        return False
    layer, rest = int(match[1]), match[2]
    shared = layer < args.num_hidden_layers and args.has_indexer and not args.runs_indexer(layer)
    return rest.endswith("rotary_emb.inv_freq") or (shared and rest.startswith("self_attn.indexer."))


def is_mtp(args: ModelArgs, name: str) -> bool:
    match = LAYER.fullmatch(name)
    return match is not None and int(match[1]) >= args.num_hidden_layers


def has_mtp(args: ModelArgs, names: Iterable[str]) -> bool:
    return args.num_nextn_predict_layers > 0 and any(is_mtp(args, name) for name in names)


def is_hf_layout(names: Iterable[str]) -> bool:
    """True where all names are HF's; False for mlx-lm's, and for a mixture (an MTP layer added to an MLX build, say)."""
    return not any(".switch_mlp." in n or ".embed_q." in n or n.endswith(".scales") for n in names)


def check_names(args: ModelArgs, found: Mapping[str, tuple[int, ...]]) -> None:
    """Holds an HF-layout checkpoint's {name: shape} to the inventory, strictly in both directions.

    Ignorable tensors may be there, and the MTP layer may be absent as a whole. Raises `WeightsError`.
    """
    with_mtp = has_mtp(args, found)
    due = {spec.name: spec.shape for spec in inventory(args) if with_mtp or not is_mtp(args, spec.name)}
    found = {n: s for n, s in found.items() if not is_ignorable(args, n) and not n.endswith("_scale_inv")}
    report_differences(due, found)


def report_differences(due: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Raises `WeightsError` naming what is missing, what is not expected, and what has another shape."""
    missing = [n for n in due if n not in found]
    unexpected = [n for n in found if n not in due]
    misshapen = [f"{n} is {list(found[n])}, expected {list(due[n])}" for n in due if n in found and found[n] != due[n]]
    parts = [
        f"{len(names)} {what}: {', '.join(sorted(names)[:5])}{', ...' if len(names) > 5 else ''}"
        for what, names in (("missing", missing), ("not expected", unexpected), ("of the wrong shape", misshapen))
        if names
    ]
    if parts:
        raise WeightsError(
            "the tensors do not make this model: " + "; ".join(parts) + ". Does config.json belong to these weights?"
        )


def to_modules(args: ModelArgs, tensors: Mapping[str, mx.array], dtype: mx.Dtype | None = None) -> dict[str, mx.array]:
    """A checkpoint's tensors, in either layout, FP8 or not, under the model's parameter names. Idempotent. `dtype`: of what has
    to be unpacked (default: that of its scales)."""
    tensors = {name: tensor for name, tensor in tensors.items() if not is_ignorable(args, name)}
    if not args.num_nextn_predict_layers:
        tensors = {name: tensor for name, tensor in tensors.items() if not is_mtp(args, name)}
    _dequantize_fp8(tensors)
    for layer in range(args.num_hidden_layers + args.num_nextn_predict_layers):
        _stack_experts(args, tensors, f"model.layers.{layer}.mlp")
        _split_kv_b(args, tensors, f"model.layers.{layer}.self_attn", dtype)
    return tensors


def _dequantize_fp8(tensors: dict[str, mx.array]) -> None:
    for name in [n for n in tensors if n.endswith(".weight_scale_inv")]:
        weight = name.removesuffix("_scale_inv")
        if weight not in tensors:
            raise WeightsError(f"{name}: a block scale without its weight {weight}")
        tensors[weight] = dequantize_fp8(tensors[weight], tensors.pop(name), weight)
    for name, tensor in tensors.items():
        if tensor.dtype == mx.uint8 and name.endswith(".weight"):
            raise WeightsError(f"{name}: FP8 without {name}_scale_inv; casting it without its scale would be wrong")


def dequantize_fp8(weight: mx.array, scale: mx.array, name: str = "weight") -> mx.array:
    """e4m3 bytes [M, N] times float32 block scales [ceil(M/128), ceil(N/128)] -> bfloat16 [M, N], rounded once."""
    if weight.dtype != mx.uint8 or weight.ndim != 2 or scale.dtype != mx.float32:
        raise WeightsError(
            f"{name}: {weight.dtype} {list(weight.shape)} beside a block scale {scale.dtype}; expected FP8 rows and F32"
        )
    rows, columns = weight.shape
    due = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
    if scale.shape != due:
        raise WeightsError(
            f"{name}_scale_inv is {list(scale.shape)}, expected {list(due)} for {rows} x {columns} in blocks of 128"
        )
    scale = mx.repeat(mx.repeat(scale.astype(mx.float32), FP8_BLOCK, 0)[:rows], FP8_BLOCK, 1)[:, :columns]
    return (mx.from_fp8(weight, dtype=mx.float32) * scale).astype(mx.bfloat16)


def packing_of(path: str, tensors: Mapping[str, mx.array], width: int) -> dict[str, Any]:
    """{group_size, bits, mode} of a packed matrix, from the shapes of its parts and the width of a row unpacked.

    config.json need not say, and is wrong for some modules of mixed builds. Raises `WeightsError`.
    """
    weight, scales = tensors.get(f"{path}.weight"), tensors[f"{path}.scales"]
    if weight is None or weight.dtype != mx.uint32 or not weight.ndim or not scales.ndim or not scales.shape[-1]:
        raise WeightsError(f"{path}: scales without a packed weight (U32) beside them")
    bits, group_size = weight.shape[-1] * 32 // width, width // scales.shape[-1]
    fits_affine = bits in AFFINE_BITS and group_size in AFFINE_GROUPS
    mode = MODES.get((bits, group_size)) if scales.dtype == mx.uint8 else "affine" if fits_affine else None
    if mode is None or bits * width != weight.shape[-1] * 32 or group_size * scales.shape[-1] != width:
        raise WeightsError(
            f"{path}: weight {list(weight.shape)}, scales {list(scales.shape)} {scales.dtype} do not pack rows of {width}"
        )
    if mode == "affine":
        biases = tensors.get(f"{path}.biases")
        if biases is None:
            raise WeightsError(f"{path}: affine scales without biases")
        if not all(mx.issubdtype(part.dtype, mx.floating) for part in (scales, biases)):
            raise WeightsError(f"{path}: scales {scales.dtype}, biases {biases.dtype}; expected floating point")
    return {"group_size": group_size, "bits": bits, "mode": mode}


def check_dtypes(tensors: Mapping[str, mx.array]) -> None:
    """Whatever is not part of a packed matrix is floating point. Raises `WeightsError`."""
    for name, tensor in tensors.items():
        path, _, part = name.rpartition(".")
        is_packed = part in ("weight", "scales") and f"{path}.scales" in tensors
        if not is_packed and not mx.issubdtype(tensor.dtype, mx.floating):
            raise WeightsError(f"{name} is {tensor.dtype}; expected floating point, or packed weights with scales")


def _stack_experts(args: ModelArgs, tensors: dict[str, mx.array], mlp: str) -> None:
    for projection in PROJECTIONS:
        for part in PACKED:
            names = [f"{mlp}.experts.{e}.{projection}.{part}" for e in range(args.n_routed_experts)]
            present = [n for n in names if n in tensors]
            if not present:
                continue
            if len(present) < len(names):
                absent = next(n for n in names if n not in tensors)
                raise WeightsError(f"{absent}: missing, though {present[0]} is there; a shard may be missing")
            experts = [tensors.pop(n) for n in names]
            for n, e in zip(names, experts, strict=True):
                if (e.shape, e.dtype) != (experts[0].shape, experts[0].dtype):
                    due = f"{experts[0].dtype} {list(experts[0].shape)}"
                    raise WeightsError(
                        f"{n}: {e.dtype} {list(e.shape)}, where {names[0]} is {due}: experts are of one kind"
                    )
            tensors[f"{mlp}.switch_mlp.{projection}.{part}"] = mx.stack(experts)


def _split_kv_b(args: ModelArgs, tensors: dict[str, mx.array], attention: str, dtype: mx.Dtype | None) -> None:
    """kv_b_proj = [W_uk; W_uv] per head. Packed along the latent, W_uv stays as it is; W_uk is turned, and so unpacked: packed
    anew it would be other weights (mlx-lm 1451)."""
    name = f"{attention}.kv_b_proj"
    if f"{name}.weight" not in tensors:
        return
    packed: list[Any] = []
    if f"{name}.scales" in tensors:  # early MLX builds, before embed_q
        packing = packing_of(name, tensors, args.kv_lora_rank)
        packed = [tensors.pop(f"{name}.{part}") for part in PACKED if f"{name}.{part}" in tensors]
        is_uneven = len({part.shape for part in packed[1:]}) > 1
        if is_uneven or any(part.ndim != 2 or part.shape[0] != packed[0].shape[0] for part in packed):
            raise WeightsError(
                f"{name}: weight, scales and biases of {[list(part.shape) for part in packed]} do not match"
            )
        floats = [p if dtype is None or p.dtype == mx.uint8 else p.astype(dtype) for p in packed[1:]]
        weight = mx.dequantize(packed[0], *floats, **packing)
    else:
        weight = tensors.pop(f"{name}.weight")
    heads = (args.num_attention_heads, args.qk_nope_head_dim + args.v_head_dim, args.kv_lora_rank)
    if weight.shape != (heads[0] * heads[1], heads[2]):
        raise WeightsError(f"{name}.weight is {list(weight.shape)}, expected {[heads[0] * heads[1], heads[2]]}")
    w_uk, w_uv = mx.split(weight.reshape(heads), [args.qk_nope_head_dim], axis=1)
    tensors[f"{attention}.embed_q.weight"] = mx.contiguous(w_uk.swapaxes(-1, -2))
    if not packed:
        tensors[f"{attention}.unembed_out.weight"] = mx.contiguous(w_uv)
    for suffix, part in zip(PACKED, packed, strict=False):
        rows = part.reshape(*heads[:2], -1)[:, args.qk_nope_head_dim :]
        tensors[f"{attention}.unembed_out.{suffix}"] = mx.contiguous(rows)
