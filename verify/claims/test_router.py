"""Router and experts on their own, at the published 256 experts and top 8, and in every variant that a config can ask for."""

import copy
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_unflatten

import glm_dsa
from glm_dsa.moe import MixtureOfExperts
from reference import checkpoints, hf
from reference.capture import capture
from reference.equations import Conventions, Equations, routing_weights
from verify.cases import Case
from verify.claims import half
from verify.core import bounds, compare
from verify.core.choices import of_experts, scatter
from verify.engines.definition import to_numpy

CLAIM = "router and experts"
TOKENS = 96

BIG = {"n_routed_experts": 256, "num_experts_per_tok": 8, "hidden_size": 48, "moe_intermediate_size": 16}
VARIANTS: dict[str, dict[str, Any]] = {
    "256 experts, top 8": BIG,
    "not normalized": {**BIG, "norm_topk_prob": False},
    "not scaled": {"routed_scaling_factor": 1.0},
    "top 1": {"num_experts_per_tok": 1},
    "8 groups of 32, 3 win": {**BIG, "n_group": 8, "topk_group": 3},
    "4 groups, 1 wins": {"n_group": 4, "topk_group": 1},
    "2 groups, 1 wins": {"n_group": 2, "topk_group": 1},
    "two shared experts": {"n_shared_experts": 2},
    "7 experts, top 3": {"n_routed_experts": 7, "num_experts_per_tok": 3},
    "every expert": {"num_experts_per_tok": 16},
    "every expert of 2 groups": {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 8},
    "8 groups of 2, 3 win": {"n_group": 8, "topk_group": 3, "num_experts_per_tok": 3},
}
FAINT = -8.0  # router logits around it: scores of 3e-4, beside which the digits of a large bias are coarse


def of_all_magnitudes(random, count):
    return random.choice([-1.0, 1.0], count) * 10 ** random.uniform(-3, 1.48, count)


# (biases of so many experts, around what the router's logits lie). "negative" leaves every biased score negative: a losing
# group filled with 0 instead of -inf would win.
BIASES = {
    "no bias": (lambda random, n: np.zeros(n), 0.0),
    "bias": (lambda random, n: random.normal(0.0, 0.2, n), 0.0),
    "negative": (lambda random, n: random.normal(-1.5, 0.2, n), 0.0),
    "faint scores": (lambda random, n: random.normal(0.0, 2e-4, n), FAINT),
    "biases near 16, faint scores": (lambda random, n: random.normal(16.0, 2e-4, n), FAINT),
    "biases of 8 to 30, faint scores": (lambda random, n: random.uniform(8, 30, n), FAINT),
    "biases of -30 to -8, faint scores": (lambda random, n: random.uniform(-30, -8, n), FAINT),
    "biases of 1e-3 to 30, faint scores": (of_all_magnitudes, FAINT),
}


@pytest.fixture(params=VARIANTS)
def config(request):
    return checkpoints.tiny(
        num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0, **VARIANTS[request.param]
    )


def modules(config, seed, bias="bias"):
    """HF's MoE with trained-like weights, ours with the same, and the weights by checkpoint name. The first of the inputs'
    values is to be 1: the router's logits lie around what BIASES says by its weight."""
    draw, around = BIASES[bias]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = hf.build(config)
        checkpoints.trained_like(model)
    moe, count = model.model.layers[0].mlp, config["n_routed_experts"]
    moe.gate.e_score_correction_bias.copy_(torch.from_numpy(draw(np.random.default_rng(seed), count)))
    moe.gate.weight.data[:, 0] += around
    tensors = {"gate.weight": moe.gate.weight, "gate.e_score_correction_bias": moe.gate.e_score_correction_bias}
    gate_up, inner = moe.experts.gate_up_proj, config["moe_intermediate_size"]
    for e in range(count):
        tensors[f"experts.{e}.gate_proj.weight"] = gate_up[e, :inner]
        tensors[f"experts.{e}.up_proj.weight"] = gate_up[e, inner:]
        tensors[f"experts.{e}.down_proj.weight"] = moe.experts.down_proj[e]
    tensors |= {f"shared_experts.{n}": p for n, p in moe.shared_experts.named_parameters()}
    named = {f"model.layers.0.mlp.{n}": t.detach().numpy() for n, t in tensors.items()}
    args = glm_dsa.ModelArgs.from_dict(config)
    ours = MixtureOfExperts(args)
    converted = glm_dsa.weights.to_modules(args, {n: mx.array(t) for n, t in named.items()})
    ours.update(tree_unflatten([(n.removeprefix("model.layers.0.mlp."), t) for n, t in converted.items()]))
    return model, ours, named


