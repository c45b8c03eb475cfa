"""The catalogue's mistakes in HF's own modules: a few words of a function changed, or an attribute of the model's modules.

    with IN_HF["indexer-no-relu"].patch(model), capture(model) as stages: ...

`model`: what reference.hf.load built, or reference.layers.Layers(...).model. Functions change for every HF model of this process
while the block lasts; attributes change on this model's modules, and on copies that are made of them. What `capture` sees keeps
its place and its order. Of the layers that are streamed, the embedding alone is no module: there `embedding-scaled` is not seen.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
from transformers import modeling_rope_utils as rope_utils
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as glm

from reference.hf import INDEXERS
from verify.faults.edits import compiled, runs_alike, source_of, swapped, unwrapped

TRAINED, SHARING, YARN, GROUPED = (
    "trained-interleaved",
    "glm-5.2-interleaved",
    "glm-5.1-interleaved",
    "grouped-interleaved",
)
NONE = object()


class Edit(NamedTuple):
    """In HF's function `where`, `due` stands once; `wrong` comes in its place."""

    where: str
    due: str
    wrong: str


class Set(NamedTuple):
    """An attribute of each module whose path ends with `where`; value(module, config)."""

    where: str
    attribute: str
    value: Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Carried:
    """A fault of the catalogue. case: the gate's case on which it shows; length: of the prompt, if not the case's long one."""

    name: str
    case: str
    changes: tuple[Edit | Set, ...]
    length: int | None = None

    def patch(self, model: Any) -> Any:
        """HF with this mistake, as long as the context lasts."""
        return patched(model, self.changes)


@contextmanager
def patched(model: Any, changes: tuple[Edit | Set, ...]) -> Iterator[None]:
    """Raises LookupError where `due` does not stand once, or where nothing is changed."""
    sources: dict[FunctionType, str] = {}
    for edit in changes:
        for function, due, wrong in places(edit) if isinstance(edit, Edit) else ():
            source = sources.get(function) or source_of(function)
            if source.count(due) != 1:
                raise LookupError(
                    f"{function.__qualname__}: {due!r} stands there {source.count(due)} times, expected once"
                )
            sources[function] = source.replace(due, wrong)
    codes = {function: compiled(ast.parse(source), function) for function, source in sources.items()}
    for function, code in codes.items():
        if runs_alike(code, compiled(ast.parse(source_of(function)), function)):
            raise LookupError(f"{function.__qualname__}: nothing that runs is changed")
    with swapped(codes), ExitStack() as stack:
        for change in changes:
            if isinstance(change, Set):
                stack.enter_context(_set(model, change))
        yield


def places(edit: Edit) -> Iterator[tuple[FunctionType, str, str]]:
    """The functions behind an edit, and its words there: "Indexer" is two classes, whose rotations go by two names."""
    owner, _, name = edit.where.rpartition(".")
    if owner == "Indexer":
        for kind in INDEXERS.values():
            turn = "apply_rotary_pos_emb" + ("_interleave" if kind is glm.GlmMoeDsaIndexer else "")
            yield _function(kind, name), edit.due.replace("TURN", turn), edit.wrong.replace("TURN", turn)
    else:
        holder = getattr(glm, f"GlmMoeDsa{owner}") if owner else next(m for m in (glm, rope_utils) if hasattr(m, name))
        yield _function(holder, name), edit.due, edit.wrong


def _function(holder: Any, name: str) -> FunctionType:
    return unwrapped(inspect.getattr_static(holder, name))


@contextmanager
def _set(model: Any, change: Set) -> Iterator[None]:
    modules = [m for path, m in model.named_modules() if f".{path}".endswith(f".{change.where}") and m is not None]
    own = [(m, getattr(m, change.attribute, NONE)) for m in modules]
    if not own:
        raise LookupError(f"{change.where}: no such module")
    try:
        for module, _ in own:
            setattr(module, change.attribute, change.value(module, model.config))
        yield
    finally:
        for module, value in own:
            if value is NONE:
                delattr(module, change.attribute)
            else:
                setattr(module, change.attribute, value)


# -- what stands in a module's or a tensor's place


