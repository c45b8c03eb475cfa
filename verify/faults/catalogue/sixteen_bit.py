"""Casts removed: what is float32 by design is the model's dtype, which in a float32 model is no mistake."""

from __future__ import annotations

from collections.abc import Iterator

from ..edits import Edit
from ..fault import INDEXER, ROPE, ROUTER, Fault

# fmt: off


def faults() -> Iterator[Fault]:
    route, score, shows = "moe.Router.__call__", "indexer.Indexer.score", "models in 16 bit"

    def fault(name: str, component: str, what: str, *edits: Edit, claim: str, stage: str) -> Fault:
        return Fault(name, component, what, edits, claim, stage, shows)

    yield fault("router-logits-in-the-models-dtype", "router", "logits in 16 bit",
                Edit(route, "x.astype(mx.float32) @ self.weight.astype(mx.float32).T", "x @ self.weight.T"), claim=ROUTER,
                stage="mlp.gate.logits")
    yield fault("correction-bias-in-the-models-dtype", "router", "the correction bias is cast with the weights",
                Edit("checkpoint._cast", ' or name.endswith("e_score_correction_bias")', ""), claim=ROUTER,
                stage="mlp.gate.e_score_correction_bias")
    yield fault("router-chooses-in-the-models-dtype", "router", "experts are chosen by score + bias in 16 bit",
                Edit("moe.Router.choose", "scores + self.e_score_correction_bias.astype(mx.float32)",
                     "(scores + self.e_score_correction_bias).astype(self.weight.dtype)"), claim=ROUTER, stage="mlp.gate.topk")
    yield fault("routing-weights-in-the-models-dtype", "router", "weights in 16 bit",
                Edit(route, 'tap(self, "weights", weights * self.scale)',
                     'tap(self, "weights", (weights * self.scale).astype(x.dtype))'), claim=ROUTER, stage="mlp.gate.weights")
    yield fault("experts-summed-in-the-models-dtype", "MoE", "experts are weighted and summed in 16 bit",
                Edit("moe.MixtureOfExperts.__call__", "weights[..., None]", "weights[..., None].astype(x.dtype)"), claim=ROUTER,
                stage="mlp.experts")
    yield fault("head-weights-in-the-models-dtype", "indexer", "head weights in 16 bit",
                Edit("indexer.Indexer.head_weights", "x.astype(mx.float32)", "x"), claim=INDEXER, stage="self_attn.indexer.weights")
    yield fault("indexer-scores-in-the-models-dtype", "indexer", "products of queries and keys in 16 bit",
                Edit(score, "q = q.astype(mx.float32).reshape", "q = q.reshape"),
                Edit(score, "k.astype(mx.float32)", "k"), claim=INDEXER, stage="self_attn.indexer.scores")
    yield fault("rope-angles-in-the-models-dtype", "rope", "cos and sin in 16 bit",
                Edit("rope.rotate", "rotation.cos[..., None, :], rotation.sin[..., None, :]",
                     "rotation.cos[..., None, :].astype(x.dtype), rotation.sin[..., None, :].astype(x.dtype)"), claim=ROPE,
                stage="position")
