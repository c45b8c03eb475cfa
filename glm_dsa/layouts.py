"""Names and layouts in which tools write a checkpoint, turned into the two that everything else here knows: HF's and mlx-lm's.

    as written                                          by                       read as
    language_model.*, model.language_model.*            mlx-vlm                  *, model.*
    mlp.experts.gate_up_proj [E, 2 I, H], down_proj     transformers 5 [1]       mlp.experts.E.{gate,up,down}_proj.weight
    mlp.(switch_mlp.)gate_up_proj.* [(E,) 2 I, H]       omlx [2]                 mlp.(switch_mlp.){gate,up}_proj.*
    self_attn.indexer.wk_weights_proj.* [D + heads, H]  omlx, vLLM [3]           self_attn.indexer.{wk,weights_proj}.*
    mtp.*, mtp.0.*                                      mlx-vlm, omlx [4]        model.layers.N.*, N = num_hidden_layers

[1] `save_pretrained(save_original_format=False)`; rows of gate before those of up, as in HF's own modules.
[2] patches/glm_moe_dsa/deepseek_v32.py concatenates gate and up in this order.
[3] vLLM's deepseek_v2.py merges [head_dim, n_head], omlx concatenates wk and weights_proj: wk's rows come first.
[4] mlx-vlm's drafters/glm_moe_dsa_mtp/split.py (`mtp.` and the layer's own names, the norm as `shared_head_norm`); omlx's
    patches/mlx_lm_mtp (`mtp.0.block.`, and the norm as `mtp.0.norm`).

What is decided here from names and shapes is done to headers (`checkpoint.read_headers`) and to arrays (`of_arrays`) alike.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .config import ModelArgs
from .errors import WeightsError

FP8_BLOCK = 128
LARGEST_STACK = 1024  # experts that one tensor of a header may stand for
LAYER = re.compile(r"model\.layers\.([0-9]{1,6})\.(.*)")
MTP = re.compile(r"mtp\.(?:(0)\.)?(?:(block)\.)?(.*)")
OF_MTP = re.compile(
    r"(enorm|hnorm|eh_proj|shared_head|embed_tokens|input_layernorm|post_attention_layernorm|self_attn|mlp)\..*"
)
EXPERTS = re.compile(r"mlp\.experts\.(gate_up_proj|down_proj)(_scale_inv)?")
GATE_UP = re.compile(r"(mlp(?:\.switch_mlp|\.shared_experts)?)\.gate_up_proj\.(weight|scales|biases|weight_scale_inv)")
INDEXER = re.compile(r"(self_attn\.indexer)\.wk_weights_proj\.(weight|scales|biases|weight_scale_inv)")
SEVERAL = (".gate_up_proj", ".wk_weights_proj.", ".experts.down_proj")  # what a name that these match has in it
COPIES = re.compile(r"(?:embed_tokens|shared_head\.head)\.(?:weight|scales|biases)")

PREFIX, STACKED, FUSED, HEAD, UNREAD = "prefix", "stacked experts", "fused rows", "MTP head", "unread"
SAID = {
    PREFIX: "{count} tensors are named language_model.*, as mlx-vlm writes them ({first}, ...): read without the prefix",
    STACKED: "{count} tensors hold all experts of a layer, as transformers saves its modules ({first}, ...): read one by one",
    FUSED: "{count} tensors hold two matrices, one above the other ({first}, ...): read as two",
    HEAD: "{count} tensors of an MTP head ({first}, ...): read as layer {layer}",
}


class Part(NamedTuple):
    """A tensor as it is stored: `source`, or of it one expert (of the first axis), or rows (of the last axis but one)."""

    source: str
    expert: int | None = None
    rows: tuple[int, int] | None = None

    def of(self, array: Any) -> Any:
        array = array if self.expert is None else array[self.expert]
        return array if self.rows is None else array[..., self.rows[0] : self.rows[1], :]

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        shape = whole if self.expert is None else whole[1:]
        return shape if self.rows is None else (*shape[:-2], self.rows[1] - self.rows[0], shape[-1])


@dataclass
class Plan:
    """parts: {name: where it is stored}. notes: lines for people. kinds: which of PREFIX, .. there are."""

    parts: dict[str, Part]
    notes: list[str] = field(default_factory=list)
    kinds: set[str] = field(default_factory=set)


def plan(shapes: Mapping[str, tuple[int, ...]], args: ModelArgs | None) -> Plan:
    """{stored name: shape} -> what each tensor is here. Without `args` only a prefix is seen through.

    Raises `WeightsError`, naming the stored tensors, where two mean the same, and where one cannot be divided.
    """
    found: dict[str, list[str]] = defaultdict(list)  # kind -> stored names
    parts: dict[str, Part] = {}
    for stored, shape in shapes.items():
        name = _without_prefix(stored)
        if name != stored:
            found[PREFIX].append(stored)
        if args is not None and name.startswith("mtp."):
            name, before = name_in_layer(args, name), name
            if name != before:
                found[HEAD].append(stored)
        known: Iterable[tuple[str, Part]] = ((name, Part(stored)),)
        if args is not None and any(word in name for word in SEVERAL):
            kind, known = _divided(args, name, stored, shape, shapes)
            if kind:
                found[kind].append(stored)
        for name, part in known:
            if name in parts:
                raise WeightsError(
                    f"{stored} and {parts[name].source} both hold {name}: expected one of them; remove the other"
                )
            parts[name] = part
    layer = None if args is None else args.num_hidden_layers
    notes = [SAID[kind].format(count=len(names), first=names[0], layer=layer) for kind, names in found.items()]
    out = Plan(parts, notes, set(found))
    if args is not None:
        _leave_unread(args, out, shapes)
    return out


def of_arrays(args: ModelArgs, tensors: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A checkpoint's arrays under names that are known here, and notes. Raises `WeightsError`."""
    found = plan({name: tuple(t.shape) for name, t in tensors.items()}, args)
    return {name: part.of(tensors[part.source]) for name, part in found.parts.items()}, found.notes