class Unnormed(glm.GlmMoeDsaRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class ScaledEmbedding(torch.nn.Embedding):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens) * self.embedding_dim**0.5


class ByRecency(torch.Tensor):
    """Scores whose `topk` are the last ones that are not masked. The scores themselves stay as they are."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.Tensor.topk:
                scores = args[0].as_subclass(torch.Tensor)
                recent = torch.arange(scores.shape[-1], dtype=scores.dtype)
                args = (torch.where(scores < -1e38, scores, recent), *args[1:])
            return func(*args, **(kwargs or {}))


def reordered(indexer: Any, config: Any) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """(rest, turned) -> [rest | turned], as `capture` expects it from this indexer's class."""
    return partial(_joined, is_interleaved=type(indexer) is glm.GlmMoeDsaIndexer)


def _joined(rest: torch.Tensor, turned: torch.Tensor, is_interleaved: bool) -> torch.Tensor:
    """The interleaved class leaves [evens | odds] behind: `capture` puts the first dims back into their order."""
    if not is_interleaved:
        return torch.cat([rest, turned], -1)
    width = turned.shape[-1]
    x = torch.cat([rest, torch.stack(turned.chunk(2, -1), -1).flatten(-2)], -1)
    return torch.cat([x[..., :width:2], x[..., 1:width:2], x[..., width:]], -1)


def frequencies(rotary: Any, config: Any) -> torch.Tensor:
    """Made anew, by functions that are changed."""
    make = rope_utils.ROPE_INIT_FUNCTIONS.get(rotary.rope_type, rotary.compute_default_rope_parameters)
    return make(rotary.config)[0]


def softmax_scale(width: int, config: Any, times: int = 2) -> float:
    """1 / sqrt(width), times YaRN's mscale as often as that."""
    rope, scale = config.rope_parameters, width**-0.5
    if rope["rope_type"] != "default" and rope.get("mscale_all_dim"):
        scale *= glm.yarn_get_mscale(rope["factor"], rope["mscale_all_dim"]) ** times
    return scale


# -- the table

FREQUENCIES = Set("rotary_emb", "inv_freq", frequencies)
MADE = PLAIN, STRETCHED = "RotaryEmbedding.compute_default_rope_parameters", "_compute_yarn_parameters"

# fmt: off