@pytest.mark.parametrize("bias", BIASES)
def test_routing_and_experts(judge, config, bias, request):
    seed = request.config.getoption("--seed")
    model, ours, named = modules(config, seed, bias)
    x = np.random.default_rng(seed).standard_normal((2, TOKENS // 2, config["hidden_size"])).astype(np.float32)
    x[..., 0] = 1
    with capture(model) as seen:
        model.model.layers[0].mlp(torch.from_numpy(x))
    given, args = {"layers.0.mlp.gate.topk": seen["layers.0.mlp.gate.topk"]}, glm_dsa.ModelArgs.from_dict(config)
    equations = Equations(config, lambda n: named[n].astype(np.float64), Conventions(), given)
    equations.experts(0, x.astype(np.float64))
    with glm_dsa.trace.capture(ours, {"gate.topk": mx.array(given["layers.0.mlp.gate.topk"])}) as mine:
        ours(mx.array(x))
    name = f"{request.node.callspec.params['config']}, {bias}"

    def bound(stage):
        ref, truth = seen[f"layers.0.mlp.{stage}"], equations.stages[f"layers.0.mlp.{stage}"]
        return bounds.bound(compare.values(ref, truth).error, ref, config["hidden_size"], stage == "gate.weights")

    logits = seen["layers.0.mlp.gate.logits"]
    judge.values(name, "mlp.gate.logits", to_numpy(mine["gate.logits"]), logits, bound("gate.logits"))
    bias_of = named["model.layers.0.mlp.gate.e_score_correction_bias"]
    decision = of_experts(logits, bias_of, args, bound("gate.logits").absolute(logits))
    topk, experts = given["layers.0.mlp.gate.topk"], config["n_routed_experts"]
    judge.selection(name, "mlp.gate.topk", to_numpy(mine["gate.topk"]), topk, decision)
    judge.values(
        name, "mlp.gate.weights", scatter(to_numpy(mine["gate.weights"]), topk, experts),
        scatter(seen["layers.0.mlp.gate.weights"], topk, experts), bound("gate.weights"),
    )  # fmt: skip
    for stage in ("experts", "shared_experts", "output"):
        judge.values(name, f"mlp.{stage}", to_numpy(mine[stage]), seen[f"layers.0.mlp.{stage}"], bound(stage))


@pytest.mark.any_layout
@pytest.mark.parametrize("dtype", half.DTYPES)
def test_float32_by_design_in_16_bit(case: Case, judge, dtype):
    """A model in 16 bit routes in float32: on the same 16-bit inputs and weights, under biases of which 16 bit keeps little."""
    args, name = case.args, f"{case.name}, {dtype}"
    model = glm_dsa.load(case.folder, half.DTYPES[dtype], **case.spec.overrides)
    layer = next(i for i in range(args.num_hidden_layers) if args.is_sparse(i))
    ours, gate = model.layers[layer].mlp, copy.deepcopy(case.hf.model.layers[layer].mlp.gate)
    stored = gate.e_score_correction_bias.numpy().copy()
    kept = ours.gate.e_score_correction_bias
    judge.holds(name, "mlp.gate.e_score_correction_bias", kept.dtype == mx.float32, f"float32 is kept ({kept.dtype})")
    judge.values(name, "mlp.gate.e_score_correction_bias", to_numpy(kept), stored, 0.0)
    random = np.random.default_rng(case.seed)
    bias = random.normal(16.0, 0.15, args.n_routed_experts).astype(np.float32)
    x, truth_x = half.rounded(random.standard_normal((2, TOKENS // 2, args.hidden_size)), dtype)
    gate.weight.data = torch.from_numpy(to_numpy(ours.gate.weight))
    gate.e_score_correction_bias.copy_(torch.from_numpy(bias))
    ours.gate.e_score_correction_bias = mx.array(bias)

    torch_x = torch.from_numpy(truth_x).to(getattr(torch, dtype))
    ref_logits, ref_weights, topk = (t.detach().numpy().reshape(2, TOKENS // 2, -1) for t in gate(torch_x))
    truth_logits = truth_x @ half.exact(ours.gate.weight).T
    truth_weights = routing_weights(truth_logits, topk, case.config)
    with glm_dsa.trace.capture(ours, {"gate.topk": mx.array(topk)}) as mine:
        ours(x)
        answers = ours.switch_mlp(x, mx.array(topk))

    def bound(ref, truth, routing=False):
        return bounds.bound(compare.values(ref, truth).error, ref, args.hidden_size, routing)

    of_logits = bound(ref_logits, truth_logits)
    judge.values(name, "mlp.gate.logits", to_numpy(mine["gate.logits"]), ref_logits, of_logits)
    decision = of_experts(ref_logits, bias, args, of_logits.absolute(ref_logits))
    judge.selection(name, "mlp.gate.topk", to_numpy(mine["gate.topk"]), topk, decision)
    weights = mine["gate.weights"]
    found, ref, truth = (scatter(w, topk, args.n_routed_experts) for w in (to_numpy(weights), ref_weights, truth_weights))
    judge.values(name, "mlp.gate.weights", found, ref, bound(ref, truth, routing=True))
    terms = half.exact(answers) * half.exact(weights)[..., None]
    slack = bounds.HALF_ULP * args.num_experts_per_tok * np.abs(terms).sum(-2)
    off = half.roundings(mine["experts"], terms.sum(-2), slack, dtype)
    judge.at_most(name, "mlp.experts", off, 1.0, "weighted and summed in float32, rounded once")


def test_scores_that_all_underflow(judge):
    """sigmoid(-200) is 0 in float32: weights are 0 / (0 + 1e-20) = 0, not NaN."""
    config = checkpoints.tiny(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
    model, ours, _ = modules(config, 5)
    x = np.full((1, 4, config["hidden_size"]), 200.0, np.float32)
    weight = np.full((config["n_routed_experts"], config["hidden_size"]), -1 / config["hidden_size"], np.float32)
    model.model.layers[0].mlp.gate.weight.data = torch.from_numpy(weight)
    ours.gate.weight = mx.array(weight)
    with capture(model) as seen, glm_dsa.trace.capture(ours) as mine:
        model.model.layers[0].mlp(torch.from_numpy(x))
        ours(mx.array(x))
    judge.values(
        "underflow", "mlp.gate.weights", to_numpy(mine["gate.weights"]), seen["layers.0.mlp.gate.weights"], 0.0
    )


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_sorting_by_expert_changes_nothing(judge, tokens, monkeypatch):
    """From 64 token-expert pairs on the experts are sorted: one form must equal the other."""
    from glm_dsa import moe

    config = checkpoints.tiny(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
    _, ours, _ = modules(config, 3)
    x = mx.random.normal((1, tokens, config["hidden_size"]), key=mx.random.key(tokens))
    outputs = []
    for threshold in (1, 1 << 30):
        monkeypatch.setattr(moe, "SORT_FROM", threshold)
        outputs.append(to_numpy(ours(x)))
    judge.values(
        f"{tokens} tokens", "mlp.output (sorted)", outputs[0], outputs[1], bounds.bound(0.0, outputs[1], 64)
    )
