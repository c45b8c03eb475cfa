"""Rows and columns of a matrix that are no rounding of the original's: zero, scaled, turned, exchanged, coarse.

Of each there is a slope against the original's, <mine, theirs> / <theirs, theirs>, and an error; what noise is left beside the
slope says how far the slope itself is to be trusted at that width. All are looked at; those that stand out are rounded anew.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from .rounding import Form, rounded, yard

SAMPLED = 64  # rows that are rounded anew, to know what is usual in this matrix
FACTOR = 0.02  # of a slope: scales of few bits, searched ones among them
SPREAD = 5.0  # standard errors of a slope
COARSE = 3.0  # times the error of rounding: GPTQ's, which makes up for one column by the next, is up to 2.4 times in narrow rows
SAME = 0.9  # correlation of what is the same but for rounding
LIKE = 0.7  # correlation of what is at least the same row: 2 bits leave 0.8
AT_ONCE = 1 << 22  # values that are rounded anew at once
SHOWN = 3
MANY = 0.5  # of all: then it is no damage of rows or columns


class Sums(NamedTuple):
    """Sums of products, of each group of each row: [R, G], and of each column: [W]. cross: of the difference and the original's;
    off, theirs: of their squares; due: of the squares of what rounding errs (a number for each group; of a column's values)."""

    cross: torch.Tensor
    off: torch.Tensor
    theirs: torch.Tensor
    due: torch.Tensor
    columns: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    size: int


@dataclass(frozen=True)
class Odd:
    """Lines (rows, columns, groups) that are wrong alike. values: the least and greatest factor, or error; usual: what rounding
    gives the first of them; beside: whose row it is."""

    kind: str  # "zero", "factor", "other", "coarse"
    unit: str
    first: tuple[tuple[int, ...], ...]
    count: int
    values: tuple[float, float]
    usual: float
    beside: str = ""

    def moved(self, rows: int) -> Odd:
        if self.unit == "columns":
            return self
        return replace(self, first=tuple((at[0] + rows, *at[1:]) for at in self.first))

    def joined(self, other: Odd) -> Odd:
        return replace(
            self, first=(self.first + other.first)[:SHOWN], count=self.count + other.count,
            values=(min(self.values[0], other.values[0]), max(self.values[1], other.values[1])), beside=self.beside or other.beside,
        )  # fmt: skip

    def told(self, of: int, ids: str) -> str:
        """of: how many such lines there are; ids: what a row's number stands for."""
        at = ", ".join(str(a[0]) if len(a) == 1 else str(list(a)) for a in self.first)
        more = ", ..." if self.count > len(self.first) else ""
        ids = ids if self.unit == "rows" else ""
        where = f"{self.count:,} of {of:,} {self.unit} ({ids}{at}{more})"
        low, high = (f"{v:.3g}" for v in self.values)
        value = low if low == high else f"{low} to {high}"
        if self.kind == "zero":
            return f"{where} are zero, where the original's are not"
        if self.kind == "factor":
            return f"{where} are {value} times the original's, where rounding gives {self.usual:.3g}"
        if self.kind == "other":
            return f"{where} are not the original's{self.beside}: correlation {value}, where rounding leaves {self.usual:.3g}"
        return f"{where} err by {value}, where rounding does by {self.usual:.2g}"



def merged(one: tuple[Odd, ...], other: tuple[Odd, ...]) -> tuple[Odd, ...]:
    """Of two slices of a matrix."""
    both = {(o.kind, o.unit): o for o in one}
    for o in other:
        key = (o.kind, o.unit)
        both[key] = both[key].joined(o) if key in both else o
    return tuple(both.values())


@dataclass(frozen=True)
class Usual:
    """What rounding makes of some rows of this matrix, all in all, and what was found there. excess: of its squared errors over
    what is due by the format alone."""

    slope: float
    error: float
    excess: float
    found: tuple[float, float]


def usual(theirs: torch.Tensor, sums: Sums, form: Form) -> Usual | None:
    """theirs: float32 [R, W]. None where the rows that are looked at are zero."""
    rows = torch.linspace(0, len(theirs) - 1, min(SAMPLED, len(theirs))).round().long()
    some = theirs[rows]
    again = rounded(some, form)
    square = float(some.square().sum())
    if not square:
        return None
    off, due = float((again - some).square().sum()), float(sums.due[rows].sum())
    mine = 1 + float(sums.cross[rows].sum()) / square, (float(sums.off[rows].sum()) / square) ** 0.5
    return Usual(float((again * some).sum()) / square, (off / square) ** 0.5, max(1.0, off / due if due else 1.0), mine)


def odd_rows(mine: torch.Tensor, theirs: torch.Tensor, sums: Sums, form: Form, usual: Usual) -> Iterator[Odd]:
    """mine, theirs: float32 [R, W]."""
    cross, off, square, due = (x.double().sum(1) for x in sums[:4])
    known = square > 0
    square = torch.where(known, square, 1.0)
    slope, error = 1 + cross / square, (off / square).sqrt()
    noise = (off / square - (slope - 1) ** 2).clamp(min=0).sqrt()
    due = due * usual.excess
    # The spread of values that are all alike is the least: none that could be damage is passed over.
    stands_out = (slope - usual.slope).abs() > FACTOR + SPREAD * noise * mine.shape[-1] ** -0.5
    suspects = known & ((off > 2 * due) | (stands_out & (off > 0.5 * due)))
    (at,) = torch.where(suspects)
    if not len(at):
        return
    # A scale too small for its dtype costs what it costs; of FP8's blocks, that depends on the rows around.
    lost = (form.floor(theirs).double().square().expand_as(sums.due).sum(1) * sums.size / square).sqrt()
    wrong: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
    for chunk in at.split(max(1, AT_ONCE // mine.shape[-1])):
        some = theirs[chunk]
        explicable = yard(some, form)
        fourth = some.square().square().sum(-1).double()
        s, e, n = slope[chunk], error[chunk], noise[chunk]
        room = FACTOR + SPREAD * n * fourth.sqrt() / square[chunk]
        explained = torch.maximum(explicable.error.double(), (due[chunk] / square[chunk]).sqrt())
        explained, room = explained + lost[chunk], room + lost[chunk]
        low, high = explicable.low.double().clamp(max=1) - room, explicable.high.double().clamp(min=1) + room
        scaled = ((s < low) | (s > high)) & (e > explicable.error)
        coarse = e > COARSE * explained
        like = s / (e.square() + 2 * s - 1).clamp(min=1e-12).sqrt()
        for i, row in enumerate(chunk.tolist()):
            if not (scaled[i] or coarse[i]):
                continue
            if not mine[row].any():
                wrong["zero"].append((row, 0.0, 1.0))
            elif abs(float(like[i])) < LIKE:
                wrong["other"].append((row, float(like[i]), float(1 - explained[i] ** 2 / 2)))
            elif scaled[i]:
                wrong["factor"].append((row, float(s[i]), float(explicable.low[i])))
            else:
                wrong["coarse"].append((row, float(e[i]), float(explained[i])))
    for kind, found in wrong.items():
        odd = _odd(kind, "rows", found)
        yield replace(odd, beside=_whose(mine, theirs, odd.first)) if kind == "other" else odd


def _whose(mine: torch.Tensor, theirs: torch.Tensor, rows: Iterable[tuple[int, ...]]) -> str:
    """Which of the original's rows these are."""
    found = []
    for (row,) in rows:
        likeness = torch.nn.functional.cosine_similarity(mine[row], theirs, dim=-1)
        if likeness.max() > SAME:
            found.append(f"{row} is its {int(likeness.argmax())}")
    return f" ({', '.join(found)})" if found else ""


def _odd(kind: str, unit: str, found: list[tuple[int, float, float]]) -> Odd:
    values = [value for _, value, _ in found]
    return Odd(kind, unit, tuple((i,) for i, _, _ in found[:SHOWN]), len(found), (min(values), max(values)), found[0][2])


def odd_columns(mine: torch.Tensor, theirs: torch.Tensor, sums: Sums, usual: Usual) -> Iterator[Odd]:
    """Of a column nothing can be rounded by itself: its yardstick is what is due in the groups that it passes through."""
    cross, off, square = (x.double() for x in sums.columns)
    due = (sums.due.double().sum(0) * usual.excess / sums.size).repeat_interleave(sums.size)[: len(square)]
    known = square > 0
    square = torch.where(known, square, 1.0)
    slope, share = 1 + cross / square, due / square
    noise = (off / square - (slope - 1) ** 2).clamp(min=0).sqrt()
    room = FACTOR + share + SPREAD * noise * len(mine) ** -0.5
    suspects = known & ((slope < min(usual.slope, 1) - room) | (slope > max(usual.slope, 1) + room)) & (off > 2 * due)
    (at,) = torch.where(suspects)
    if not len(at):
        return
    fourth = theirs[:, at].square().square().sum(0).double()
    room = FACTOR + share[at] + SPREAD * noise[at] * fourth.sqrt() / square[at]
    s = slope[at]
    wrong = (s < min(usual.slope, 1) - room) | (s > max(usual.slope, 1) + room)
    found: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
    for i, column in enumerate(at.tolist()):
        if wrong[i]:
            is_zero = not mine[:, column].any()
            found["zero" if is_zero else "factor"].append((column, float(s[i]), usual.slope))
    for kind, columns in found.items():
        yield _odd(kind, "columns", columns)