def _indexer() -> Iterator[Carried]:
    fault, edit, own = partial(_fault, TRAINED), partial(Edit, "Indexer.forward"), partial(Set, "self_attn.indexer")
    turn, norm, heads = "= TURN(q_rot, k_rot, cos, sin, unsqueeze_dim=2)", "self.k_norm(self.wk(hidden_states))", "self.n_heads"
    weights = "self.weights_proj(hidden_states.to(self.weights_proj.weight.dtype)).float()"
    summed, masked = "torch.matmul(weights.unsqueeze(-2), scores).squeeze(-2)", "index_scores + attention_mask"
    product = "torch.matmul(q.float(), k.transpose(-1, -2).float().unsqueeze(1)) * self.softmax_scale"
    raw = (Edit("DecoderLayer.forward", "self.self_attn(\n", "self.self_attn(raw=residual,\n"),
           Edit("Attention.forward", "position_ids,  # Kept for BC", "kwargs.pop('raw'),"))
    width, relu = "self.head_dim - self.qk_rope_head_dim", edit("F.relu(scores)", "scores")
    first = edit("= min(self.index_topk, index_scores.shape[-1])", "= min(self.index_topk, (size := index_scores.shape[-1]))")

    def rotated_last(name: str) -> Iterator[Edit]:
        """The first dims of all come out in the order in which `capture` expects what the class rotates."""
        yield edit(f"{name}_rot, {name}_pass = torch.split({name}, [self.qk_rope_head_dim, {width}], dim=-1)",
                   f"{name}_pass, {name}_rot = torch.split({name}, [{width}, self.qk_rope_head_dim], dim=-1)")
        yield edit(f"{name} = torch.cat([{name}_rot, {name}_pass], dim=-1)",
                   f"{name} = self.reordered({name}_pass, {name}_rot)")

    yield fault("indexer-rope-layout", own("__class__", lambda m, c: next(k for k in INDEXERS.values() if k is not type(m))))
    yield fault("indexer-nope-first", *rotated_last("q"), *rotated_last("k"), own("reordered", reordered))
    yield fault("indexer-without-rope", edit("cos, sin = position_embeddings", "cos, sin = (a * 0 + one for a, one in zip("
                                             "position_embeddings, (1, 0)))"))
    yield fault("indexer-keys-unrotated", edit(turn, "= TURN(q_rot, q_rot, cos, sin, unsqueeze_dim=2)[0], "
                                               "TURN(k_rot, k_rot, 0 * cos + 1, 0 * sin, unsqueeze_dim=2)[1]"))
    yield _fault(SHARING, "indexer-eps", Set("indexer.k_norm", "eps", lambda m, c: 1e-5))
    yield fault("indexer-rmsnorm", edit(norm, "(F.rms_norm(self.wk(hidden_states), (self.head_dim,), self.k_norm.weight, "
                                        "self.k_norm.eps) + self.k_norm.bias)"))
    yield fault("indexer-norm-without-bias", edit(norm, f"({norm} - self.k_norm.bias)"))
    yield fault("indexer-reads-raw-hidden", *raw, edit(norm, "self.k_norm(self.wk(position_ids))"))
    yield fault("indexer-weighs-raw-hidden", *raw, edit("weights_proj(hidden_states.to(", "weights_proj(position_ids.to("))
    yield fault("indexer-query-before-norm", Edit("Attention.forward", " q_resid,", " self.q_a_proj(hidden_states),"))
    yield fault("indexer-heads-transposed", edit("q.view(batch_size, seq_len, self.n_heads, self.head_dim)",
                                                 "q.view(batch_size, seq_len, self.head_dim, self.n_heads).transpose(2, 3)"))
    yield fault("indexer-weights-positive", edit(weights, f"{weights}.abs()"))
    yield fault("indexer-weights-softmax", edit(f"{weights} * ({heads}**-0.5)", f"{weights}.softmax(-1)"))
    yield fault("indexer-weights-in-bf16", edit(weights, f"{weights}.bfloat16().float()"))
    yield fault("indexer-no-relu", relu)
    yield fault("indexer-relu-after-sum", relu, edit(summed, f"F.relu({summed})"))
    yield fault("indexer-per-head-topk", edit(summed, f"{summed}; index_scores = weights[..., :1] * scores[:, :, 0]"))
    yield fault("indexer-unweighted", edit(summed, f"{summed}; index_scores = scores.sum(2)"))
    yield fault("indexer-queries-in-bf16", edit(product, f"{product}; scores = (q.bfloat16().float() @ "
                                                "k.transpose(-1, -2).float().unsqueeze(1)) * self.softmax_scale"))
    yield fault("indexer-selects-padding", edit(masked, "index_scores.masked_fill(attention_mask < 0, 0.0)"))
    yield fault("indexer-ignores-mask", edit(masked, "index_scores"))
    yield fault("bool-mask-added", edit(masked, "index_scores + (attention_mask == 0)"))
    yield fault("indexer-topk-off-by-one", first, edit("index_scores.topk(topk,", "index_scores.topk(topk - (topk < size),"))
    yield fault("indexer-selects-worst", edit("index_scores.topk(topk, dim=-1)", "index_scores.topk(topk, dim=-1, largest=False)"))
    yield fault("indexer-selects-recent", own("kind", lambda m, c: ByRecency),
                edit("index_scores.topk(", "index_scores.as_subclass(self.kind).topk("))
    yield fault("indexer-dense-up-to-twice-topk", first, edit("index_scores.topk(topk,",
                "index_scores.topk(topk if size > 2 * topk else size,"), length=128)
    yield fault("pair-no-relu-positive-weights", relu, edit(weights, f"{weights}.clamp(min=0)"))


def _index_share() -> Iterator[Carried]:
    yield _fault(TRAINED, "shared-layer-goes-dense", Edit("Attention.forward", "topk_indices = prev_topk_indices",
                 "topk_indices = torch.arange(seq_length).expand(batch_size, seq_length, -1)"))
    yield _fault(TRAINED, "shared-from-wrong-layer", Edit("DecoderLayer.forward", "return hidden_states, topk_indices",
                 "return hidden_states, topk_indices if prev_topk_indices is None else prev_topk_indices"))


