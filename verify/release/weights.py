"""Are these the original's weights, but for rounding? And what weights alone tell, where there is no original.

Against an original each matrix is compared in the units of its own format, group by group, so that one damaged scale among
millions shows; what differs wholly is looked for elsewhere in the original: swapped experts, swapped layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch

from glm_dsa.storage import Stored
from glm_dsa.weights import LAYER, PROJECTIONS
from reference.packed import Packing
from reference.stored import read_tensors

from ..core.findings import FAULT, WARNING, Finding, ranges
from ..engines import pruning
from ..engines.base import Weights
from ..engines.pruning import Numberings
from .gaps import Gap, gap
from .rounding import Form

SAME = 0.9  # correlation of what is the same but for rounding
WIDE = 4096  # values that stand for a matrix where it is looked for
ROWS = 8192  # of embedding and head at once
FEW = 4  # damaged tensors of a layer that are told one by one
FAR_SCALE = 64.0  # times the median of its matrix's scales
FAR_RMS, FAR_SPREAD = (
    1.5,
    8.0,
)  # times its siblings' median, and so many standard deviations (by the median one) of their logs


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(x.flatten(), y.flatten(), dim=0))


class Weighing:
    """The weights of a release, as its layers come. findings: {layer: [Finding]}."""

    def __init__(
        self,
        stored: Mapping[str, Stored],
        mine: read_tensors,
        theirs: read_tensors | None,
        layers: int,
        numberings: Numberings | None = None,
    ) -> None:
        """numberings: of the layers whose experts are not the original's, in its order."""
        self.stored, self.mine, self.theirs, self.layers = stored, mine, theirs, layers
        self.numberings = numberings or {}
        self._begin()

    def _begin(self) -> None:
        self.rms: dict[int, list[float]] = {}  # of an expert's projections
        self.gaps: dict[int, dict[str, Gap]] = defaultdict(dict)  # of experts that differ
        self.faces: dict[int, torch.Tensor] = {}  # of experts: what stands for them
        self.their_faces: dict[int, torch.Tensor] = {}  # of the original's, by its numbers
        self.far: list[str] = []

    # -- experts, a chunk at a time

    def experts(self, layer: int, first: int, mine: Weights | None, theirs: Weights | None) -> None:
        """theirs: those that belong beside; mine: None where the release has dropped them."""
        for i in range(len(theirs[1]) if theirs is not None else 0):
            face = _projections(theirs, i)[0][0, :WIDE].clone()  # type: ignore[arg-type]
            self.their_faces[self._number(layer, first + i)] = face
        strangers = self.numberings[layer].strangers if layer in self.numberings else {}
        for i in range(len(mine[1]) if mine is not None else 0):
            expert, own = first + i, _projections(mine, i)  # type: ignore[arg-type]
            other = _projections(theirs, i) if theirs is not None and expert not in strangers else None
            self.rms[expert] = [float(m.norm()) / m.numel() ** 0.5 for m in own]
            self.faces[expert] = own[0][0, :WIDE].clone()
            for j, projection in enumerate(PROJECTIONS):
                name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"
                packed = self.mine.packing(name)
                self._scales(name, packed)
                if other is not None:
                    found = gap(own[j], other[j], self._form(name, packed))
                    if found.is_fault:
                        self.gaps[expert][projection] = found

    def _form(self, name: str, packed: tuple[Packing, torch.Tensor] | None) -> Form:
        dtype = self.stored[self.mine.place(name)[0]].dtype
        return Form(dtype) if packed is None else Form(dtype, packed[0], packed[1].dtype)

    def _scales(self, name: str, packed: tuple[Packing, torch.Tensor] | None) -> None:
        if packed is None or packed[0].mode != "affine":
            return
        scales = packed[1].float().abs()
        median, most = float(scales.median()), float(scales.max())
        if not most <= FAR_SCALE * median:
            at = [int(i) for i in np.unravel_index(int(scales.argmax()), scales.shape)]
            times = most / median if median else np.inf
            path = name.removesuffix(".weight")
            self.far.append(f"{path}: the scale of group {at} is {times:.3g} times the median of its matrix")

    # -- a layer, when its experts have passed

    def layer(self, layer: int) -> list[Finding]:
        """What is to be said of its weights. Resets what was kept of its experts."""
        findings = [*self._strangers(layer), *self._own(layer), *self._of_experts(layer)]
        findings += [Finding(WARNING, what) for what in self.far]
        self._begin()
        return findings

    def top(self) -> list[Finding]:
        """Embedding, last norm, head."""
        names = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
        return list(self._each(name for name in names if name in self.mine))

    def _strangers(self, layer: int) -> Iterator[Finding]:
        """Of a pruned build: rows of the router that are none of the original's, and whose weights stand behind them."""
        if (numbering := self.numberings.get(layer)) is None:
            return
        for what in pruning.strangers({layer: numbering}):
            yield Finding(FAULT, what)
        known = {j: e for j in sorted(numbering.strangers) if (e := self._in_layer(self.faces[j])) is not None}
        if known:
            pairs = _listed(f"{j} (the original's expert {e})" for j, e in known.items())
            yield Finding(
                FAULT, f"model.layers.{layer}.mlp.experts: known by their weights, not by those rows: {pairs}"
            )

    def _in_layer(self, face: torch.Tensor, but: int | None = None) -> int | None:
        """The original's number of an expert, `but` this one, that has this face, in the layer at hand."""
        found = (e for e, theirs in self.their_faces.items() if e != but and correlation(face, theirs) > SAME)
        return next(found, None)

    def _number(self, layer: int, expert: int) -> int:
        """What the original calls it."""
        numbering = self.numberings.get(layer)
        return expert if numbering is None else int(numbering.order[expert])

    def _own(self, layer: int) -> Iterator[Finding]:
        prefix = f"model.layers.{layer}."
        names = (
            n
            for n in self.stored
            if n.startswith(prefix) and n.rpartition(".")[2] in ("weight", "bias", "e_score_correction_bias")
        )
        yield from self._each(n for n in names if ".experts." not in n and ".switch_mlp." not in n)

    def _each(self, names: Iterable[str]) -> Iterator[Finding]:
        elsewhere: dict[int, list[str]] = defaultdict(list)
        absent, gaps = list[str](), dict[str, Gap]()
        for name in names:
            packed = self.mine.packing(name) if name.endswith(".weight") else None
            self._scales(name, packed)
            for rows in self._slices(name):
                mine = self.mine(name, torch.float32, rows)
                if not mine.isfinite().all():
                    yield Finding(FAULT, f"{name} holds NaN or infinity")
                elif mine.dim() > 1 and not mine.any():
                    yield Finding(FAULT, f"{name} is zero throughout")
                elif self.theirs is not None:
                    if name not in self.theirs:
                        absent.append(name)
                        break
                    theirs = self._beside(name, mine, self.theirs(name, torch.float32, rows))
                    if not theirs.isfinite().all():
                        yield Finding(FAULT, f"{name} of the original holds NaN or infinity: nothing is told by it")
                        continue
                    found = gap(mine, theirs, self._form(name, packed))
                    found = found if rows is None else replace(found.moved(rows.start), ids="token ids ")
                    match = self._layer_of(name, mine) if found.is_other else None
                    if match is not None:
                        elsewhere[match].append(name)
                    else:
                        gaps[name] = found if name not in gaps else gaps[name].joined(found)
        gaps = {name: found for name, found in gaps.items() if found.is_fault}
        yield from _told({name.removesuffix(".weight"): g for name, g in gaps.items()})
        if absent:
            yield Finding(FAULT, f"{_some(absent)}: the original has no such tensor")
        for other, found_there in elsewhere.items():
            yield Finding(FAULT, f"{_some(found_there)}: what the original has in layer {other}")

    def _beside(self, name: str, mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        """Of the original's router the rows of the experts that are there; in the place of what is told by itself, mine."""
        match = LAYER.fullmatch(name)
        numbering = self.numberings.get(int(match[1])) if match else None
        if numbering is None or not name.endswith((pruning.ROUTER, pruning.BIAS)):
            return theirs
        theirs = theirs[torch.from_numpy(numbering.own)]
        alone = sorted(numbering.strangers)
        theirs[alone] = mine[alone]
        return theirs

    def _slices(self, name: str) -> Iterator[slice | None]:
        """Embedding and head come in slices of rows: they are as large as a layer."""
        if "layers." in name or len(self.stored[name].shape) < 2:
            yield None
            return
        count = self.stored[name].shape[0]
        yield from (slice(start, min(start + ROWS, count)) for start in range(0, count, ROWS))

    def _layer_of(self, name: str, mine: torch.Tensor) -> int | None:
        """The layer of the original in which this tensor is found, if it is another than its own."""
        assert self.theirs is not None
        if ".layers." not in name:
            return None
        _, _, own, rest = name.split(".", 3)
        for layer in range(self.layers):
            other = f"model.layers.{layer}.{rest}"
            if layer == int(own) or other not in self.theirs:
                continue
            if mine.dim() == 1:
                theirs = self.theirs(other, torch.float32)
                if theirs.shape == mine.shape and not gap(mine, theirs, Form(self.stored[name].dtype)).beyond:
                    return layer
            else:
                theirs = self.theirs(other, torch.float32, slice(0, 1))[0, ..., :WIDE]
                if theirs.shape == mine[0, ..., :WIDE].shape and correlation(mine[0, ..., :WIDE], theirs) > SAME:
                    return layer
        return None

    def _of_experts(self, layer: int) -> Iterator[Finding]:
        prefix = f"model.layers.{layer}.mlp.experts"
        broken = {e for e, rms in self.rms.items() if not np.isfinite(rms).all()}
        for expert in sorted(broken):
            yield Finding(FAULT, f"{prefix}.{expert} holds NaN or infinity")
        for expert, rms in self.rms.items():
            for projection, r in zip(PROJECTIONS, rms, strict=True):
                if r == 0:
                    yield Finding(FAULT, f"{prefix}.{expert}.{projection} is zero throughout")
        yield from self._twins(prefix)
        if self.theirs is None:
            yield from self._outliers(prefix)
        others, partly = defaultdict(list), dict[str, Gap]()
        moved: dict[int, int] = {}
        for expert, gaps in self.gaps.items():
            if len(gaps) == len(PROJECTIONS) and all(g.is_other for g in gaps.values()):
                if (found := self._in_layer(self.faces[expert], self._number(layer, expert))) is not None:
                    moved[expert] = found
                else:
                    others[self._found_at(layer, expert)].append(expert)
            else:
                meant = self._meant(layer, [expert])
                partly |= {f"{prefix}.{expert}.{projection}{meant}": found for projection, found in gaps.items()}
        yield from _told(partly)
        yield from self._moved(layer, moved)
        for place, experts in others.items():
            yield Finding(FAULT, f"{prefix}.{ranges(sorted(experts))}{self._meant(layer, experts)}: {place}")

    def _moved(self, layer: int, moved: Mapping[int, int]) -> Iterator[Finding]:
        """{expert: the original's whose weights it has}: a line for each, or for all where there are many."""
        prefix = f"model.layers.{layer}.mlp.experts"
        if len(moved) <= FEW:
            for expert, place in moved.items():
                meant = self._meant(layer, [expert])
                yield Finding(FAULT, f"{prefix}.{expert}{meant}: what the original has in expert {place} of this layer")
            return
        pairs = _listed(f"{expert}{self._meant(layer, [expert])} has its {place}" for expert, place in moved.items())
        yield Finding(FAULT, f"{prefix}: {len(moved)} experts are others of the original's in this layer: {pairs}")

    def _meant(self, layer: int, experts: list[int]) -> str:
        """Which of the original's these are by their router rows, where numbers say otherwise."""
        if layer not in self.numberings:
            return ""
        numbers = ranges(sorted(self._number(layer, e) for e in experts))
        return f" (by the router the original's {numbers})"

    def _found_at(self, layer: int, expert: int) -> str:
        assert self.theirs is not None
        face = self.faces[expert]
        for other in range(self.layers):
            name = f"model.layers.{other}.mlp.experts.{self._number(layer, expert)}.gate_proj.weight"
            if other != layer and name in self.theirs:
                theirs = self.theirs(name, torch.float32, slice(0, 1))[0, :WIDE]
                if correlation(face, theirs) > SAME:
                    return f"what the original has in layer {other}"
        return (
            "other weights than the original's, and not found elsewhere in it: scaled, fine-tuned, or of another model?"
        )

    def _twins(self, prefix: str) -> Iterator[Finding]:
        same = defaultdict(list)
        for expert, face in self.faces.items():
            same[(tuple(self.rms[expert]), face.numpy().tobytes())].append(expert)
        for experts in same.values():
            if len(experts) > 1 and any(self.rms[experts[0]]):
                yield Finding(FAULT, f"{prefix}.{','.join(map(str, experts))} hold the same weights")

    def _outliers(self, prefix: str) -> Iterator[Finding]:
        for j, projection in enumerate(PROJECTIONS):
            logs = {e: np.log(rms[j]) for e, rms in self.rms.items() if 0 < rms[j] < np.inf}
            median = np.median([*logs.values()]) if logs else 0.0
            spread = 1.4826 * np.median([abs(x - median) for x in logs.values()]) if logs else 0.0
            for expert, log in logs.items():
                if abs(log - median) > max(np.log(FAR_RMS), FAR_SPREAD * spread):
                    times = f"{np.exp(log - median):.3g} times the median of its siblings"
                    yield Finding(WARNING, f"{prefix}.{expert}.{projection}: rms {times}")


def _told(gaps: Mapping[str, Gap]) -> Iterator[Finding]:
    """A line for each, or for all where there are many: then it is no damage in a place."""
    if len(gaps) <= FEW:
        yield from (Finding(FAULT, f"{name}: {found}") for name, found in gaps.items())
        return
    worst = max(gaps, key=lambda name: gaps[name].relative)
    yield Finding(
        FAULT,
        f"{len(gaps)} matrices differ by more than rounding: other weights than the original's (made from the FP8 release: "
        f"give that as --original; fine-tuned, AWQ or DWQ, scaled, of another model)? Furthest {worst}: {gaps[worst]}",
    )


def _listed(texts: Iterable[str]) -> str:
    """The first few."""
    every = list(texts)
    return ", ".join(every[:FEW]) + (f", ... ({len(every)})" if every[FEW:] else "")


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]}, {names[1].split('.', 3)[-1]}, ... ({len(names)} tensors)"


def _projections(weights: Weights, i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gate, up = weights[0][i].chunk(2)
    return gate, up, weights[1][i]
