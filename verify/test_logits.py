"""The whole model from tokens to logits, free-running and under the reference's selections and routing."""

import pytest

from verify import compare
from verify.cases import Case

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
    bound = reference.bound("logits", local=False)
    ref = reference.hf["logits"]
    worst = bound.absolute(ref)
    kl = compare.distributions(seen["logits"], ref)
    # Hoeffding: logits that are off by at most d give KL <= d^2 / 2
    judge.holds(case.name, "logits", kl.kl_max <= worst**2 / 2, f"KL max {kl.kl_max:.2g} <= {worst**2 / 2:.2g} nats")