def name_in_layer(args: ModelArgs, name: str) -> str:
    """An MTP head's tensor under its name in layer N; any other as it is."""
    match = MTP.fullmatch(name)
    if match is None:
        return name
    rest = {"shared_head_norm.weight": "shared_head.norm.weight", "norm.weight": "shared_head.norm.weight"}.get(
        match[3], match[3]
    )
    return f"model.layers.{args.num_hidden_layers}.{rest}" if OF_MTP.fullmatch(rest) else name


def modules(args: ModelArgs, path: str) -> list[str]:
    """A module as config.json's key `quantization` names it -> the modules here that this speaks of."""
    name = name_in_layer(args, _without_prefix(f"{path}.weight"))
    layer = LAYER.fullmatch(name)
    for pattern, several in ((GATE_UP, ("gate_proj", "up_proj")), (INDEXER, ("wk", "weights_proj"))):
        if layer is not None and (match := pattern.fullmatch(layer[2])):
            return [f"model.layers.{layer[1]}.{match[1]}.{one}" for one in several]
    return [name.removesuffix(".weight")]


def is_of_mtp(args: ModelArgs, stored: str) -> bool:
    return name_in_layer(args, _without_prefix(stored)).startswith(_mtp_layer(args))


def _mtp_layer(args: ModelArgs) -> str:
    return f"model.layers.{args.num_hidden_layers}."


def _without_prefix(name: str) -> str:
    if name.startswith("model.language_model."):
        return f"model.{name.removeprefix('model.language_model.')}"
    return name.removeprefix("language_model.")


def _divided(
    args: ModelArgs, name: str, stored: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, Iterator[tuple[str, Part]]]:
    """(kind, [(name, part)]) of a tensor that holds several; itself where it holds one."""
    layer = LAYER.fullmatch(name)
    if layer is not None and int(layer[1]) <= args.num_hidden_layers:
        path = f"model.layers.{layer[1]}"
        if match := EXPERTS.fullmatch(layer[2]):
            return STACKED, _experts(f"{path}.mlp.experts", match[1], match[2] or "", stored, shape, shapes)
        if match := GATE_UP.fullmatch(layer[2]):
            weight = shapes.get(stored.removesuffix("_scale_inv"), ())
            halves = _halves(stored, shape, weight)
            names = (f"{path}.{match[1]}.{projection}_proj.{match[2]}" for projection in ("gate", "up"))
            return FUSED, iter([(n, Part(stored, rows=rows)) for n, rows in zip(names, halves, strict=True)])
        if (match := INDEXER.fullmatch(layer[2])) and args.has_indexer:
            rows = _of_indexer(args, stored, shape)
            names = (f"{path}.{match[1]}.{projection}.{match[2]}" for projection in ("wk", "weights_proj"))
            return FUSED, iter([(n, Part(stored, rows=r)) for n, r in zip(names, rows, strict=True)])
    return "", iter([(name, Part(stored))])