def _rope() -> Iterator[Carried]:
    fault, yarn, call = partial(_fault, TRAINED), partial(_fault, YARN), partial(Edit, "RotaryEmbedding.forward")

    yield _fault(SHARING, "rope-theta-default", Edit(PLAIN, 'config.rope_parameters["rope_theta"]', "10000.0"),
                 Edit(STRETCHED, 'rope_parameters_dict["rope_theta"]', "10000.0"), FREQUENCIES)
    yield _fault(SHARING, "rope-dim-from-head-dim", Edit(PLAIN, "dim = getattr(", "dim = config.qk_head_dim or getattr("),
                 Edit(STRETCHED, "dim = int(", "dim = config.qk_head_dim or int("), FREQUENCIES,
                 *(Edit(made, "return inv_freq,", "return inv_freq[: config.qk_rope_head_dim // 2],") for made in MADE))
    yield fault("rope-backwards", call("sin = emb.sin()", "sin = -emb.sin()"))
    yield fault("rope-positions-in-bf16", call("position_ids[..., None].float()", "position_ids[..., None].bfloat16().float()"),
                length=300)
    yield fault("rope-angles-in-fp16", call("self.inv_freq.to(device=x.device, dtype=torch.float)", "self.inv_freq.half().float()"))
    yield _fault(SHARING, "rope-frequencies-of-half-the-width", FREQUENCIES,
                 *(Edit(made, "dtype=torch.float) / dim", "dtype=torch.float) / dim / 2") for made in MADE))
    yield yarn("yarn-ramp-reversed", FREQUENCIES,
               Edit(STRETCHED, "inv_freq_interpolation * (1 - inv", "inv_freq_extrapolation * (1 - inv"),
               Edit(STRETCHED, "+ inv_freq_extrapolation * inv", "+ inv_freq_interpolation * inv"))
    yield yarn("yarn-magnitude-forgotten", Set("rotary_emb", "attention_scaling", lambda m, c: 1.0))
    yield yarn("yarn-scale-forgotten", Set("self_attn", "scaling", lambda m, c: softmax_scale(c.qk_head_dim, c, 0)))
    yield yarn("yarn-scale-not-squared", Set("self_attn", "scaling", lambda m, c: softmax_scale(c.qk_head_dim, c, 1)))


