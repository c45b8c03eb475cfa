"""The catalogue's mistakes in mlx-lm's own definition, as files that `--implementation` takes.

The text comes from the package that is installed: its definition, with what it is made of (YaRN, the experts' switch) in one
file. Two mistakes of stock's own are put right first: k_norm's eps, and 0 for the experts of losing groups. It knows no
IndexShare; so the cases are those of implementation.subject.specs() that have none, where what is put right agrees with HF.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mlx_lm.models import deepseek_v32, glm_moe_dsa, rope_utils, switch_layers

YARN, GROUPED = "glm-5.1-interleaved", "grouped-without-indexshare"
Edits = tuple[tuple[str, str], ...]
Found = dict[str, Edits | tuple[str, str]]  # one edit stands there by itself


@dataclass(frozen=True)
class CarriedToStock:
    """source_edits: (what stands once in the file, what comes in its place). case: where it shows, of subject.specs();
    length: of the prompt, if not the case's long one."""

    name: str
    source_edits: Edits
    case: str
    length: int | None = None


@cache
def base() -> str:
    """Raises LookupError where mlx-lm's text is another."""
    text = inspect.getsource(deepseek_v32)
    inlined = {
        "from .rope_utils import initialize_rope": (rope_utils, ("YarnRoPE", "initialize_rope")),
        "from .switch_layers import SwitchGLU": (switch_layers, ("_gather_sort", "_scatter_unsort", "SwitchGLU")),
    }
    sources = [inspect.getsource(getattr(module, name)) for module, names in inlined.values() for name in names]
    own = inspect.getsource(deepseek_v32.ModelArgs)
    edits = [(line, f"from {module.__name__} import *") for line, (module, _) in inlined.items()]
    edits += [(own, "\n\n".join([inspect.getsource(glm_moe_dsa.ModelArgs), *sources]))]
    edits += [
        ("nn.LayerNorm(self.head_dim)", "nn.LayerNorm(self.head_dim, eps=1e-6)"),
        ("mx.array(0.0)", "mx.array(-mx.inf)"),
    ]
    return edited(text, tuple(edits)).replace("\nfrom .", "\nfrom mlx_lm.models.")


def edited(text: str, edits: Edits) -> str:
    for due, wrong in edits:
        if text.count(due) != 1:
            raise LookupError(f"mlx-lm: {due!r} stands there {text.count(due)} times, expected once")
        text = text.replace(due, wrong)
    return text


def write_stock(path: str | Path, name: str | None = None) -> Path:
    """Stock as a file of its own, right (None) or with a fault of `IN_STOCK`."""
    path = Path(path)
    path.write_text(base() if name is None else edited(base(), IN_STOCK[name].source_edits))
    return path


# -- the table

# fmt: off


