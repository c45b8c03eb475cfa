"""The whole model from tokens to logits, free-running and under the reference's selections and routing."""

import mlx.core as mx
import pytest

from verify.cases import Case
from verify.core import compare
from verify.core.report import MEASURED, Comparison
from verify.engines.definition import to_numpy

CLAIM = "final logits"


@pytest.mark.parametrize("regime", ["short", "long"])
@pytest.mark.parametrize("run", ["injected", "free"])
def test_logits(case: Case, judge, gate, regime, run):
    reference = case.reference(case.lengths[0 if regime == "short" else -1])
    replace = reference.injections if run == "injected" else None
    seen = case.ours.forward(reference.tokens, replace=replace)
    judge.missing(seen, reference)
    ties = judge.stages(seen, reference, local=False, replaced=replace)
    if ties and run == "free":
        gate.not_verified[f"free-running stages after a tie, {case.name}"] = (
            f"{ties} ties; the injected run covers them"
        )
        return
    found = compare.distributions(seen["logits"], reference.hf["logits"])
    kl = f"mean {found.kl_mean:.1e}, p95 {found.kl_p95:.1e}, max {found.kl_max:.1e}"
    note = f"KL(ref || ours) in nats: {kl}; top-1 {found.top1:.1%}"
    gate.add(Comparison(CLAIM, case.name, f"distributions, {regime}, {run}", MEASURED, note=note))


@pytest.mark.any_layout
def test_embeddings_in_the_place_of_tokens(case: Case, judge):
    """`input_embeddings`: the tokens are not looked up."""
    tokens, model = mx.array(case.tokens(case.long)), case.ours.model
    handed = model(mx.zeros_like(tokens), input_embeddings=model.model.embed_tokens(tokens))
    judge.values(case.name, "logits (embeddings handed in)", to_numpy(handed), to_numpy(model(tokens)), 0.0)
