"""How far a matrix lies from the original's: by group, by row and column, and throughout."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from .rounding import HALF_ULP, TINY, TYPICAL, Form
from .rows import MANY, Odd, Sums, merged, odd_columns, odd_rows, throughout, usual

# What rounding to a format errs in a group, rms, at most: twice what mlx's own packing did on normal, heavy-tailed, uniform
# and shifted weights (tests/test_damage.py). affine: in steps; a step's scale is itself rounded, to bf16. Others: relative.
STEPS = 0.5  # + 2^bits / 2^9
RELATIVE = {"mxfp4": 0.3, "nvfp4": 0.3, "mxfp8": 0.06, "fp8": 0.06}
TWICE = 2.0
OTHER = 0.5  # relative error from which on a matrix is another one: 2 bits cost 0.5 at most, and are not compared by it
BLOCK = 1 << 18  # values that are compared at once: they stay in the cache


@dataclass(frozen=True)
class Gap:
    """How far a matrix lies from the original's. worst: of a group, in what rounding explains; `beyond` of `groups` are over 1.
    whole: what is wrong with it throughout, and odd: with some of its rows, though each group by itself could be rounding.
    size: rows and columns; ids: what the number of a row stands for."""

    worst: float
    beyond: int
    groups: int
    where: tuple[int, ...]
    relative: float
    is_vector: bool
    unit: str
    whole: str = ""
    odd: tuple[Odd, ...] = ()
    size: tuple[int, int] = (0, 0)
    ids: str = ""

    @property
    def is_fault(self) -> bool:
        return bool(self.beyond or self.whole or self.odd)

    @property
    def is_other(self) -> bool:
        """All of it, far: no rounding, and no damage in a place, but another matrix. (Norms differ little among layers.)"""
        rows = any(o.kind == "other" and o.count > MANY * self.size[0] for o in self.odd)
        return (self.beyond > MANY * self.groups or rows) and (self.relative > OTHER or self.is_vector)

    def moved(self, rows: int) -> Gap:
        """Of a slice that begins so many rows further down."""
        return replace(
            self, where=(self.where[0] + rows, *self.where[1:]), odd=tuple(odd.moved(rows) for odd in self.odd)
        )

    def joined(self, other: Gap) -> Gap:
        """Two slices of one matrix."""
        worst = max(self, other, key=lambda g: g.worst)
        return replace(
            worst, beyond=self.beyond + other.beyond, groups=self.groups + other.groups,
            relative=max(self.relative, other.relative), whole=self.whole or other.whole, odd=merged(self.odd, other.odd),
            size=(self.size[0] + other.size[0], self.size[1]),
        )  # fmt: skip

    def __str__(self) -> str:
        parts = []
        if self.beyond:
            parts.append(
                f"{self.beyond:,} of {self.groups:,} {self.unit} lie further from the original's than rounding explains, the "
                f"worst {self.worst:.3g} times as far (at {list(self.where)})"
            )
        parts += [self.whole] if self.whole else []
        parts += [odd.told(self.size[odd.unit == "columns"], self.ids) for odd in self.odd]
        return "; ".join([*parts, f"relative error {self.relative:.2g}"])


def gap(mine: torch.Tensor, theirs: torch.Tensor, form: Form) -> Gap:
    """Two matrices (or vectors), float32 [.., W], of which mine is stored in that form."""
    if not form.is_rounded:
        return _gap_of_values(mine, theirs, form)
    shape = mine.shape[:-1]
    mine, theirs = mine.reshape(-1, mine.shape[-1]), theirs.reshape(-1, mine.shape[-1])
    sums, most = _sums(mine, theirs, form)
    share = _share(sums, most)
    if bool((share > 1).any()):
        share = _share(sums, most + form.floor(theirs))
    square = float(sums.theirs.double().sum())
    relative = (float(sums.off.double().sum()) / square) ** 0.5 if square else float(bool(sums.off.any()))
    whole, odd = "", tuple[Odd, ...]()
    if (known := usual(theirs, sums, form)) is not None:
        whole, odd = throughout(theirs, form, known), tuple(odd_rows(mine, theirs, sums, form, known))
        if sum(o.count for o in odd) <= MANY * len(mine):
            odd += tuple(odd_columns(mine, theirs, sums, form, known))
    where = np.unravel_index(int(share.argmax()), (*shape, share.shape[-1]))
    if len(shape) > 1:
        odd = tuple(_unravelled(o, shape) for o in odd)
    return Gap(
        float(share.max()), int((share > 1).sum()), share.numel(), tuple(int(i) for i in where), relative, False, "groups",
        whole, odd, (len(mine), mine.shape[-1]),
    )  # fmt: skip


def _unravelled(odd: Odd, shape: torch.Size) -> Odd:
    """Rows of a stack of matrices."""
    if odd.unit == "columns":
        return odd
    return replace(odd, first=tuple(tuple(int(i) for i in np.unravel_index(at[0], shape)) for at in odd.first))


def _gap_of_values(mine: torch.Tensor, theirs: torch.Tensor, form: Form) -> Gap:
    off = mine - theirs
    relative = float(off.norm() / theirs.norm()) if theirs.any() else float(off.norm() > 0)
    most = theirs.abs() * HALF_ULP[form.dtype] + TINY.get(form.dtype, 0.0)
    share = torch.where(off == 0, 0.0, off.abs() / most).nan_to_num(nan=torch.inf)
    where = tuple(int(i) for i in np.unravel_index(int(share.argmax()), share.shape))
    return Gap(float(share.max()), int((share > 1).sum()), share.numel(), where, relative, mine.dim() == 1, "values")


def _share(sums: Sums, most: torch.Tensor) -> torch.Tensor:
    """Of each group's error in what rounding explains."""
    rms = (sums.off / sums.size).sqrt()
    return torch.where(rms == 0, 0.0, rms / most).nan_to_num(nan=torch.inf)