def _indexer() -> Found:
    q, k, normed = "q = self.rope(q, offset=offset)", "k = self.rope(k, offset=offset)", "k = self.k_norm(k)"
    scaled = "self.weights_proj(x) * (self.n_heads**-0.5 * self.softmax_scale)"
    relu, weighed = "scores = mx.maximum(scores, 0)", "scores = scores * weights"
    masked, picked = 'scores = mx.where(mask, scores, -float("inf"))', "mx.argpartition(scores,"
    attend = "r = self.self_attn(self.input_layernorm(x), mask, cache)"
    raw = attend, f"self.self_attn.indexer._raw = x; {attend}"

    def rotated_last(line: str, name: str) -> tuple[str, str]:
        rest, turned = f"{name}[..., : -self.rope_head_dim]", f"{name}[..., -self.rope_head_dim :]"
        return line, f"{name} = mx.concatenate([{rest}, self.rope({turned}, offset=offset)], axis=-1)"

    def weights(text: str) -> tuple[str, str]:
        return scaled, scaled.replace("self.weights_proj(x)", text)

    return {
        "indexer-rope-layout": ("traditional=args.indexer_rope_interleave", "traditional=not args.indexer_rope_interleave"),
        "indexer-nope-first": (rotated_last(q, "q"), rotated_last(k, "k")),
        "indexer-without-rope": ((q, "pass"), (k, "pass")),
        "indexer-keys-unrotated": (k, "pass"),
        "indexer-eps": ("nn.LayerNorm(self.head_dim, eps=1e-6)", "nn.LayerNorm(self.head_dim, eps=1e-5)"),
        "indexer-rmsnorm": (normed, "k = mx.fast.rms_norm(k, self.k_norm.weight, self.k_norm.eps) + self.k_norm.bias"),
        "indexer-norm-without-bias": (normed, f"{normed} - self.k_norm.bias"),
        "indexer-reads-raw-hidden": (raw, ("k = self.wk(x)", "k = self.wk(self._raw)")),
        "indexer-weighs-raw-hidden": (raw, weights("self.weights_proj(self._raw)")),
        "indexer-query-before-norm": ("self.indexer(x, qr,", "self.indexer(x, self.q_a_proj(x),"),
        "indexer-heads-transposed": ("q.reshape(b, s, self.n_heads, self.head_dim).swapaxes(1, 2)",
                                     "q.reshape(b, s, self.head_dim, self.n_heads).transpose(0, 3, 1, 2)"),
        "indexer-weights-positive": weights("mx.abs(self.weights_proj(x))"),
        "indexer-weights-softmax": (scaled, "mx.softmax(self.weights_proj(x), axis=-1) * self.softmax_scale"),
        "indexer-weights-in-bf16": weights("self.weights_proj(x).astype(mx.bfloat16).astype(x.dtype)"),
        "indexer-no-relu": (relu, "pass"),
        "indexer-relu-after-sum": ((relu, "pass"), (masked, masked.replace("scores, -", "mx.maximum(scores, 0), -"))),
        "indexer-per-head-topk": (weighed, f"{weighed} * (mx.arange(self.n_heads) == 0)[:, None, None]"),
        "indexer-unweighted": (weighed, "pass"),
        "indexer-queries-in-bf16": ("scores = q @ k", "scores = q.astype(mx.bfloat16).astype(q.dtype) @ k"),
        "indexer-selects-padding": (masked, "scores = mx.where(mask, scores, 0.0)"),
        "indexer-ignores-mask": (masked, "pass"),
        "bool-mask-added": (masked, "scores = scores + mask"),
        "indexer-topk-off-by-one": (("kth=-self.index_topk,", "kth=1 - self.index_topk,"),
                                    ("..., -self.index_topk :", "..., 1 - self.index_topk :")),
        "indexer-selects-worst": (picked, "mx.argpartition(-scores,"),
        "indexer-selects-recent": (picked, "mx.argpartition(mx.where(mx.isinf(scores), scores, mx.arange(scores.shape[-1])),"),
        "indexer-dense-up-to-twice-topk": ("if k.shape[2] <= self.index_topk:", "if k.shape[2] <= 2 * self.index_topk:"),
        "pair-no-relu-positive-weights": ((relu, "pass"), weights("mx.maximum(self.weights_proj(x), 0)")),
    }


def _rope() -> Found:
    scaled = "self.scale = self.scale * s * s"
    return {
        "rope-theta-default": (("base=args.rope_theta,", "base=10000.0,"), ("base=self.rope_theta,", "base=10000.0,")),
        "rope-backwards": ("-self._freqs if inverse else self._freqs", "-self._freqs"),
        "rope-angles-in-fp16": ("-self._freqs if inverse else self._freqs",
                                "1 / (1 / self._freqs).astype(mx.float16).astype(mx.float32)"),
        "rope-frequencies-of-half-the-width": ("freq_extra = base ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)",
                                               "freq_extra = base ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims / 2)"),
        "yarn-ramp-reversed": ("freq_mask = 1.0 - yarn_linear", "freq_mask = yarn_linear"),
        "yarn-magnitude-forgotten": ("if self.mscale != 1.0:", "if False:"),
        "yarn-scale-forgotten": (scaled, "pass"),
        "yarn-scale-not-squared": (scaled, "self.scale = self.scale * s"),
    }