def _experts(
    path: str, which: str, suffix: str, stored: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Part]]:
    if len(shape) != 3 or not 0 < shape[0] <= LARGEST_STACK:
        raise WeightsError(f"{stored} is {list(shape)}: expected [experts, rows, columns], of at most {LARGEST_STACK}")
    if which == "down_proj":
        for expert in range(shape[0]):
            yield f"{path}.{expert}.down_proj.weight{suffix}", Part(stored, expert)
        return
    gate, up = _halves(stored, shape, shapes.get(stored.removesuffix("_scale_inv"), ()))
    for expert in range(shape[0]):
        yield f"{path}.{expert}.gate_proj.weight{suffix}", Part(stored, expert, gate)
        yield f"{path}.{expert}.up_proj.weight{suffix}", Part(stored, expert, up)


def _halves(stored: str, shape: tuple[int, ...], weight: tuple[int, ...]) -> tuple[tuple[int, int], tuple[int, int]]:
    """`weight`: the shape that block scales belong to."""
    if not 2 <= len(shape) <= 3 or shape[-2] % 2:
        raise WeightsError(f"{stored} is {list(shape)}: expected an even number of rows, gate's before up's")
    if stored.endswith("_scale_inv") and (len(weight) < 2 or weight[-2] % (2 * FP8_BLOCK)):
        raise WeightsError(
            f"{stored}: belongs to rows of {list(weight)}, and a block of {FP8_BLOCK} rows lies in gate and up: cannot be divided"
        )
    half = shape[-2] // 2
    return (0, half), (half, 2 * half)


def _of_indexer(args: ModelArgs, stored: str, shape: tuple[int, ...]) -> tuple[tuple[int, int], tuple[int, int]]:
    keys, heads = args.index_head_dim, args.index_n_heads
    if stored.endswith("_scale_inv"):
        if keys % FP8_BLOCK:
            raise WeightsError(f"{stored}: wk's {keys} rows end within a block of {FP8_BLOCK}: cannot be divided")
        keys, heads = keys // FP8_BLOCK, -(-heads // FP8_BLOCK)
    if len(shape) != 2 or shape[0] != keys + heads:
        raise WeightsError(f"{stored} is {list(shape)}: expected {keys} rows of wk, then {heads} of weights_proj")
    return (0, keys), (keys, keys + heads)


def _leave_unread(args: ModelArgs, found: Plan, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Takes out of the plan what a sound checkpoint may carry and this model has no place for, each said in a note."""
    layer, prefix = args.num_hidden_layers, _mtp_layer(args)
    own = [name for name in found.parts if name.startswith(prefix)]
    if f"{prefix}eh_proj.weight" not in found.parts:
        return  # no MTP layer: whatever lies there is refused by name
    router = found.parts.get(f"{prefix}mlp.gate.weight")
    experts = 0 if router is None else (*router.shape(shapes[router.source]), 0)[0]
    unread: list[str] = []
    if not args.num_nextn_predict_layers:
        unread = own
        found.notes.append(
            f"layer {layer} ({len(own)} tensors) is an MTP layer, and config.json names none (num_nextn_predict_layers): "
            "unread, as in HF"
        )
    elif experts > args.n_routed_experts:  # pruned by a tool that left this layer out
        unread = own
        found.notes.append(
            f"MTP layer {layer} has {experts} experts, the model {args.n_routed_experts}: dropped; nothing can be drafted with it"
        )
    elif not args.mtp_owns_embeddings:
        unread = [name for name in own if COPIES.fullmatch(name.removeprefix(prefix)) and _is_copy(name, found, shapes)]
        if unread:
            found.notes.append(f"{', '.join(unread)}: unread; MTP layer {layer} shares the model's embedding and head")
    for name in unread:
        del found.parts[name]
    found.kinds |= {UNREAD} if unread else set()


def _is_copy(name: str, found: Plan, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether it is as long as the model's own."""
    main = "lm_head.weight" if ".shared_head." in name else "model.embed_tokens.weight"
    part = found.parts.get(main, found.parts.get("model.embed_tokens.weight"))
    mine = found.parts[name]
    return part is not None and part.shape(shapes[part.source])[:1] == mine.shape(shapes[mine.source])[:1]
