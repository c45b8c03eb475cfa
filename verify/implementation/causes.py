"""What a fault looks like: known mistakes are made on purpose, in NumPy, and held against what came.

A cause is named only where making it reproduces the fault, within the bound that the fault broke.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import torch

from glm_dsa import ModelArgs
from reference.equations import Conventions, causal, layer_norm, rms_norm, select

from ..core import bounds, compare, stages
from ..core.choices import Decision, biased_scores, of_keys
from ..core.collector import Fault
from ..core.stages import INDEXER, kind_of
from ..engines.definition import to_numpy
from ..engines.taps import paths_of
from ..engines.third_party import Failed, others_code
from .subject import ModuleReference, Theirs

Array = np.ndarray
OTHER_LAYOUT = {"interleaved": "half-split", "half-split": "interleaved"}
NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "self_attn.q_a_layernorm",
    "self_attn.kv_a_layernorm",
    "self_attn.indexer.k_norm",
    "norm",
)
VARIANCES = (1e-7, 3e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4)  # around every eps that is in use


# -- eps


def eps_faults(theirs: Theirs) -> Iterator[tuple[str, Fault]]:
    """(path, fault) of each norm whose eps is another than HF's, found on rows of small variance: on others it is invisible."""
    modules = paths_of(theirs.model)
    for path in modules:
        if kind_of(path) not in NORMS or (norm := _hf_module(theirs, path)) is None:
            continue
        found = _eps_of(modules[path], norm, path)
        if found is None:
            continue
        due, own, error, bound = found
        what = f"eps {own:.3g} measured, {due:.3g} is the reference's"
        yield path, Fault(theirs.name, path, (what,), error, bound, cause=what)


def _hf_module(theirs: Theirs, path: str) -> Any:
    try:
        return theirs.hf_module(path)
    except StopIteration:
        return None


def _eps_of(module: Any, norm: Any, path: str) -> tuple[float, float, float, float] | None:
    """(HF's eps, theirs, the error, its bound) where the two differ, and by nothing but eps."""
    weight = norm.weight.detach().numpy().astype(np.float64)
    bias = getattr(norm, "bias", None)
    bias = np.zeros_like(weight) if bias is None else bias.detach().numpy().astype(np.float64)
    is_layer_norm = isinstance(norm, torch.nn.LayerNorm)
    due_eps = float(norm.eps if is_layer_norm else norm.variance_epsilon)

    def exact(x: Array, eps: float) -> Array:
        return layer_norm(x, weight, bias, eps) if is_layer_norm else rms_norm(x, weight, eps)

    rows = np.random.default_rng(0).standard_normal((1, len(VARIANCES), weight.size))
    rows -= rows.mean(-1, keepdims=True)
    rows *= np.sqrt(np.array(VARIANCES)[:, None] / (rows**2).mean(-1, keepdims=True))
    rows = rows.astype(np.float32)
    try:
        with others_code():
            answer = module(mx.array(rows))
            ours = to_numpy(answer) if isinstance(answer, mx.array) else None
    except Failed:
        return None
    with torch.no_grad():
        hf = norm(torch.from_numpy(rows)).numpy()
    x = rows.astype(np.float64)
    truth = exact(x, due_eps)
    bound = bounds.bound(compare.values(hf, truth).error, hf, weight.size, norm=weight.size)
    if ours is None or (error := compare.values(ours, hf).error) <= bound.value:
        return None
    # y = w x / sqrt(var + eps) + b, solved for eps where it counts most
    direction = exact(x[:, :1], 0.0) - bias
    shrink = ((ours[:, :1] - bias) * direction).sum() / (direction**2).sum()
    if not 0 < shrink < np.inf:
        return None
    own = float(VARIANCES[0] * (1 / shrink**2 - 1))
    explained = own > 0 and compare.values(ours, exact(x, own)).error <= 4 * bound.value
    return (due_eps, own, error, bound.value) if explained else None


# -- values


def of_values(
    theirs: Theirs, reference: ModuleReference, path: str, ours: Array, bound: bounds.Bound, given: Array | None
) -> str:
    """Of a module whose output differs: HF's own module of that path, on what theirs was given, tells which of the two it is."""
    module = _hf_module(theirs, path)
    if module is None or given is None or any(True for _ in module.children()) or given.ndim != 3:
        return ""
    try:
        with torch.no_grad():
            answer = module(torch.from_numpy(given)).numpy()
    except (RuntimeError, TypeError, IndexError):
        return ""
    if answer.shape == ours.shape and compare.values(ours, answer).error <= bound.value:
        return "the module is right, what it is given is not"
    ratio = float((ours * answer).sum() / (answer**2).sum()) if answer.shape == ours.shape else 0.0
    if ratio and abs(ratio - 1) > bound.value and compare.values(ours, ratio * answer).error <= 2 * bound.value:
        return f"{ratio:.5g} times what was expected"
    return ""