def _attention() -> Found:
    of_q, of_kv = (f"self.{n}_a_layernorm = nn.RMSNorm(self.{n}_lora_rank, eps=1e-6)" for n in ("q", "kv"))
    split_kv = "compressed_kv, k_pe = mx.split(compressed_kv, [self.kv_lora_rank], axis=-1)"
    split_q, scale = "q_nope, q_pe = mx.split(q, [self.qk_nope_head_dim], axis=-1)", "self.scale = self.q_head_dim**-0.5"
    scores, layers = "pe_scores = (q_pe * self.scale) @ k_pe", "for layer, c in zip(self.pipeline_layers, cache):"
    heads = "output.transpose(0, 2, 1, 3).reshape(B, L, -1)"
    return {
        "latent-eps": (of_q, of_q.replace("1e-6", "config.rms_norm_eps")),
        "kv-latent-eps": (of_kv, of_kv.replace("1e-6", "config.rms_norm_eps")),
        "kv-latent-unnormed": ("self.kv_a_layernorm(compressed_kv)", "compressed_kv"),
        "kv-split-swapped": (split_kv, "k_pe, compressed_kv = mx.split(compressed_kv, [self.qk_rope_head_dim], axis=-1)"),
        "mla-rope-half": ("traditional=True,", "traditional=False,"),
        "q-split-swapped": (split_q, "q_pe, q_nope = mx.split(q, [self.qk_rope_head_dim], axis=-1)"),
        "q-heads-transposed": ("q.reshape(B, L, self.num_heads, self.q_head_dim).transpose(0, 2, 1, 3)",
                               "q.reshape(B, L, self.q_head_dim, self.num_heads).transpose(0, 3, 1, 2)"),
        "k-rope-unrotated": ("k_pe = self.rope(k_pe, offset)", "pass"),
        "softmax-scale-of-nope": (scale, "self.scale = self.qk_nope_head_dim**-0.5"),
        "heads-transposed": (heads, "output.reshape(B, L, -1)"),
        "latent-in-bf16": (scores, "kv_latent, k_pe = (a.astype(mx.bfloat16).astype(a.dtype) for a in (kv_latent, k_pe)); "
                           f"{scores}"),
        "selection-beats-mask": ("sparse_mask = sparse_mask & mask", "pass"),
        "mask-one-too-far": (layers, "mask = None if mask is None else mx.concatenate([mask[..., 1:, :], "
                             f"mx.ones_like(mask[..., :1, :])], axis=-2)\n        {layers}"),
        "kv-b-halves-swapped": (("v[:, : self.args.qk_nope_head_dim, :]", "v[:, self.args.v_head_dim :, :]"),
                                ("v[:, self.args.qk_nope_head_dim :, :]", "v[:, : self.args.v_head_dim, :]")),
        "kv-b-heads-last": ("v.reshape(num_heads, head_dim, -1)", "v.reshape(head_dim, num_heads, -1).swapaxes(0, 1)"),
        "pair-scale-doubled-nope-halved": ((scale, scale.replace("= ", "= 2 * ")), (split_q, f"{split_q}; q_nope = 0.5 * q_nope")),
        "pair-eps-up-and-down": ((of_q, of_q.replace("1e-6", "1e-5")), (of_kv, of_kv.replace("1e-6", "1e-7"))),
    }


def _block() -> Found:
    return {
        "residual-from-norm": ("h = x + r", "h = self.input_layernorm(x) + r"),
        "mlp-reads-raw-hidden": ("self.mlp(self.post_attention_layernorm(h))", "self.mlp(h)"),
        "norms-swapped": ("self.self_attn(self.input_layernorm(x)", "self.self_attn(self.post_attention_layernorm(x)"),
        "rms-eps-1e-6": ("self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)",
                         "self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=1e-6)"),
        "final-norm-skipped": ("return self.norm(h)", "return h"),
        "embedding-scaled": ("h = self.embed_tokens(x)", "h = self.embed_tokens(x) * self.embed_tokens.weight.shape[-1] ** 0.5"),
    }


