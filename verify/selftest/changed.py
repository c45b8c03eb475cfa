"""`python -m verify judge --changed`: of the kept record, what a change may have made untrue is judged again.

Three kinds of rows are. Those whose key differs from the record's: their edits, modules or claim's files are others. Those that
were judged since the last full run (--keep marks them): a record that somebody made by themselves is not taken at its word, so CI,
which keeps nothing, judges them too. And where the core differs from the full run's, sentinels: of each claim the faults that came
nearest to passing. Beside them a few sound checkpoints. No history is asked, so a shallow clone or a commit that holds both a
change and its record is judged as any other. Only a full run makes them fewer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .. import faults
from . import keys

RANDOM = 3  # sound checkpoints
OF_A_CLAIM = 2  # sentinels


@dataclass(frozen=True)
class Due:
    stale: list[str]
    since: list[str]
    sentinels: list[str]

    @property
    def names(self) -> list[str]:
        """In the catalogue's order, each once."""
        every = {*self.stale, *self.since, *self.sentinels}
        return [name for name in faults.CATALOGUE if name in every]

    def __str__(self) -> str:
        return (
            f"{len(self.names)} of {len(faults.CATALOGUE)} faults to judge: {len(self.stale)} of other edits, modules or claims, "
            f"{len(self.since)} judged since the full run, {len(self.sentinels)} sentinels of a core that changed"
        )


def due(record: Mapping[str, Any], keep: bool) -> Due:
    """keep: those judged since the full run stay as they are, unless something changed again."""
    found = record["faults"]
    stale = stale_rows(found)
    since = [] if keep else [name for name, row in found.items() if "since" in row and name in faults.CATALOGUE]
    return Due(stale, since, sentinels(found) if record["full"] != keys.core() else [])


def stale_rows(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Faults that the record does not have, or has of other code."""
    return [name for name, fault in faults.CATALOGUE.items() if found.get(name, {}).get("key") != keys.key(fault)]


def sentinels(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Of each claim the faults that were caught with the least to spare."""
    by_claim: dict[str, list[str]] = {}
    for name in sorted(found, key=lambda name: found[name].get("bounds") or math.inf):
        if name in faults.CATALOGUE and found[name].get("claim"):
            by_claim.setdefault(found[name]["claim"], []).append(name)
    return [name for names in by_claim.values() for name in names[:OF_A_CLAIM]]


def differences(record: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Of rows whose key is the record's: where they were met then, and where now."""
    lines = []
    for name, row in found.items():
        kept = record["faults"].get(name, {})
        if kept.get("key") == row["key"] and _met(kept) != _met(row):
            lines.append(f"{name}: expected {_met(kept)}, as the record has it, got {_met(row)}")
    return lines


def _met(row: Mapping[str, Any]) -> str:
    return f"{row['stage']} [{row['claim']}]" if row.get("claim") else "not caught"


def renewed(record: Mapping[str, Any], judged: Mapping[str, Any]) -> dict[str, Any]:
    """The record with the rows that were stale as they are now, each marked by the core under which it was judged."""
    stale, core = set(stale_rows(record["faults"])), keys.core()
    rows = record["faults"] | {name: row | {"since": core} for name, row in judged["faults"].items() if name in stale}
    signs = record["rules"]["faults"] | {n: s for n, s in judged["rules"]["faults"].items() if n in stale}
    kept = {name: rows[name] for name in faults.CATALOGUE if name in rows}
    return {**record, "faults": kept, "rules": {**record["rules"], "faults": {name: signs[name] for name in kept}}}
