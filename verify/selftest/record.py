"""The records that this repository keeps, as JSON lines: a header, then a line for each row, so that a diff shows what changed.

Nothing in them changes by itself: no seconds, no notes, of figures three digits.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .. import FOLDER
from .baselines import RULES

KEPT = FOLDER / "records" / "judged.jsonl"
OF_RUN = ("full", "versions", "random", "tests", "comparisons", "cases")  # what the header holds of a full run
OF_ROW = ("claim", "stage", "case", "key", "since")  # what a row holds, where it has it
BETWEEN = "|"  # signs of one rule from those of the next


def lines(header: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(line, sort_keys=True, ensure_ascii=False) + "\n" for line in (header, *rows))


def parse(text: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(header, rows). Raises ValueError."""
    header, *rows = map(json.loads, text.splitlines())
    if not isinstance(header, dict) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected an object on each line, got something else")
    return header, rows


def as_lines(record: Mapping[str, Any]) -> str:
    """The record of a judge: {"full", "faults", "rules", "random", ..}."""
    found, rules = record["faults"], record["rules"]
    header = {key: record[key] for key in OF_RUN}
    header |= {"rules": [rule.name for rule in RULES], "clean": [_joined(signs) for signs in rules["clean"]]}
    rows = [
        {
            "name": name, **{key: row[key] for key in OF_ROW if key in row}, "rules": _joined(rules["faults"][name]),
            **({"bounds": float(f"{row['bounds']:.3g}")} if row.get("bounds") else {}),
        }
        for name, row in found.items()
    ]  # fmt: skip
    return lines(header, rows)


def of_lines(text: str) -> dict[str, Any]:
    """as_lines' inverse. Raises ValueError, LookupError or TypeError where it is none."""
    header, rows = parse(text)
    names = header.pop("rules")
    if names != [rule.name for rule in RULES]:
        raise ValueError(f"expected the rules {[rule.name for rule in RULES]}, got {names}")
    signs = {row["name"]: _parted(row.pop("rules")) for row in rows}
    clean = [_parted(run) for run in header.pop("clean")]
    return {**header, "faults": {row.pop("name"): row for row in rows}, "rules": {"faults": signs, "clean": clean}}


def read(path: Path = KEPT) -> dict[str, Any]:
    """Raises ValueError, in one line, where there is no such record."""
    try:
        return of_lines(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}; python -m verify judge --keep writes it") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise no_record(path, error) from None


def no_record(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: no record of a judge ({type(error).__name__}: {error}); check it out again")


def _joined(signs: Mapping[str, str]) -> str:
    return BETWEEN.join(signs[rule.name] for rule in RULES)


def _parted(signs: str) -> dict[str, str]:
    return {rule.name: part for rule, part in zip(RULES, signs.split(BETWEEN), strict=True)}