def _moe() -> Found:
    weights, normed, scaled = "mx.take_along_axis(orig_scores,", "if top_k > 1 and norm_topk_prob:", "* routed_scaling_factor"
    summed, activated, shared = "(y * scores[..., None])", "self.activation(x_up, x_gate)", "y = y + self.shared_experts(x)"
    return {
        "router-bias-in-weights": (weights, "mx.take_along_axis(orig_scores + e_score_correction_bias,"),
        "router-bias-ignored": ("scores = scores + e_score_correction_bias", "pass"),
        "router-group-fill-zero": ("mx.array(-mx.inf)", "mx.array(0.0)"),
        "router-group-by-best": ("mx.topk(scores, 2, axis=-1)", "mx.topk(scores, 1, axis=-1)"),
        "router-groups-ignored": ("if n_group > 1:", "if False:"),
        "router-one-expert-less": ("    k = top_k\n", "    k = top_k - 1\n"),
        "router-no-norm": (normed, "if False:"),
        "router-always-norm": (normed, "if True:"),
        "router-norm-over-all": ("denominator = scores.sum(", "denominator = orig_scores.sum("),
        "router-no-scale": (f" {scaled}", ""),
        "router-softmax": ("mx.sigmoid(gates.astype(mx.float32))", "mx.softmax(gates.astype(mx.float32), axis=-1)"),
        "router-bf16": ("x @ self.weight.T,", "x.astype(mx.bfloat16) @ self.weight.T.astype(mx.bfloat16),"),
        "routing-weights-in-bf16": (summed, "(y * scores[..., None].astype(mx.bfloat16).astype(y.dtype))"),
        "experts-gate-up-swapped": (activated, "self.activation(x_gate, x_up)"),
        "experts-gelu": (activated, "nn.gelu(x_gate) * x_up"),
        "experts-left-sorted": ("x = x[inv_order]", "pass"),
        "experts-of-another-token": ("[order // M]", "[order % (order.size // M)]"),
        "experts-in-text-order": ("for e in range(self.args.n_routed_experts)",
                                  "for e in sorted(range(self.args.n_routed_experts), key=str)"),
        "shared-expert-missing": (shared, shared.replace("+", "+ 0 *")),
        "shared-expert-scaled": (shared, shared.replace("+", "+ self.gate.routed_scaling_factor *")),
        "mlp-gate-up-swapped": ("swiglu(self.gate_proj(x), self.up_proj(x))", "swiglu(self.up_proj(x), self.gate_proj(x))"),
        "pair-no-norm-mean-scale": ((normed, "if False:"), (scaled, f"{scaled} / (0.6 * top_k)")),
        "pair-experts-stronger-shared-weaker": ((summed, summed.replace("]", "] * 1.1")), (shared, shared.replace("+", "+ 0.9 *"))),
    }


PARTS = (_indexer, _rope, _attention, _block, _moe)
ON_GROUPS = ("router-group-fill-zero", "router-group-by-best", "router-groups-ignored", "router-always-norm", "rms-eps-1e-6")
# of more than index_topk tokens, and few enough for our expanded form: the last two are in no other
LENGTHS = {"indexer-dense-up-to-twice-topk": 32, "latent-in-bf16": 32, "selection-beats-mask": 32}


def _carried(name: str, found: Edits | tuple[str, str]) -> CarriedToStock:
    edits: Edits = found if isinstance(found[0], tuple) else (found,)
    return CarriedToStock(name, edits, GROUPED if name in ON_GROUPS else YARN, LENGTHS.get(name))


IN_STOCK = {name: _carried(name, found) for part in PARTS for name, found in part().items()}