def _sums(mine: torch.Tensor, theirs: torch.Tensor, form: Form) -> tuple[Sums, torch.Tensor]:
    """And what rounding errs in each group at most, rms. In blocks of rows: each product is summed while it is in the cache."""
    width, size = mine.shape[-1], form.group(mine.shape[-1])
    columns = torch.zeros(3, width)
    groups: tuple[list[torch.Tensor], ...] = ([], [], [], [], [])
    rows, ones = max(1, BLOCK // width), torch.ones(size)

    def add(i: int, product: torch.Tensor) -> None:
        columns[i] += torch.ones(len(product)) @ product
        padded = torch.nn.functional.pad(product, (0, -width % size)) if width % size else product
        groups[i].append((padded.view(-1, size) @ ones).view(len(product), -1))

    for ours, original in zip(mine.split(rows), theirs.split(rows), strict=True):
        off = ours - original
        product = off * original
        add(0, product)
        add(1, torch.mul(off, off, out=product))
        add(2, torch.mul(original, original, out=product))
        if form.mode == "affine":  # in steps that the original's own range needs
            assert form.packed is not None
            low, high = original.unflatten(-1, (-1, size)).aminmax(dim=-1)
            step, edge = (
                (high - low) / (2**form.packed.bits - 1),
                torch.maximum(low.abs(), high.abs()) * HALF_ULP["BF16"],
            )
            groups[3].append(TWICE * (STEPS + 2.0 ** (form.packed.bits - 9)) * step + edge)
            groups[4].append((step.square() / 12 + edge.square() / 12) * size)
    cross, off, square = (torch.cat(part) for part in groups[:3])
    if form.mode == "affine":
        most, due = torch.cat(groups[3]), torch.cat(groups[4])
    else:
        most, due = TWICE * RELATIVE[form.mode] * (square / size).sqrt(), square * TYPICAL[form.mode] ** 2
    return Sums(cross, off, square, due, (columns[0], columns[1], columns[2]), size), most