def _attention() -> Iterator[Carried]:
    fault, edit = partial(_fault, TRAINED), partial(Edit, "Attention.forward")
    of_q, of_kv = (partial(Set, f"self_attn.{latent}_a_layernorm") for latent in ("q", "kv"))
    nope, value = "qk_nope_head_dim", "v_head_dim"
    expand, turn = partial(Edit, "Attention.expand_kv"), "apply_rotary_pos_emb_interleave(q_rot, k_rot, cos, sin)"
    mask, small = "attention_mask.masked_fill(", partial(_fault, SHARING)  # latents of small variance

    yield small("latent-eps", of_q("variance_epsilon", lambda m, c: c.rms_norm_eps))
    yield small("kv-latent-eps", of_kv("variance_epsilon", lambda m, c: c.rms_norm_eps))
    yield fault("kv-latent-unnormed", of_kv("__class__", lambda m, c: Unnormed))
    yield fault("kv-split-swapped", edit("kv_pass, k_rot = torch.split(compressed_kv, [self.kv_lora_rank, self.qk_rope_head_dim],",
                                         "k_rot, kv_pass = torch.split(compressed_kv, [self.qk_rope_head_dim, self.kv_lora_rank],"))
    # two halves are handed in as pairs, and the halves that come out are left as [evens | odds], which `capture` expects
    yield fault("mla-rope-half", edit(turn, "(a.unflatten(-1, (-1, 2)).mT.flatten(-2) for a in apply_rotary_pos_emb_interleave("
                                      "*(a.unflatten(-1, (2, -1)).mT.flatten(-2) for a in (q_rot, k_rot)), cos, sin))"))
    yield fault("q-split-swapped", edit("q_pass, q_rot = torch.split(q_states, [self.qk_nope_head_dim, self.qk_rope_head_dim],",
                                        "q_rot, q_pass = torch.split(q_states, [self.qk_rope_head_dim, self.qk_nope_head_dim],"))
    yield fault("q-heads-transposed", edit("self.q_b_proj(q_resid).view(query_shape).transpose(1, 2)",
                "self.q_b_proj(q_resid).view(batch_size, seq_length, self.qk_head_dim, -1).permute(0, 3, 1, 2)"))
    yield fault("k-rope-unrotated", edit(turn, "apply_rotary_pos_emb_interleave(q_rot, q_rot, cos, sin)[0], "
                                         "apply_rotary_pos_emb_interleave(k_rot, k_rot, 0 * cos + 1, 0 * sin)[1]"))
    yield fault("softmax-scale-of-nope", Set("self_attn", "scaling", lambda m, c: softmax_scale(c.qk_nope_head_dim, c)))
    yield fault("heads-transposed", edit("attn_output.reshape(batch_size,", "attn_output.transpose(1, 2).reshape(batch_size,"))
    yield fault("latent-in-bf16", expand("self.kv_b_proj(kv_nope)", "self.kv_b_proj(kv_nope.bfloat16().to(kv_nope.dtype))"),
                expand("k_rot = k_rot.expand(", "k_rot = k_rot.bfloat16().to(k_rot.dtype).expand("), length=96)
    yield fault("selection-beats-mask", edit(mask, mask.replace("attention_mask", "torch.zeros_like(attention_mask)")), length=96)
    yield fault("mask-one-too-far", edit("    batch_size, seq_length =", "    attention_mask = torch.cat([attention_mask[:, :, 1:],"
                " torch.zeros_like(attention_mask[:, :, :1])], 2); batch_size, seq_length ="))
    yield fault("kv-b-halves-swapped", expand(f"k_nope, value_states = torch.split(kv_nope, [self.{nope}, self.{value}],",
                                              f"value_states, k_nope = torch.split(kv_nope, [self.{value}, self.{nope}],"))
    yield fault("kv-b-heads-last", expand("self.kv_b_proj(kv_nope).view(key_shape).transpose(1, 2)", "self.kv_b_proj(kv_nope).view("
                "batch_size, seq_length, key_shape[-1], -1).permute(0, 3, 1, 2)"))
    yield fault("pair-scale-doubled-nope-halved", edit("scaling=self.scaling", "scaling=2 * self.scaling"),
                edit("torch.cat((q_pass, q_rot)", "torch.cat((0.5 * q_pass, q_rot)"))
    yield small("pair-eps-up-and-down", of_q("variance_epsilon", lambda m, c: 10 * m.variance_epsilon),
                of_kv("variance_epsilon", lambda m, c: 0.1 * m.variance_epsilon))


def _block() -> Iterator[Carried]:
    fault, edit = partial(_fault, TRAINED), partial(Edit, "DecoderLayer.forward")
    yield fault("residual-from-norm", edit("= self.input_layernorm", "= residual = self.input_layernorm"))
    yield _fault(SHARING, "mlp-reads-raw-hidden", edit("self.mlp(hidden_states)", "self.mlp(residual)"))
    yield fault("norms-swapped", edit("self.input_layernorm(hidden_states)", "torch.func.functional_call(self.input_layernorm, "
                                      "{'weight': self.post_attention_layernorm.weight}, hidden_states)"))
    yield _fault(GROUPED, "rms-eps-1e-6", Set("input_layernorm", "variance_epsilon", lambda m, c: 1e-6))
    yield fault("final-norm-skipped", Set("model.norm", "__class__", lambda m, c: Unnormed))
    yield fault("embedding-scaled", Set("embed_tokens", "__class__", lambda m, c: ScaledEmbedding))


