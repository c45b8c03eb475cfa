"""Where bits are spent best: a recipe, bits of every module, within a budget.

Noise of b bits has a power of about 4^-b, and KL is of second order in it: of a component's KL, going from b to c bits leaves
4^(b - c). By that, and by what each costs alone at the build's own bits, the budget is spent, the best bargain first.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from glm_dsa.planning.formats import AFFINE, Format
from glm_dsa.text import parse_ranges
from glm_dsa.weights import AFFINE_BITS

from ..core import stages
from ..core.files import whole
from .build import Build, at, component_of, layer_of, stored_bytes

if TYPE_CHECKING:
    from .sensitivity import Sensitivity

STEPS = AFFINE_BITS
KEYS = ("group_size", "bits", "mode")
DTYPE = "bfloat16"  # of scales, and of what is not packed
GROUPS = (64, 32)
UNPACKED = ("indexer", "router")  # what a recipe never packs


@dataclass
class Recipe:
    """Bits of every module, and as a recipe's file: what `glm_dsa.planning.recipe` reads, and convert, plan and audit follow."""

    asked: float
    bits: float
    modules: dict[str, dict[str, Any] | bool]
    file: str = ""
    predicted: float = 0.0  # of the build's KL, as a share

    def text(self) -> str:
        """TOML: a rule for modules of one kind that are packed alike."""
        alike: dict[tuple[str, tuple[Any, ...]], list[int]] = defaultdict(list)
        for path, packing in self.modules.items():
            if isinstance(packing, dict):
                layer = layer_of(path)
                kind = path if layer is None else path.replace(f".{layer}.", ".*.", 1)
                alike[kind, tuple(packing[key] for key in KEYS)].append(-1 if layer is None else layer)
        out = [
            f'name = "{self.bits:.3f} bits a weight"',
            'purpose = "the least KL for its bytes, as python -m verify drift measured it"',
            f'dtype = "{DTYPE}"',
        ]
        for (kind, (group_size, bits, mode)), layers in alike.items():
            out += ["", "[[rule]]", f'tensors = "{kind}.weight"']
            if layers != [-1]:
                out.append(f'layers = "{stages.compact(layers)}"')
            out += [f"bits = {bits}", f"group_size = {group_size}", *([f'mode = "{mode}"'] if mode != AFFINE else [])]
        return "\n".join(out) + "\n"

    def write(self, file: Path) -> None:
        with whole(file) as part:
            part.write_text(self.text())
        self.file = str(file)


def _shares(found: Sensitivity, build: Build) -> dict[str, float]:
    """Of each module, its share of the KL: that of its component, divided among its layers as theirs say."""
    layered: dict[int, float] = {}
    for row in found.rows:
        if not row.modules and row.component == "layers":
            layers = parse_ranges(row.layers)
            layered |= dict.fromkeys(sorted(layers), row.alone / len(layers))
    mean = sum(layered.values()) / len(layered) if layered else 1.0
    shares: dict[str, float] = {}
    for row in found.rows:
        if row.modules:
            counts = {p: layered.get(layer_of(p) if layer_of(p) is not None else -1, mean) for p in row.modules}  # type: ignore[arg-type]
            total = sum(counts.values())
            shares |= {p: row.alone * c / total for p, c in counts.items()}
    return shares


def group_of(width: int) -> int:
    """The largest group that divides a row. (What is packed at all has one.)"""
    return next(g for g in GROUPS if width % g == 0)


def next_bit(found: Sensitivity, build: Build) -> str:
    """The component whose next step buys most KL for its bytes."""
    best, said = 0.0, ""
    for row in found.rows:
        if not row.modules:
            continue
        module = at(build.model, row.modules[0])
        own = getattr(module, "bits", 16)
        step = next((s for s in STEPS if s > own), None)
        added = row.parameters * ((step or 16) - own) / 8
        bought = row.alone * (1 - 4.0 ** (own - (step or 16))) / (added / 1e6)
        if bought > best:
            best, said = (
                bought,
                f"{row.component}: {own} -> {step or 16} bits, about KL {bought * added / 1e6:.2g} for {added / 1e6:.3g} MB",
            )
    return said


