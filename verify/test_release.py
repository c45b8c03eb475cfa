"""A release on trial, layer by layer in bounded memory: `pytest verify/ --checkpoint DIR`."""

import numpy as np
import pytest

from verify import audit
from verify.on_trial import Trial
from verify.report import MEASURED, Comparison

CLAIM = "the release, layer by layer"


@pytest.fixture(scope="module")
def trial(request) -> Trial:
    return Trial(request.config.glm_release, request.config.getoption("--seed"))


def test_headers(judge, gate, request):
    """What the headers tell: tensors, shapes, formats, policy."""
    release = request.config.glm_release
    found = audit.audit(release.headers)
    for finding in found.findings:
        if finding.severity != audit.FAULT:
            gate.add(Comparison(CLAIM, release.name, "headers", MEASURED, note=f"{finding.severity}: {finding.what}"))
    faults = [f.what for f in found.findings if f.severity == audit.FAULT]
    judge.holds(release.name, "headers", not faults, "; ".join(faults) or "config.json and tensors belong together")


def test_layer(trial: Trial, judge, gate, layer):
    """On HF's input each stage agrees; and what has come of the layers before is followed."""
    reference, ours, drift = trial.layer(layer)
    judge.stages(ours, reference, local=True, replaced=reference.injections)
    gate.add(Comparison(CLAIM, trial.name, f"layers.{layer} drift", MEASURED, drift.error, note=str(drift)))


def test_logits(trial: Trial, judge, gate):
    """The head, on HF's last hidden; and the distributions that the release, run on its own, ends with."""
    reference, ours, free = trial.logits()
    judge.stages(ours, reference, local=True)
    kl = f"mean {free.kl_mean:.1e}, p95 {free.kl_p95:.1e}, max {free.kl_max:.1e}"
    note = f"KL(ref || ours) in nats: {kl}; top-1 {free.top1:.1%}"
    gate.add(Comparison(CLAIM, trial.name, "distributions, free", MEASURED, note=note))
    judge.holds(trial.name, "distributions, free", bool(np.isfinite(free.kl_max)), "finite logits")
