"""One layer at GLM-5.2's true widths, and the router at its 256 experts: `pytest verify/ --real-shape`."""

import gc
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import torch

import glm_dsa
from glm_dsa.moe import Router
from reference.equations import routing_weights
from reference.stored import read_tensors
from verify.cases import Case, Reference, Spec
from verify.claims.test_config import CONFIGS, read_json
from verify.core import bounds, compare
from verify.core.choices import of_experts, scatter
from verify.core.progress import peak_memory
from verify.engines.definition import to_numpy

CLAIM = "one layer at GLM-5.2's true widths"
TOKENS, TOPK, EXPERTS = 80, 16, 32


@pytest.fixture(autouse=True)
def asked_for(request):
    if not request.config.getoption("--real-shape"):
        pytest.skip("takes minutes and 9 GiB: add --real-shape")


class OneLayer(Case):
    """Weights are read anew each time they are asked for: float64 copies of a whole layer would not fit."""

    weights = property(lambda self: read_tensors(self.folder))


def true_widths(**changes) -> dict:
    """zai-org's config with one MoE layer, a small vocabulary, fewer experts (each of full width), a lower index_topk."""
    raw = {**read_json(CONFIGS / "glm-5.2.json"), "num_hidden_layers": 1, "first_k_dense_replace": 0, "vocab_size": 256,
           "num_nextn_predict_layers": 0, "n_routed_experts": EXPERTS, "index_topk": TOPK, "pad_token_id": 0, "eos_token_id": [1],
           "indexer_types": ["full"], "mlp_layer_types": ["sparse"], **changes}  # fmt: skip
    raw.pop("index_topk_pattern")
    return raw


def test_layer(judge, request, tmp_path):
    """hidden 6144, 64 heads, latent 512, indexer 32 x 128; HF first, then ours, so that only one of them is in memory."""
    references: list[Reference] = []
    seed = request.config.getoption("--seed")
    for layout in ("interleaved", "half-split"):
        spec = Spec(f"glm-5.2 widths, {layout}", true_widths(), {"indexer_rope": layout})
        case = OneLayer(replace(spec, folder=references[0].case.folder) if references else spec, tmp_path, seed, "1GB")
        references.append(Reference(case, case.tokens(TOKENS)))
        _ = references[-1].accumulated  # the equations read the checkpoint tensor by tensor
        del case.hf
        gc.collect()
    ours = references[0].case.ours
    for reference in references:
        ours.model.layers[0].self_attn.indexer.layout = reference.case.args.indexer_rope
        seen = ours.forward(reference.tokens, replace=reference.injections)
        judge.missing(seen, reference)
        judge.stages(seen, reference, local=False, replaced=reference.injections)
    held = f"the process peaked at {peak_memory():.1f} GiB of the 9 allowed"
    judge.holds("glm-5.2 widths", "memory", peak_memory() <= 9, held)


def test_router(judge, request):
    """256 experts of hidden 6144, top 8, with a correction bias."""
    config = true_widths(n_routed_experts=256)
    random = np.random.default_rng(request.config.getoption("--seed"))
    hidden, experts = config["hidden_size"], config["n_routed_experts"]
    x = random.standard_normal((1, TOKENS, hidden)).astype(np.float32)
    weight = (random.standard_normal((experts, hidden)) * hidden**-0.5).astype(np.float32)
    bias = (random.standard_normal(experts) * 0.15).astype(np.float32)

    from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import GlmMoeDsaTopkRouter

    from reference import hf

    theirs = GlmMoeDsaTopkRouter(hf.config_for(config))
    theirs.weight.data, theirs.e_score_correction_bias.data = torch.from_numpy(weight), torch.from_numpy(bias)
    with torch.no_grad():
        logits, weights, topk = (v.numpy().reshape(1, TOKENS, -1) for v in theirs(torch.from_numpy(x)))
    args = glm_dsa.ModelArgs.from_dict(config)
    ours = Router(args)
    ours.weight, ours.e_score_correction_bias = mx.array(weight), mx.array(bias)
    with glm_dsa.trace.capture(ours, {"topk": mx.array(topk)}) as mine:
        ours(mx.array(x))

    truth = x.astype(np.float64) @ weight.astype(np.float64).T
    bound = bounds.bound(compare.values(logits, truth).error, logits, hidden)
    judge.values("router of 256", "mlp.gate.logits", to_numpy(mine["logits"]), logits, bound)
    decision = of_experts(logits, bias, args, bound.absolute(logits))
    judge.selection("router of 256", "mlp.gate.topk", to_numpy(mine["topk"]), topk, decision)
    true_weights = routing_weights(truth, topk, config)
    judge.values(
        "router of 256", "mlp.gate.weights", scatter(to_numpy(mine["weights"]), topk, experts), scatter(weights, topk, experts),
        bounds.bound(compare.values(weights, true_weights).error, weights, hidden, routing=True),
    )  # fmt: skip
