"""The report of a comparison as one HTML page that needs nothing else: no network, no other file.

Names, paths and prompts come from strangers. In the page's text jinja2 escapes them, and signs that would not be seen are
spelled out; the charts' numbers are JSON that cannot end its own element; and the page's policy lets its own script run and
no other.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from glm_dsa.errors import printable

TEMPLATE = Path(__file__).with_name("page.html")
SECTIONS = {  # in the page's order: the key of `how` and `reasons`, and the heading
    "findings": "Findings",
    "divergence": "First divergence",
    "causes": "Causes",
    "heat map": "Error by layer and stage",
    "choices": "Selection and routing by layer",
    "growth": "Error growth",
    "tokens": "The prompt",
    "sensitivity": "What the bits cost",
    "mass": "Attention mass of both layouts",
}
KINDS = {"divergence": "First divergence", "cause": "Cause", "growth": "Growth", "cost": "Cost", "note": "Note"}
RUNS = ("local", "own")
VERDICTS = ("agrees", "FAULT", "measured")
LAYER = ("layer", "indexer", "mlp", "mtp")
COMPARISON = ("layer", "stage", "run", "error", "bound", "verdict", "ties", "note")
GROWTH = ("layer", "local", "own", "gain")
CHOICES = ("layer", "selection", "selection_own", "routing", "routing_own")
TOKEN = ("position", "token", "text", "kl", "same_top1", "ref_next", "own_next")
MASS = ("layer", "interleaved", "half_split", "chance")
DIGITS = 4  # of an embedded number; the page shows three


def render(report: Mapping[str, Any]) -> str:
    """The page of one report, as HTML."""
    source = TEMPLATE.read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, finalize=shown
    )
    environment.filters |= {f.__name__: f for f in (times, share, portion, count, size, ranked, breakable)}
    parts = {name: part(report, name) for name in SECTIONS}
    reasons = {name: why for name, why in (report.get("reasons") or {}).items() if why and not parts.get(name)}
    how = {name: text for name, text in (report.get("how") or {}).items() if text}
    return environment.from_string(source).render(
        report=report,
        parts=parts,
        reasons=reasons,
        how=how,
        titles={name: title for name, title in SECTIONS.items() if parts[name] or name in reasons},
        other_reasons={name: why for name, why in reasons.items() if name not in SECTIONS},
        other_how={name: text for name, text in how.items() if name not in SECTIONS},
        relative=is_relative(report),
        chosen=[name for name in ("selection", "routing") if has(report.get("choices"), name, f"{name}_own")],
        gains=has(report.get("growth"), "gain"),
        kinds=KINDS,
        policy=policy(source),
        data=embedded(packed(report)),
    )


def is_relative(report: Mapping[str, Any]) -> bool:
    """Of other weights every error is beyond what rounding explains: there the map is shaded by the errors themselves."""
    return not report.get("same_weights", True)


def part(report: Mapping[str, Any], name: str) -> Any:
    """What a section is made of; nothing where it would be empty."""
    found = report.get("comparisons" if name == "heat map" else name)
    return found if name != "choices" or has(found, *CHOICES[1:]) else None


def has(rows: Iterable[Mapping[str, Any]] | None, *keys: str) -> bool:
    """Whether any row knows any of these."""
    return any(row.get(key) is not None for row in rows or () for key in keys)


def policy(source: str) -> str:
    """The page's Content-Security-Policy: the template's own script and nothing from elsewhere."""
    found = re.search(r"<script>(.*?)</script>", source, re.DOTALL)
    assert found, f"{TEMPLATE.name} has no script"
    digest = base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


# -- what the charts are drawn from


def packed(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the charts need, as rows without names; stages, runs and verdicts by their index."""
    compared = report.get("comparisons") or []
    stages = list(dict.fromkeys([*(report.get("stages") or []), *(c["stage"] for c in compared)]))
    column = {stage: i for i, stage in enumerate(stages)}
    indexed = (
        c | {"stage": column[c["stage"]], "run": RUNS.index(c["run"]), "verdict": VERDICTS.index(c["verdict"])}
        for c in compared
    )
    return {
        "layers": rows(report.get("layers"), LAYER),
        "stages": stages,
        "runs": RUNS,
        "verdicts": VERDICTS,
        "comparisons": rows(indexed, COMPARISON),
        "growth": rows(report.get("growth"), GROWTH),
        "choices": rows(report.get("choices"), CHOICES),
        "tokens": rows(report.get("tokens"), TOKEN),
        "mass": rows(report.get("mass"), MASS),
        "relative": is_relative(report),
        "index_topk": (report.get("prompt") or {}).get("index_topk"),
    }


def rows(given: Iterable[Mapping[str, Any]] | None, keys: tuple[str, ...]) -> list[list[Any]]:
    return [[brief(row.get(key)) for key in keys] for row in given or ()]


def brief(value: Any) -> Any:
    """A float with as many digits as the page needs; one that JSON does not know as its name."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else str(value)


def embedded(data: Any) -> Markup:
    """JSON for a script element: in ASCII, and without the sign that could end it or begin a comment."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))  # noqa: S704 - nothing in it can be read as HTML


# -- how values are shown


def shown(value: Any) -> Any:
    """What the template shows of any value; jinja2 escapes it afterwards."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return number(value)
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def breakable(value: str) -> Markup:
    """A text that may be wrapped inside of its dotted names."""
    text = str(escape(printable(value)))
    return Markup(re.sub(r"[./_@]+(?=[^\W\d])", r"\g<0><wbr>", text))  # noqa: S704 - escaped


def number(value: float) -> str:
    """Three digits: 0.12, 1.2e-7, inf."""
    if value and math.isfinite(value) and not 1e-3 <= abs(value) < 1e4:
        digits, exponent = f"{value:.2e}".split("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.3g}" if not abs(value) >= 999.5 else f"{value:.0f}"


def times(row: Mapping[str, Any]) -> Any:
    """An error in units of its bound, where there is one."""
    return float(row["error"]) / float(row["bound"]) if row["bound"] and row["error"] is not None else None


def share(value: Any) -> Any:
    return f"{100 * value:.1f} %" if isinstance(value, int | float) else value


def portion(value: Any) -> float:
    """Of a bar's full length."""
    return min(1.0, max(0.0, value)) if isinstance(value, int | float) else 0.0


def ranked(given: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those first that cost most by themselves; last what is no number."""
    return sorted(given, key=lambda row: -row["alone"] if isinstance(row["alone"], int | float) else math.inf)


def count(value: Any) -> Any:
    return f"{value:,}" if isinstance(value, int) else value


def size(value: Any) -> Any:
    """Bytes, in units of 1000."""
    if not isinstance(value, int | float):
        return value
    power = min(4, int(math.log10(abs(value)) / 3)) if abs(value) >= 1 else 0
    return f"{value / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