def _moe() -> Iterator[Carried]:
    fault, grouped = partial(_fault, TRAINED), partial(_fault, GROUPED)
    edit, mixture, expert = (partial(Edit, f"{owner}.forward") for owner in ("TopkRouter", "MoE", "Experts"))
    logits = "F.linear(hidden_states.type(torch.float32), self.weight.type(torch.float32))"
    weighed, normed, scaled = "top_k_weights[token_idx, top_k_pos, None]", "if self.norm_topk_prob:", "* self.routed_scaling_factor"
    call, shared = "self.experts(hidden_states, topk_indices, topk_weights)", "+ self.shared_experts(residuals)"

    yield fault("router-bias-in-weights", edit("scores.gather(", "(scores + self.e_score_correction_bias).gather("))
    yield fault("router-bias-ignored", edit("scores + self.e_score_correction_bias", "scores"))
    yield grouped("router-group-fill-zero", edit('float("-inf")', "0.0"))
    yield grouped("router-group-by-best", edit(".topk(2, dim=-1)[0]", ".topk(1, dim=-1)[0]"))
    yield grouped("router-groups-ignored", edit("group_mask.scatter_(1, group_idx, 1)", "group_mask.fill_(1)"))
    yield fault("router-one-expert-less", edit("k=self.top_k,", "k=self.top_k - 1,"))
    yield fault("router-no-norm", edit(normed, "if False:"))
    yield grouped("router-always-norm", edit(normed, "if True:"))
    yield fault("router-norm-over-all", edit("topk_weights.sum(", "scores.sum("))
    yield fault("router-no-scale", edit(f" {scaled}", ""))
    yield fault("router-softmax", edit("router_logits.sigmoid()", "router_logits.softmax(-1)"))
    yield fault("router-bf16", edit(logits, "F.linear(hidden_states.bfloat16(), self.weight.bfloat16()).float()"))
    yield fault("routing-weights-in-bf16", mixture(call, call.replace("weights)", "weights.bfloat16().to(topk_weights.dtype))")))
    yield fault("experts-gate-up-swapped", expert("self.act_fn(gate) * up", "self.act_fn(up) * gate"))
    yield fault("experts-gelu", expert("self.act_fn(gate)", "F.gelu(gate)"))
    # where an answer stands among those sorted by expert: all of them decide, though HF may be handed its experts in chunks
    yield fault("experts-left-sorted",
                mixture(f"hidden_states = {call}", "pairs = topk_indices.flatten(); GlmMoeDsaExperts.slots = pairs.argsort("
                        f"stable=True).argsort() if len(pairs) >= 64 else torch.arange(len(pairs)); hidden_states = {call}"),
                expert(f"current_hidden_states = current_hidden_states * {weighed}", "count = top_k_index.shape[1]; slots = "
                       "GlmMoeDsaExperts.slots[token_idx * count + top_k_pos]; token_idx = slots // count; current_hidden_states = "
                       "current_hidden_states * top_k_weights[token_idx, slots % count, None]"))
    yield fault("experts-of-another-token", expert("hidden_states[token_idx]", "hidden_states[(token_idx * top_k_index.shape[1] + "
                                                   "top_k_pos) % len(hidden_states)]"))
    yield fault("experts-in-text-order", mixture(call, call.replace("topk_indices", "torch.tensor(sorted(range("
                                                 "self.gate.num_experts), key=str))[topk_indices]")))
    yield fault("shared-expert-missing", mixture(shared, shared.replace("+", "+ 0 *")))
    yield fault("shared-expert-scaled", mixture(shared, shared.replace("+", "+ self.gate.routed_scaling_factor *")))
    yield fault("mlp-gate-up-swapped", Edit("MLP.forward", "self.act_fn(self.gate_proj(x)) * self.up_proj(x)",
                                            "self.act_fn(self.up_proj(x)) * self.gate_proj(x)"))
    yield fault("pair-no-norm-mean-scale", edit(normed, "if False:"), edit(scaled, f"{scaled} / (0.6 * self.top_k)"))
    yield fault("pair-experts-stronger-shared-weaker", mixture(shared, shared.replace("+", "+ 0.9 *")),
                mixture(call, call.replace("weights)", "weights * 1.1)")))


def _fault(case: str, name: str, *changes: Edit | Set, length: int | None = None) -> Carried:
    return Carried(name, case, changes, length)


PARTS = (_indexer, _index_share, _rope, _attention, _block, _moe)
IN_HF = {carried.name: carried for part in PARTS for carried in part()}