def of_heads(theirs: Theirs, reference: ModuleReference, stage: str, ours: Array, bound: bounds.Bound) -> str:
    """Of attention, between its projections: the rotary layout, the selection, the softmax scale."""
    case, layer = reference.case, stages.layer_of(stage)
    assert layer is not None
    wrong: dict[str, Any] = {}
    other = OTHER_LAYOUT[case.conventions.main_rope]
    wrong[f"as under main RoPE {other}"] = _layer(reference, layer, replace(case.conventions, main_rope=other))[stage]
    if reference.reference.is_sparse:
        wrong["every key is attended to, not the selected ones"] = _layer(reference, layer, dense=True)[stage]
    for what, seen in wrong.items():
        if compare.values(ours, seen).error <= 2 * bound.value:
            return what
    own = case.equations()._softmax_scale()
    for what, scale in _scales(case.args).items():
        if not np.isclose(scale, own, rtol=1e-6):
            seen = _layer(reference, layer, scale=scale)[stage]
            if compare.values(ours, seen).error <= 2 * bound.value:
                return f"as with softmax scale {what}"
    if not case.args.runs_indexer(layer) and f"layers.{layer}.{INDEXER}" in paths_of(theirs.model):
        return "a shared layer has an indexer of its own; expected the selection of the full layer below"
    return ""


def _scales(args: ModelArgs) -> dict[str, float]:
    return {
        "1 / sqrt(qk_head_dim), without YaRN's mscale": args.qk_head_dim**-0.5,
        "1 / sqrt(qk_nope_head_dim)": args.qk_nope_head_dim**-0.5,
        "1 / sqrt(v_head_dim)": args.v_head_dim**-0.5,
        "1": 1.0,
    }


def _layer(
    reference: ModuleReference,
    layer: int,
    conventions: Conventions | None = None,
    dense: bool = False,
    scale: float | None = None,
) -> dict[str, Array]:
    """The equations' stages of a layer on HF's input, under HF's choices or all keys, with a mistake made on purpose."""
    inner, case = reference.reference, reference.case
    given = dict(inner.given)
    shape = inner.tokens.shape
    handed = inner.hf.get(f"layers.{layer - 1}.self_attn.selection")
    if dense:
        every = np.broadcast_to(np.arange(shape[1]), (*shape, shape[1]))
        handed, given[f"layers.{layer}.self_attn.indexer.topk"] = every, every
    equations = case.equations(given)
    if conventions is not None:
        equations.conventions = conventions
    if scale is not None:
        equations._softmax_scale = lambda: scale  # type: ignore[method-assign]
    positions = np.broadcast_to(np.arange(shape[1]), shape)
    equations.layer(layer, inner.layer_input(layer).astype(np.float64), positions, causal(shape, None), handed)
    return equations.stages


# -- choices


def of_selection(reference: ModuleReference, path: str, ours: Array | None, decision: Decision) -> str:
    """Of an indexer: the other rotary layout, a missing ReLU, a missing causal mask."""
    layer, topk = stages.layer_of(path), reference.case.args.index_topk
    if ours is None or layer is None:
        return "every key is selected" if ours is None else ""
    own = _layer(reference, layer)
    q, k, w = (own[f"{path}.{part}"] for part in ("q", "k", "weights"))
    allowed = np.isfinite(own[f"{path}.scores"])
    products = np.einsum("bshd,btd->bsht", q, k, optimize=True) / np.sqrt(q.shape[-1])
    other = OTHER_LAYOUT[reference.case.conventions.indexer_rope]
    turned = _layer(reference, layer, replace(reference.case.conventions, indexer_rope=other))
    wrong = {f"under {other} RoPE": turned[f"{path}.scores"]}
    wrong["without the ReLU"] = np.where(allowed, np.einsum("bsh,bsht->bst", w, products, optimize=True), -np.inf)
    for what, scores in wrong.items():
        if not of_keys(scores, topk, decision.noise).difference(ours, select(scores, topk)).faults:
            return f"as {what}"
    return ""


def of_routing(reference: ModuleReference, path: str, ours: Array, logits: Array, decision: Decision) -> str:
    """Of a router: the correction bias left out, groups left out, or losing groups filled with 0."""
    args, k = reference.case.args, reference.case.args.num_experts_per_tok
    bias = reference.case.weights(f"model.{path}.e_score_correction_bias")
    unbiased = replace(decision, scores=biased_scores(logits, np.zeros_like(bias)))
    wrong = {"without e_score_correction_bias": unbiased}
    if args.n_group > 1:
        free = replace(decision, groups=1, top_groups=1)
        wrong["without groups"] = free
        filled = np.where(np.isfinite(decision.allowed), decision.allowed, 0.0)
        wrong["with 0 for the experts of losing groups, which beats a negative score (expected -inf)"] = replace(
            free, scores=filled
        )
    for what, other in wrong.items():
        if not other.difference(ours, select(other.allowed, k)).faults:
            return f"as {what}"
    return ""


def of_routing_weights(ours: Array, due: Array, bound: bounds.Bound) -> str:
    """One factor on all weights."""
    ratio = float((ours * due).sum() / (due**2).sum())
    return f"{ratio:.5g} times what was expected" if compare.values(ours, ratio * due).error <= 2 * bound.value else ""