class Choice:
    """What a recipe can choose of a build, and what it cannot: known from its headers, before anything is read.

    sizes: {module: bytes at each of STEPS}. fixed: bytes of all else. (The MTP layer keeps its bits: no KL of the main model
    tells of its drafts.)
    """

    def __init__(self, build: Build) -> None:
        self.plain, self.packed = dict(build.whole.named_modules()), dict(build.model.named_modules())
        self.every = [p for p, m in self.plain.items() if not m.children() and p in self.packed]  # mostly without MTP
        self.weights = sum(a.size for p in self.every for a in self.plain[p].values() if isinstance(a, mx.array))
        layers = build.args.num_hidden_layers
        chosen = [p for p in build.paths if component_of(p) not in UNPACKED and (layer_of(p) or 0) < layers]
        self.fixed = sum(stored_bytes(self.packed[p]) for p in self.every if p not in set(chosen))
        self.sizes = {
            p: [Format(DTYPE, b, group_of(shape[-1])).nbytes(shape) for b in STEPS]
            for p in chosen
            for shape in (self.plain[p].weight.shape,)
        }

    @property
    def least(self) -> int:
        """Bytes with the fewest bits everywhere."""
        return self.fixed + sum(sizes[0] for sizes in self.sizes.values())

    def check(self, budget: float) -> None:
        """Raises ValueError where so many bits a weight are too few, or nothing can be chosen."""
        if not self.sizes:
            raise ValueError(f"--suggest-bits {budget:g}: nothing is packed that the original has unpacked")
        if self.least > budget * self.weights / 8:
            least, fixed = (math.ceil(8000 * n / self.weights) / 1000 for n in (self.least, self.fixed))
            raise ValueError(
                f"--suggest-bits {budget:g}: at least {least:.3f} are possible: {fixed:.3f} are taken by what stays as it is "
                f"(unpacked parts, the MTP layer), the rest by all others in {STEPS[0]} bits"
            )


def recipe(found: Sensitivity, build: Build, budget: float) -> Recipe:
    """Bits of every module, within `budget` bits a weight of the whole model. Raises ValueError where that is too little."""
    choice = Choice(build)
    choice.check(budget)
    plain, packed, every, weights = choice.plain, choice.packed, choice.every, choice.weights
    shares, sizes = _shares(found, build), choice.sizes
    chosen = dict.fromkeys(sizes, STEPS[0])
    spent, most = choice.least, budget * weights / 8
    own = {p: getattr(packed[p], "bits", 16) for p in chosen}

    def kl(path: str, bits: int) -> float:
        return shares.get(path, 0.0) * 4.0 ** (own[path] - bits)

    while True:
        offers = []
        for path, bits in chosen.items():
            step = STEPS.index(bits)
            for later in range(step + 1, len(STEPS)):
                cost = sizes[path][later] - sizes[path][step]
                if spent + cost <= most:
                    offers.append(((kl(path, bits) - kl(path, STEPS[later])) / cost, path, STEPS[later], cost))
        if not offers:
            break
        _, path, bits, cost = max(offers)
        chosen[path], spent = bits, spent + cost
    modules: dict[str, dict[str, Any] | bool] = {
        p: {"group_size": group_of(plain[p].weight.shape[-1]), "bits": b, "mode": "affine"} for p, b in chosen.items()
    }
    for path in (p for p in every if p not in chosen and hasattr(plain[p], "to_quantized")):
        own_packing = {k: getattr(packed[path], k, None) for k in KEYS}
        modules[path] = own_packing if path in build.paths else False
    before = sum(kl(p, own[p]) for p in chosen)
    return Recipe(budget, 8 * spent / weights, modules, predicted=sum(kl(p, b) for p, b in chosen.items()) / before)
