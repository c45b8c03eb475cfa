"""Findings, alike ones merged: by kind of finding and by name without its numbers, with counts, ranges and examples."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from glm_dsa.errors import printable
from glm_dsa.text import ranges as spelled

FAULT, WARNING, NOTE = "FAULT", "warning", "note"
ORDER = {FAULT: 0, WARNING: 1, NOTE: 2}
SPELLED, EXAMPLES, RANGES = 12, 3, 12  # names spelled out for each kind; examples of what is merged; ranges in a name
NUMBER = re.compile(r"\.([0-9]{1,9})(?=\.)")


@dataclass(frozen=True)
class Finding:
    """`what`, in one line, says where, what was expected, and what to do. `count`: tensors, or whatever it is said of."""

    severity: str
    what: str
    count: int = 1
    examples: tuple[str, ...] = ()


@dataclass
class _Group:
    detail: str
    names: list[str] = field(default_factory=list)
    details: set[str] = field(default_factory=set)

    def add(self, name: str, detail: str) -> None:
        self.names.append(name)
        self.details.add(detail)

    def told(self) -> str:
        more = len(self.details) - 1
        return f"{self.detail} (and {more:,} others)" if more > 0 else self.detail


class Findings:
    """What was found, in the order of first mention."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, str], dict[tuple[str, ...], _Group]] = defaultdict(dict)

    def say(self, severity: str, what: str) -> None:
        """Of no tensor in particular."""
        self._kinds[severity, what].setdefault((), _Group("")).add("", "")

    def tensor(self, severity: str, kind: str, name: str, detail: str = "", apart: bool = False) -> None:
        """`kind`: a text with {tensors}, and {detail}, in it. Tensors whose names differ by numbers alone are one finding,
        whatever their details; with `apart`, one for each detail."""
        first, *rest = NUMBER.split(name)
        key = (first, *rest[1::2], *([detail] if apart else []))
        self._kinds[severity, kind].setdefault(key, _Group(detail)).add(name, detail)

    def merged(self) -> list[Finding]:
        """FAULTs first. No more than SPELLED + 1 of a kind."""
        found: list[Finding] = []
        for (severity, kind), groups in self._kinds.items():
            every = list(groups.values())
            most = SPELLED if len(every) > SPELLED + 1 else len(every)
            for group in every[:most]:
                found.append(_finding(severity, kind, grouped(group.names)[0] if group.names[0] else "", group))
            if rest := every[most:]:
                other = _Group(rest[0].detail)
                for group in rest:
                    other.names += group.names
                    other.details |= group.details
                shown = ", ".join(printable(name)[:120] for name in other.names[:EXAMPLES])
                found.append(_finding(severity, kind, f"{len(other.names):,} more tensors ({shown}, ...)", other))
        return sorted(found, key=lambda f: ORDER[f.severity])


def _finding(severity: str, kind: str, tensors: str, group: _Group) -> Finding:
    parts = {"{tensors}": tensors, "{detail}": group.told()}
    what = re.sub(r"\{tensors\}|\{detail\}", lambda match: parts[match[0]], kind)
    names = tuple(printable(name)[:200] for name in group.names[:EXAMPLES] if name)
    return Finding(severity, printable(what), len(group.names), names)


def grouped(names: Iterable[str]) -> list[str]:
    """Names that differ in their numbers only, in one line each: `model.layers.3-5.mlp.experts.0-7.up_proj.weight (24)`."""
    numbers: dict[tuple[str, ...], list[list[int]]] = defaultdict(list)
    for name in names:
        first, *rest = NUMBER.split(name)
        numbers[first, *rest[1::2]].append([int(n) for n in rest[::2]])
    lines = []
    for (first, *texts), found in numbers.items():
        columns = (ranges(sorted(set(column))) for column in zip(*found, strict=True))
        line = first + "".join(f".{column}{text}" for column, text in zip(columns, texts, strict=True))
        lines.append(line + (f" ({len(found)} tensors)" if len(found) > 1 else ""))
    return lines


def ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 6] -> "0-2,6"; where there are many, the first and the last."""
    told = spelled(numbers)
    return told if told.count(",") < RANGES else f"{numbers[0]}..{numbers[-1]}"
