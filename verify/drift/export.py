"""report.json, report.jsonl and report.html of a comparison."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import report, stages
from ..core.files import whole
from ..core.plain import plain
from ..core.report import FAULT
from .html import render
from .stagewise import Compared

if TYPE_CHECKING:
    from .result import Drift

HOW = {
    "divergence": "Each layer of the candidate was given the reference's input, and went on under the reference's selections "
    "and experts, so that each error is the layer's own. Errors are the largest difference over the rms of the reference's "
    "values. A bound is 4 times what HF errs against the float64 equations on the same inputs, times how much less exact the "
    "bare MLX primitives are than torch's. Choices are compared as sets; keys within the score noise of the boundary are ties.",
    "causes": "Conventions were switched, and the catalogued mistakes made, in this project's own definition, on the reference's "
    "weights and inputs, until it gave what the candidate gives. A cause is named only where it reproduces the stages that "
    "differ, in every layer, and breaks nothing that is sound. Exact: the worst remaining difference, in bounds.",
    "heat map": "Error over bound, as its decimal logarithm: above 0 is beyond the bound. Local: each layer on the reference's "
    "input. Own: the candidate from the tokens on, held against the same bounds.",
    "growth": "The relative error (2-norm) of each layer's output: local on the reference's input, under choices of its own; own "
    "from the tokens on. Gain: "
    "own error behind a layer over own error before it.",
    "choices": "The share of the reference's selected keys, and of its experts, that the candidate chooses too; masked keys are "
    "left out.",
    "tokens": "KL(reference || candidate) of the next token's distribution at each position, in nats, over the full vocabulary.",
    "sensitivity": "Each component, and each group of layers, was given the reference's unpacked weights, all else as packed; "
    "recovered is the share of the mean KL that went away. Alone: the KL where nothing else is packed; the ranking is by that. "
    "Bytes are those stored, scales and biases included.",
    "mass": "The share of dense attention that the indexer's selection catches under each RoPE layout, by the equations. The "
    "layout of the training catches clearly more.",
}
RELATIVE = (
    "The weights differ, and nothing is judged. Cells are shaded by relative error: the largest difference over the rms of the "
    "reference's values; of choices, the share of queries that choose otherwise. Local: each layer on the reference's input. "
    "Own: the candidate from the tokens on."
)


def report_of(found: Drift) -> dict[str, Any]:
    """All of it, as JSON can hold it."""
    kinds = {c.kind for c in found.comparisons}
    order = ["embed", *(k for k in stages.IN_LAYER), "norm", "logits"]
    divergence = None
    if found.divergence is not None:
        around = [{**_row(c), "note": c.where} for c in found.around()]
        divergence = {**_row(found.divergence), "where": found.divergence.where, "around": around}
    return plain({
        "format": 1, "command": found.command, "seconds": round(found.seconds, 1), "date": found.date,
        "versions": report.versions(),
        "candidate": _side(found.candidate), "reference": _side(found.reference),
        "prompt": {"source": found.prompt, "length": found.length, "index_topk": found.candidate.args.index_topk},
        "agrees": found.agrees, "unseen": found.unseen, "config": found.config,
        "elsewhere": found.elsewhere.stage if found.elsewhere else None, "same_weights": found.same_weights,
        "layers": found.labels.get("layers", []), "stages": [k for k in order if k in kinds],
        "findings": found.findings(), "divergence": divergence, "causes": _causes(found),
        "unknown": [_row(c) for c in (found.diagnosis.unknown if found.diagnosis else [])],
        "component": found.diagnosis.component if found.diagnosis else "",
        "comparisons": [{**_row(c), "note": c.where if c.verdict == FAULT else ""} for c in found.comparisons],
        "growth": [asdict(g) for g in found.growth], "choices": [asdict(c) for c in found.choices],
        "tokens": [asdict(t) for t in found.tokens], "distributions": found.distributions,
        "cached": None if found.cached is None else asdict(found.cached),
        "repair": None if found.repair is None else found.repair.as_dict(),
        "sensitivity": None if found.sensitivity is None else found.sensitivity.as_dict(),
        "mass": found.mass_by_layer or None, "reasons": found.reasons,
        "how": HOW if found.same_weights else {**HOW, "heat map": RELATIVE},
        "own_weights": None if found.own_weights is None else report_of(found.own_weights),
    })  # fmt: skip


def _causes(found: Drift) -> list[dict[str, Any]]:
    out = [
        {"how": c.suspect.how, "name": c.suspect.name, "text": c.suspect.text, "exact": c.exact, "explains": None,
         "stages": list(c.stages), "layers": stages.compact(c.layers), "alike": list(c.alike),
         "known_as": c.suspect.known_as}
        for c in found.causes
    ]  # fmt: skip
    if found.repair is not None and found.repair.best is not None:
        best = found.repair.best
        out.append({"how": "component", "name": best.what, "text": "its outputs replaced by the reference's",
                      "exact": None, "explains": best.explained, "stages": list(best.kinds),
                      "layers": stages.compact(best.layers), "alike": [], "known_as": ""})  # fmt: skip
    return out


def write(found: Drift, folder: Path) -> list[Path]:
    """report.json, report.jsonl (header, a record a comparison, footer) and report.html; each whole, or not there."""
    told = report_of(found)
    head = {
        k: told[k]
        for k in ("format", "command", "date", "versions", "candidate", "reference", "prompt", "same_weights")
    }
    records = [{"type": "header", **head}]
    records += [{"type": "comparison", **c} for c in told["comparisons"]]
    records += [{"type": "token", **t} for t in told["tokens"]]
    records += [{"type": "footer", "agrees": told["agrees"], "findings": told["findings"], "seconds": told["seconds"]}]
    texts = {
        "report.json": json.dumps(told, allow_nan=False) + "\n",
        "report.jsonl": "".join(json.dumps(r, allow_nan=False) + "\n" for r in records),
        "report.html": render(told),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        with whole(folder / name) as part:
            part.write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def _row(c: Compared) -> dict[str, Any]:
    return {"layer": c.layer, "stage": c.kind, "run": c.run, "error": c.error, "bound": c.bound, "verdict": c.verdict,
            "ties": c.ties}  # fmt: skip


def _side(side: Any) -> dict[str, Any]:
    return {"text": side.text, "runs": side.runs, "conventions": [str(c) for c in side.args.conventions]}
