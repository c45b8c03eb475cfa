"""Router and experts on their own, at the published 256 experts and top 8, and in every variant that a config can ask for."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_unflatten

import glm_dsa
from glm_dsa.moe import MixtureOfExperts
from reference import checkpoints, hf
from reference.capture import capture
from reference.equations import Conventions, Equations
from verify import compare, tolerances
from verify.candidate import to_numpy
from verify.choices import of_experts, scatter

CLAIM = "router and experts"
TOKENS = 96

BIG = {"n_routed_experts": 256, "num_experts_per_tok": 8, "hidden_size": 48, "moe_intermediate_size": 16}
VARIANTS = {
    "256 experts, top 8": BIG,
    "not normalized": {**BIG, "norm_topk_prob": False},
    "not scaled": {"routed_scaling_factor": 1.0},
    "top 1": {"num_experts_per_tok": 1},
    "8 groups of 32, 3 win": {**BIG, "n_group": 8, "topk_group": 3},
    "4 groups, 1 wins": {"n_group": 4, "topk_group": 1},
    "2 groups, 1 wins": {"n_group": 2, "topk_group": 1},
    "two shared experts": {"n_shared_experts": 2},
}
# Biases that leave every biased score negative: a losing group filled with 0 instead of -inf would win.
BIASES = {"no bias": (0.0, 0.0), "bias": (0.0, 0.2), "negative": (-1.5, 0.2)}


@pytest.fixture(params=VARIANTS)
def config(request):
    return checkpoints.tiny(
        num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0, **VARIANTS[request.param]
    )


def modules(config, seed, bias):
    """HF's MoE with trained-like weights, ours with the same, and the weights by checkpoint name."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = hf.build(config)
        checkpoints.trained_like(model)
        model.model.layers[0].mlp.gate.e_score_correction_bias.normal_(*bias)
    moe = model.model.layers[0].mlp
    tensors = {"gate.weight": moe.gate.weight, "gate.e_score_correction_bias": moe.gate.e_score_correction_bias}
    gate_up, inner = moe.experts.gate_up_proj, config["moe_intermediate_size"]
    for e in range(config["n_routed_experts"]):
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
    model, ours, named = modules(config, seed, BIASES[bias])
    x = np.random.default_rng(seed).standard_normal((2, TOKENS // 2, config["hidden_size"])).astype(np.float32)
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
        return tolerances.bound(compare.values(ref, truth).error, ref, config["hidden_size"], stage == "gate.weights")

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


def test_scores_that_all_underflow(judge):
    """sigmoid(-200) is 0 in float32: weights are 0 / (0 + 1e-20) = 0, not NaN."""
    config = checkpoints.tiny(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
    model, ours, _ = modules(config, 5, (0.0, 0.2))
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
    _, ours, _ = modules(config, 3, (0.0, 0.2))
    x = mx.random.normal((1, tokens, config["hidden_size"]), key=mx.random.key(tokens))
    outputs = []
    for threshold in (1, 1 << 30):
        monkeypatch.setattr(moe, "SORT_FROM", threshold)
        outputs.append(to_numpy(ours(x)))
    judge.values(
        f"{tokens} tokens", "mlp.output (sorted)", outputs[0], outputs[1], tolerances.bound(0.0, outputs[1], 64)
    )
