"""Pruned builds: which of an original's experts are there, told by the rows of the routers, layer by layer.

Whoever prunes experts takes their rows out of the router, and their entries out of its bias, each layer by itself; what is
left keeps its order or not. Merged experts get rows that no expert of the original has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from glm_dsa import ModelArgs
from reference.stored import read_tensors

from ..core import stages

Array = np.ndarray
ROUTER, BIAS = "mlp.gate.weight", "mlp.gate.e_score_correction_bias"
KEYS = ("n_routed_experts", "n_group", "topk_group")  # of config.json, that go with the number of experts
LIKE = 0.9  # cosine of a row and what packing, or a little training, made of it; random ones of 64 values are below 0.6
CLEAR = 0.5  # the next best lies at least twice as far (1 - cosine)
SHOWN, WIDTH = 3, 100  # layers whose dropped experts are listed; characters of each list


@dataclass(frozen=True)
class Numbering:
    """One layer's experts by an original's numbers. order: all of the original's, int [E], that of this build's expert j at j,
    those that were dropped behind them. strangers: {j: cosine} of rows that are like none; they stand for the nearest left."""

    order: Array
    count: int
    strangers: Mapping[int, float] = field(default_factory=dict)

    @classmethod
    def plain(cls, count: int) -> Numbering:
        """Nothing dropped, nothing moved."""
        return cls(np.arange(count), count)

    @property
    def is_plain(self) -> bool:
        return self.count == len(self.order) and bool((self.order == np.arange(self.count)).all())

    @property
    def is_whole(self) -> bool:
        return self.count == len(self.order)

    @property
    def own(self) -> Array:
        """The original's number of each expert, int [count]."""
        return self.order[: self.count]

    @property
    def kept(self) -> Array:
        """Numbers of those that were found again."""
        return self.order[[j for j in range(self.count) if j not in self.strangers]]

    @property
    def dropped(self) -> Array:
        """Numbers of those that were not."""
        return np.setdiff1d(self.order, self.kept)

    @property
    def places(self) -> Array:
        """Where the original's expert stands in `order`, int [E]."""
        return np.argsort(self.order)


Numberings = Mapping[int, Numbering]  # by layer; those that are not in it are plain


def numbered(mine: torch.Tensor, theirs: torch.Tensor, bias: torch.Tensor, their_bias: torch.Tensor) -> Numbering:
    """Router rows [count, hidden] and bias [count] of a build, [E, hidden] and [E] of the original, float32; count <= E.

    Equal rows first (of equal ones those with the same bias), then the nearest that are left, one to one.
    """
    count, every = len(mine), len(theirs)
    found: dict[int, int] = {}
    free = dict.fromkeys(range(every))
    by_row: dict[bytes, list[int]] = {}
    for e in range(every):
        by_row.setdefault(theirs[e].numpy().tobytes(), []).append(e)
    for j in range(count):
        same = [e for e in by_row.get(mine[j].numpy().tobytes(), ()) if e in free]
        if same:
            found[j] = min(same, key=lambda e: (bool(their_bias[e] != bias[j]), e))
            del free[found[j]]
    strangers: dict[int, float] = {}
    left = [j for j in range(count) if j not in found]
    if left:
        likeness = (_unit(mine[left]) @ _unit(theirs).T).numpy()  # [left, E]
        for at in np.argsort(-likeness, axis=None, kind="stable"):
            row, e = divmod(int(at), every)
            if left[row] not in found and e in free:
                found[left[row]] = e
                del free[e]
                if not _is_clear(likeness[row], e):
                    strangers[left[row]] = float(likeness[row, e])
    order = np.array([found[j] for j in range(count)] + list(free), dtype=np.int64)
    return Numbering(order, count, strangers)


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(rows.double(), dim=-1)


def _is_clear(likeness: Array, e: int) -> bool:
    others = np.delete(likeness, e)
    second = float(others.max()) if others.size else -1.0
    return bool(likeness[e] >= LIKE and 1 - likeness[e] <= CLEAR * (1 - second))


