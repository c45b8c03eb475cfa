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

from .rounding import HALF_ULP, Form, rounded, roundings, yard

SAMPLED = 64  # rows that are rounded anew, to know what is usual in this matrix
FACTOR = 0.02  # of a slope: scales of few bits, searched ones among them
SLACK = 1.8  # times the error of rounding, of a whole matrix
DEAD = 3.0  # times the share of errors in a column's square: values of less than half a step shrink to nothing
DULL = 0.3  # a column of which nothing is left has values of at most half a step: then its share is 1/3 or more
PEAK, CUT = 2.0, 0.35  # times the mean square of its group: from there on searched scales cut a column, by so much
NOTHING = 1e-3  # of a slope: a column of zeros is packed as what is left of their group's bias
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


class Usual(NamedTuple):
    """What rounding makes of some rows of this matrix; and what was found in all of them: slope and error. excess: of its squared
    errors over what is expected of the format alone, at least 1. spread: by how much that slope is uncertain."""

    rows: torch.Tensor
    slope: float
    error: float
    due: float
    excess: float
    found: tuple[float, float]
    spread: float

    def explains(self, low: float, high: float, error: float) -> str:
        """What is wrong with these rows throughout, where rounding gives slopes from low to high, and that error."""
        slope, own = self.found
        # Scales that are searched for the least error shrink few bits by more than that, and lie nearer than rounding does.
        room = FACTOR + self.spread
        if not min(low, 1.0) - room <= slope <= max(high, 1.0) + room and own > error:
            return f"{slope:.4g} times the original's throughout, where rounding gives {self.slope:.4g}"
        if own > SLACK * max(error, self.due) + HALF_ULP["F16"]:
            return f"it errs by {own:.2g} throughout, where rounding does by {max(error, self.due):.2g}"
        return ""


def usual(theirs: torch.Tensor, sums: Sums, form: Form) -> Usual | None:
    """theirs: float32 [R, W]. None where the rows that are looked at are zero."""
    rows = torch.linspace(0, len(theirs) - 1, min(SAMPLED, len(theirs))).round().long()
    some = theirs[rows]
    again = rounded(some, form)
    square = float(some.square().sum())
    if not square:
        return None
    off, due = float((again - some).square().sum()), float(sums.due[rows].sum())
    every = [float(x.double().sum()) for x in (sums.cross, sums.off, sums.theirs)]
    found = 1 + every[0] / every[2], (every[1] / every[2]) ** 0.5
    slope = float((again * some).sum()) / square
    least, most = (off / square) ** 0.5, (max(off, due) / square) ** 0.5
    # Affine packings differ in what they hold exactly, zero or the range: mlx's own error is not the least that is sound.
    error = most if form.mode == "affine" else least
    fourth = float(some.square().square().sum())
    noise = max(found[1] ** 2 - (found[0] - 1) ** 2, 0.0) ** 0.5
    spread = SPREAD * noise * fourth**0.5 / square * (len(rows) / len(theirs)) ** 0.5
    return Usual(rows, slope, error, most, max(1.0, off / due if due else 1.0), found, spread)


def throughout(theirs: torch.Tensor, form: Form, usual: Usual) -> str:
    """A factor, or errors larger than rounding's, on some rows, beside what rounding itself makes of the same rows."""
    wrong = usual.explains(usual.slope, usual.slope, usual.error)
    if not wrong or form.mode == "affine":
        return wrong
    low, high, error = (float(x) for x in yard(theirs[usual.rows].flatten()[None], form))
    return usual.explains(low, high, error)


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
    return Odd(
        kind, unit, tuple((i,) for i, _, _ in found[:SHOWN]), len(found), (min(values), max(values)), found[0][2]
    )


def odd_columns(mine: torch.Tensor, theirs: torch.Tensor, sums: Sums, form: Form, usual: Usual) -> Iterator[Odd]:
    """What is expected in the groups that a column passes through says which stand out; those groups are rounded anew, since what
    falls on the same step in each row errs alike in all."""
    cross, off, square = (x.double() for x in sums.columns)
    due, mean = (
        (x.double().sum(0) / sums.size).repeat_interleave(sums.size)[: len(square)] for x in (sums.due, sums.theirs)
    )
    due, is_peak = due * usual.excess, square > PEAK * mean
    known = square > 0
    square = torch.where(known, square, 1.0)
    slope, share = 1 + cross / square, due / square
    noise = (off / square - (slope - 1) ** 2).clamp(min=0).sqrt()
    noise = torch.maximum(noise, share.sqrt())  # what few values leave beside a slope says nothing
    room = FACTOR + DEAD * share + CUT * is_peak
    low, high = min(usual.slope, 1) - room, max(usual.slope, 1) + room - CUT * is_peak

    def beyond(at: torch.Tensor, concentration: torch.Tensor | float) -> torch.Tensor:
        spread = SPREAD * noise[at] * concentration
        return (slope[at] < low[at] - spread) | (slope[at] > high[at] + spread)

    every = torch.arange(len(square))
    is_zero = (slope.abs() < NOTHING) & (share < DULL)
    (at,) = torch.where(known & (is_zero | ((off > 2 * due) & beyond(every, len(mine) ** -0.5))))
    at = at[is_zero[at] | beyond(at, theirs[:, at].square().square().sum(0).double().sqrt() / square[at])]
    found: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
    for column in at.tolist():
        least, most = _anew(theirs, column, form)
        if is_zero[column] and least > NOTHING:
            found["zero"].append((column, float(slope[column]), usual.slope))
        elif not least - room[column] <= slope[column] <= most + room[column]:
            found["factor"].append((column, float(slope[column]), usual.slope))
    for kind, columns in found.items():
        yield _odd(kind, "columns", columns)


def _anew(theirs: torch.Tensor, column: int, form: Form) -> tuple[float, float]:
    """The least and the greatest slope that rounding gives a column."""
    size = form.group(theirs.shape[-1])
    begin = column // size * size
    group = theirs[:, begin : begin + size]
    own = theirs[:, column]
    slopes = [float(each[:, column - begin] @ own / (own @ own)) for each in roundings(group, form)]
    return min(slopes), max(slopes)
