"""What the bits of a packed build buy: KL that goes away where a component, or a group of layers, is given its weights back,
and KL that comes where it alone is packed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from glm_dsa.text import table as aligned

from ..core import compare, stages
from .bit_allocation import Recipe, next_bit
from .build import FULL_BYTES, Build, layer_of

Array = np.ndarray
LAYER_GROUPS = 8  # into which layers are divided, at most


@dataclass(frozen=True)
class Row:
    """A component (in all layers) or a group of layers (`component` says so). bits: stored, scales and biases included, a
    weight. kl: the mean, in nats, when it is given its weights back; recovered: the share of the build's KL that went away;
    alone: the KL where nothing else is packed, in which no other's errors meet its own: the ranking is by that."""

    component: str
    layers: str
    parameters: int
    bits: float
    bytes: int
    kl: float
    recovered: float
    alone: float
    added_bytes: int
    modules: tuple[str, ...] = ()

    @property
    def per_mb(self) -> float:
        """KL that its weights buy, by a megabyte."""
        return self.alone / (self.added_bytes / 1e6) if self.added_bytes else 0.0


@dataclass
class Sensitivity:
    """kl: of the build as it is. next: the bits that are spent best."""

    kl: float
    rows: list[Row]
    bits: float
    rest: float = 0.0  # KL that stays when all that is packed is restored: of what differs besides
    next: str = ""
    recipe: Recipe | None = None

    def title(self) -> str:
        best = max((r for r in self.rows if r.modules), key=lambda r: r.alone, default=None)
        most = f": most of it by {best.component}, {best.alone:.2g} alone" if best else ""
        return f"Quantization to {self.bits:.3f} bits costs KL {self.kl:.3g}{most}"

    def lines(self) -> list[str]:
        out = [f"next bit: {self.next}"] if self.next else []
        if self.rest > 0.01 * self.kl:
            out.append(
                f"not by its bits alone: KL {self.rest:.3g} stays when all that is packed is given its weights back"
            )
        if self.recipe is not None:
            where = self.recipe.file or "the report"
            out.append(f"recipe of {self.recipe.bits:.3f} bits (asked: {self.recipe.asked:g}) in {where}, expected KL "
                       f"{self.recipe.predicted:.3g} times this build's")  # fmt: skip
        return out

    def table(self) -> list[str]:
        out = [("restored", "layers", "bits", "KL left", "recovered", "KL alone", "added MB", "KL a MB")]
        out += [
            (r.component, r.layers, f"{r.bits:.2f}", f"{r.kl:.3g}", f"{r.recovered:.1%}", f"{r.alone:.2g}",
             f"{r.added_bytes / 1e6:.3g}", f"{r.per_mb:.2g}")
            for r in sorted(self.rows, key=lambda r: -r.alone)
        ]  # fmt: skip
        return aligned(out, right=range(2, 8))

    def as_dict(self) -> dict[str, Any]:
        rows = [{**asdict(r), "modules": len(r.modules), "per_mb": r.per_mb} for r in self.rows]
        recipe = None
        if self.recipe is not None:
            listed = [
                {"module": m, "bits": b["bits"] if isinstance(b, dict) else 16} for m, b in self.recipe.modules.items()
            ]
            recipe = {
                "bits": self.recipe.bits,
                "file": self.recipe.file,
                "rows": listed,
                "text": " ".join(self.lines()),
            }
        return {"kl": self.kl, "rows": rows, "next": self.next, "recipe": recipe}


def measure(
    build: Build, tokens: Array, due: Array, tell: Callable[[str], None] = lambda _: None
) -> Sensitivity | None:
    """due: the original's logits [S, V]. None where nothing is packed that the original has unpacked."""
    if not build.paths:
        return None
    kl = compare.distributions(build.logits(tokens), due).kl_mean
    rows = []
    for name, layers, paths in groups(build):
        tell(f"restored: {name} {layers}".strip())
        if all((layer_of(p) or 0) >= build.args.num_hidden_layers for p in paths):
            left, alone = kl, 0.0  # of the MTP layer alone: the logits do not depend on it
        else:
            runs = (build.logits, build.alone)
            left, alone = (compare.distributions(run(tokens, paths), due).kl_mean for run in runs)
        sizes = [build.size(path) for path in paths]
        weights, stored = sum(w for w, _ in sizes), sum(b for _, b in sizes)
        modules = tuple(paths) if name != "layers" else ()
        rows.append(Row(name, layers, weights, 8 * stored / weights, stored, left, 1 - left / kl if kl else 0.0, alone,
                        FULL_BYTES * weights - stored, modules))  # fmt: skip
    found = Sensitivity(kl, rows, build.bits())
    found.rest = compare.distributions(build.logits(tokens, build.paths), due).kl_mean
    found.next = next_bit(found, build)
    return found


def groups(build: Build) -> list[tuple[str, str, list[str]]]:
    """(what, layers, paths): every component, and every group of layers."""
    components = list(dict.fromkeys(build.paths.values()))
    out = []
    for component in components:
        paths = [p for p, c in build.paths.items() if c == component]
        out.append((component, stages.compact({n for p in paths if (n := layer_of(p)) is not None}), paths))
    by_layer = sorted({n for p in build.paths if (n := layer_of(p)) is not None and n < build.args.num_hidden_layers})
    for part in np.array_split(by_layer, min(LAYER_GROUPS, len(by_layer))):
        paths = [p for p in build.paths if layer_of(p) in part]
        out.append(("layers", stages.compact(int(n) for n in part), paths))
    return out
