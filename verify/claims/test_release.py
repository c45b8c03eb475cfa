"""A release on trial, layer by layer in bounded memory: `pytest verify/ --checkpoint DIR`."""

import numpy as np

from verify.audit import audit
from verify.core.report import MEASURED, Comparison
from verify.gate.options import ASKED
from verify.release.run import Trial

CLAIM = "the release, layer by layer"


def test_headers(judge, gate, request):
    """What the headers tell: tensors, shapes, formats, policy; and whether the release loads."""
    release = request.config.stash[ASKED].release
    found = audit.audit(release.headers, strict=request.config.getoption("--policy") == "strict")
    tell(gate, release.name, "headers", found.findings)
    for line in release.pruned():
        gate.add(Comparison(CLAIM, release.name, "experts", MEASURED, note=line))
    faults = [f.what for f in found.findings if f.severity == audit.FAULT]
    if release.refused and not faults:
        faults = [release.refused]
    differences, not_compared = release.differences()
    tell(gate, release.name, "files", differences)
    gate.not_verified |= not_compared
    faults += [f.what for f in differences if f.severity == audit.FAULT]
    judge.holds(release.name, "headers", not faults, "; ".join(faults) or "config.json and tensors belong together")


def test_layer(trial: Trial, judge, gate, layer):
    """On HF's input each stage agrees; and what has come of the layers before is followed."""

    def check() -> None:
        reference, ours, drift = trial.layer(layer)
        gate.add(Comparison(CLAIM, trial.name, f"layers.{layer} drift", MEASURED, drift.error, note=str(drift)))
        if layer in trial.times:
            gate.add(Comparison(CLAIM, trial.name, f"layers.{layer} time", MEASURED, note=trial.time_of([layer])))
        if layer in trial.costs:
            note = str(trial.costs[layer])
            gate.add(Comparison(CLAIM, trial.name, f"layers.{layer} cost", MEASURED, note=note))
        judge.stages(ours, reference, local=True, replaced=reference.injections)

    trial.once(judge, f"layers.{layer}", check)


def test_weights(trial: Trial, judge, gate, layer):
    """The weights are the original's but for rounding; without an original, they are what siblings lead to expect."""
    trial.upto(layer)
    judge_weights(judge, gate, trial, f"layers.{layer} weights", trial.findings[layer])


def test_logits(trial: Trial, judge, gate):
    """The head, on HF's last hidden; and the distributions that the release, run on its own, ends with."""

    def check() -> None:
        reference, ours, free, paid = trial.logits()
        if trial.times:
            gate.add(Comparison(CLAIM, trial.name, "time of all layers", MEASURED, note=trial.time_of(trial.times)))
        judge.stages(ours, reference, local=True)
        kl = f"mean {free.kl_mean:.1e}, p95 {free.kl_p95:.1e}, max {free.kl_max:.1e}"
        note = f"KL(ref || ours) in nats: {kl}; top-1 {free.top1:.1%}"
        gate.add(Comparison(CLAIM, trial.name, "distributions, free", MEASURED, note=note))
        judge.holds(trial.name, "distributions, free", bool(np.isfinite(free.kl_max)), "finite logits")
        if trial.perplexity is not None:
            gate.add(Comparison(CLAIM, trial.name, "perplexity of the text", MEASURED, note=str(trial.perplexity)))
        if paid is not None:
            gate.add(Comparison(CLAIM, trial.name, "cost", MEASURED, note=f"{paid}, {trial.release.run_on}"))
            if dropped := trial.dropped():
                gate.add(Comparison(CLAIM, trial.name, "experts", MEASURED, note=dropped))
            limits = trial.release.limits
            over = paid.over(limits)
            kept = ", ".join(f"{name} {limit:g}" for name, limit in limits.items())
            if limits:
                judge.holds(trial.name, "cost", not over, "; ".join(over) or f"within its limits: {kept}")

    trial.once(judge, "logits", check)


def test_top_weights(trial: Trial, judge, gate):
    """Embedding, last norm, head: as `test_weights`."""

    def check() -> None:
        judge_weights(judge, gate, trial, "embedding, norm, head", trial.weighing.top())

    trial.once(judge, "top", check)


def judge_weights(judge, gate, trial: Trial, stage: str, findings: list[audit.Finding]) -> None:
    tell(gate, trial.name, stage, findings)
    faults = [f.what for f in findings if f.severity == audit.FAULT]
    compared = "the original's, but for rounding" if trial.weighing.theirs else "finite; no two experts the same"
    judge.holds(trial.name, stage, not faults, "\n  ".join(faults) or compared)


def tell(gate, name: str, stage: str, findings: list[audit.Finding]) -> None:
    for finding in findings:
        if finding.severity != audit.FAULT:
            gate.add(Comparison(CLAIM, name, stage, MEASURED, note=f"{finding.severity}: {finding.what}"))