def numberings(mine: read_tensors, theirs: read_tensors, layers: Iterable[int]) -> dict[int, Numbering]:
    """Of the layers that have a router on both sides. Only routers are read. Plain ones are left out; so is a layer of as many
    experts as the original's in which some row is like none: there nothing was dropped, and damage is told as such.

    Raises ValueError where not a single row of a smaller router is the original's.
    """
    found: dict[int, Numbering] = {}
    for layer in layers:
        names = [f"model.layers.{layer}.{part}" for part in (ROUTER, BIAS)]
        if not all(name in read for name in names for read in (mine, theirs)):
            continue
        (rows, bias), (their_rows, their_bias) = ([read(n, torch.float32) for n in names] for read in (mine, theirs))
        if rows.shape[-1] != their_rows.shape[-1] or len(rows) > len(their_rows) or len(bias) != len(rows):
            continue
        numbering = numbered(rows, their_rows, bias, their_bias)
        if not numbering.is_plain and not (numbering.is_whole and numbering.strangers):
            found[layer] = numbering
    if found and all(len(n.strangers) == n.count for n in found.values()):
        raise ValueError(
            f"{theirs.folder}: expected the model that {mine.folder} was pruned from, got one whose routers have not one row in "
            f"common with it (layers {stages.compact(found)}); name another original"
        )
    return found


def is_pruned(args: ModelArgs, original: ModelArgs) -> bool:
    return args.n_routed_experts < original.n_routed_experts


def groups(args: ModelArgs, original: ModelArgs) -> list[str]:
    """Where fewer experts make other groups."""
    others = [key for key in KEYS[1:] if is_pruned(args, original) and getattr(args, key) != getattr(original, key)]
    return [
        f"config.json: {key} = {getattr(args, key)}, the original's says {getattr(original, key)}" for key in others
    ]


def lines(found: Numberings) -> list[str]:
    """What became of the original's experts: a few lines for any number of layers."""
    out = []
    for (kept, every, others), layers in _grouped(
        found, lambda n: (len(n.kept), len(n.order), len(n.strangers))
    ).items():
        moved = [i for i in layers if (np.diff(found[i].kept) < 0).any()]
        order = f"; in another order than the original's in {_layers(moved)}" if moved else ""
        more = f", and {others} that are not among them" if others else ""
        out.append(f"{_layers(layers)}: {kept} of {every} experts kept{more}{order}")
    dropped = _grouped(found, lambda n: tuple(n.dropped.tolist()))
    dropped.pop((), None)
    for numbers, layers in list(dropped.items())[:SHOWN]:
        text = stages.compact(numbers)
        text = text if len(text) <= WIDTH else f"{text[:WIDTH].rpartition(',')[0]}, ... ({len(numbers)})"
        out.append(f"dropped in {_layers(layers)}: {text}")
    if len(dropped) > SHOWN:
        rest = [i for layers in list(dropped.values())[SHOWN:] for i in layers]
        out.append(f"dropped in {_layers(rest)}: others, as many")
    return out


def strangers(found: Numberings) -> list[str]:
    """A line for each layer with rows that are like none of the original's."""
    out = []
    for layer, numbering in found.items():
        if numbering.strangers:
            rows = sorted(numbering.strangers)
            first = rows[0]
            out.append(
                f"model.layers.{layer}.{ROUTER}, row{'s' if rows[1:] else ''} {stages.compact(rows)}: expected rows of the "
                f"original's router, got {len(rows)} like none of them (row {first} is nearest to that of expert "
                f"{numbering.order[first]}, cosine {numbering.strangers[first]:.2f}): merged experts, or another model's"
            )
    return out


def _grouped(found: Numberings, by: Callable[[Numbering], tuple[int, ...]]) -> dict[tuple[int, ...], list[int]]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for layer, numbering in found.items():
        groups.setdefault(by(numbering), []).append(layer)
    return groups


def _layers(layers: Iterable[int]) -> str:
    layers = list(layers)
    return f"layer{'s' if layers[1:] else ''} {stages.compact(layers)}"
