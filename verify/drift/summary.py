"""What a comparison found, in words: findings, top ones first, and the summary for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from glm_dsa.errors import printable

from ..core import stages
from .stagewise import LOCAL, Compared

if TYPE_CHECKING:
    from .result import Drift

PARTS = {"mass": "which layout the weights tell of", "tokens": "KL along the prompt"}
Finding = tuple[str, str, list[str]]  # kind, title, lines


def findings_of(found: Drift) -> list[dict[str, Any]]:
    """{kind, title, lines} of each, without signs that a terminal would obey."""
    return [
        {"kind": kind, "title": printable(title), "lines": [printable(line) for line in lines if line]}
        for kind, title, lines in _findings(found)
    ]


def _findings(found: Drift) -> Iterator[Finding]:
    if found.same_weights:
        yield from _of_same_weights(found)
    else:
        yield from _of_other_weights(found)
    if found.experts:
        yield "note", "Experts matched by their routers' rows", found.experts
    if found.unseen:
        more = f" and {len(found.unseen) - 3} more" if len(found.unseen) > 3 else ""
        yield "note", f"Not compared: the candidate does not show {', '.join(found.unseen[:3])}{more}", []
    if found.config:
        yield "cause" if not found.agrees else "note", "The configs differ", found.config
    if found.cached is not None:
        title = "In several calls, with a cache, the candidate says something else"
        yield "divergence", title, found.cached.lines()
    yield from _causes(found)
    yield from _layout(found)
    if found.growth:
        yield _growth(found)
    if found.repair is not None and found.repair.best is not None:
        yield "cost", found.repair.title(), found.repair.lines()
    yield from (("note", note, []) for note in found.notes)


def _of_same_weights(found: Drift) -> Iterator[Finding]:
    told = _distance(found)
    if found.divergence is not None:
        yield "divergence", f"First divergence: {found.divergence.stage}", [_error(found.divergence), told]
        return
    if found.elsewhere is not None:
        title = f"No divergence in what is reported; the first one is at {found.elsewhere.stage}"
        yield "divergence", title, [_error(found.elsewhere), told]
        return
    worst = max((c for c in found.comparisons if c.bound and c.run == LOCAL), key=lambda c: c.share, default=None)
    least = f"worst: {worst.stage}, {worst.share:.2g} of its bound" if worst else ""
    title = "No divergence: every stage agrees within its bound"
    yield "note", title if not found.unseen else "No divergence where something could be compared", [least, told]
    if found.strays:
        yield (
            "divergence",
            "On its own it says something else, though each layer agrees on the reference's input",
            [told],
        )


def _of_other_weights(found: Drift) -> Iterator[Finding]:
    if found.sensitivity is not None:
        yield "cost", found.sensitivity.title(), [_distance(found), _most(found), *found.sensitivity.lines()]
    else:
        yield "note", "The weights differ", [_distance(found), _most(found)]
    own = found.own_weights
    if own is None:
        return
    if own.divergence is None:
        where = "at every stage" if not own.unseen else "where it shows what it computes"
        yield "note", f"The code is not to blame: on its own weights the candidate agrees with HF {where}", []
        return
    title = f"On its own weights the candidate differs from HF: {own.divergence.stage}"
    yield "divergence", title, [_error(own.divergence)]
    yield from _causes(own)


def _causes(found: Drift) -> Iterator[Finding]:
    for cause in found.causes:
        where = f" in layers {stages.compact(cause.layers)}" if cause.layers else ""
        exact = "to the bit" if cause.exact == 0 else f"to {cause.exact:.2g} of the bound"
        known = f"{cause.suspect.known_as}, " if cause.suspect.known_as else ""
        lines = [cause.suspect.text, f"making it here reproduces {', '.join(cause.stages)}{where}, {exact}"]
        alike = [name for name in cause.alike if name != cause.suspect.known_as]
        lines += [f"the same on this prompt: {', '.join(alike)}"] if alike else []
        yield "cause", f"Cause: {known}{cause.suspect.name}", lines
    if found.diagnosis is None or not found.diagnosis.unknown:
        return
    left = found.diagnosis.unknown
    also = " besides" if found.causes else ""
    kinds = ", ".join(dict.fromkeys(c.kind for c in left))
    yield (
        "cause",
        f"Cause{also} unknown; component: {found.diagnosis.component}",
        [
            f"wrong by themselves: {kinds} ({stages.layers_of(c.stage for c in left) or 'outside of the layers'})",
            f"none of {found.diagnosis.tried} conventions and catalogued mistakes reproduces it",
        ],
    )


def _layout(found: Drift) -> Iterator[Finding]:
    """What the weights tell of the indexer's RoPE layout, where that matters."""
    evidence, runs = found.mass, found.labels.get("layout")
    if evidence is None:
        return
    told = [f"{name} catches {mass} of the attention" for name, mass in evidence.mass.items()]
    lines = ["; ".join([*told, f"chance {evidence.chance:.3f}"])]
    if evidence.has_learned and evidence.layout not in (None, runs):
        yield "cause", f"The weights tell of {evidence.layout} indexer RoPE, where the candidate runs {runs}", lines
    elif any("indexer_rope" in c.suspect.name for c in found.causes):
        yield "note", "What indexers of either layout would catch", lines


def _growth(found: Drift) -> Finding:
    enters = max(found.growth, key=lambda g: g.local)
    gains = [g for g in found.growth if g.gain is not None]
    amplified = max(gains, key=lambda g: g.gain or 0.0, default=None)
    lines = [f"most enters in layer {enters.layer}: {enters.local:.2g} of its output, on the reference's input"]
    if amplified is not None:
        lines.append(f"strongest gain: layer {amplified.layer}, {amplified.gain:.2f} times what came in")
    return "growth", f"Error at the end: {found.growth[-1].own:.2g} of the hidden state", lines


def _distance(found: Drift) -> str:
    kl = found.distributions
    return f"KL mean {kl['kl_mean']:.3g}, max {kl['kl_max']:.3g} nats; top-1 {kl['top1']:.1%} the same" if kl else ""


def _most(found: Drift) -> str:
    """Of other weights no stage is at fault; where they cost most by themselves."""
    local = [c for c in found.comparisons if c.run == LOCAL and c.bound]
    most = max(local, key=lambda c: c.error, default=None)
    return f"largest relative error on the reference's input: {most.stage}, {most.error:.2g}" if most else ""


def _error(c: Compared) -> str:
    if not c.bound:
        return f"{c.error:.1%} of the queries choose otherwise; first: {c.where}"
    return f"error {c.error:.3g}, {c.share:.3g} times its bound of {c.bound:.2g}; worst {c.where}"


def summary_of(found: Drift) -> str:
    lines = [f"candidate  {found.candidate.runs}", f"reference  {found.reference.runs}",
             f"prompt     {found.prompt}, {found.length} tokens", ""]  # fmt: skip
    for finding in findings_of(found):
        lines += [finding["title"], *(f"  {line}" for line in finding["lines"])]
    if found.divergence is not None and found.same_weights:
        lines += ["", "stages around it (local)"]
        lines += [f"  {c.stage:<40} {c.error:>9.2e}  {_bound(c):<15}  {c.verdict}" for c in found.around()]
    if found.sensitivity is not None:
        lines += ["", *found.sensitivity.table()]
    lines += [f"not looked at: {PARTS.get(what, what)}: {why}" for what, why in found.reasons.items()]
    return "\n".join(printable(line) for line in lines)


def _bound(c: Compared) -> str:
    return f"bound {c.bound:.2e}" if c.bound else "of the queries"
