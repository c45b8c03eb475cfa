"""What the bits of a packed build buy: KL that goes away where a component, or a group of layers, is given its weights back;
and where the next bits are spent best.

Noise of b bits has a power of about 4^-b, and KL is of second order in it: of a component's KL, going from b to c bits leaves
4^(b - c). By that, and by what was measured at the build's own bits, `recipe` spends a budget, the best bargain first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from glm_dsa import ModelArgs, checkpoint
from glm_dsa.model import Model

from .. import compare, stages
from .sides import Side

Array = np.ndarray
STEPS = (2, 3, 4, 5, 6, 8)  # bits that mlx packs to
GROUPS = (64, 32)
UNPACKED = ("indexer", "router")  # what a recipe never packs
FULL_BYTES = 2  # of a weight that is not packed: 16 bit
COMPONENTS: tuple[tuple[str, tuple[str, ...]], ...] = (  # by the end of a module's path
    ("indexer", (".indexer.wq_b", ".indexer.wk", ".indexer.weights_proj")),
    ("router", (".mlp.gate",)),
    ("embedding", ("embed_tokens",)),
    ("head", ("lm_head", "shared_head.head")),
    ("query down-projection", (".q_a_proj",)),
    ("query up-projection", (".q_b_proj",)),
    ("KV down-projection", (".kv_a_proj_with_mqa",)),
    ("keys from the latent", (".embed_q",)),
    ("values from the latent", (".unembed_out",)),
    ("attention output", (".o_proj",)),
    ("shared experts", (".shared_experts.gate_proj", ".shared_experts.up_proj", ".shared_experts.down_proj")),
    ("routed experts, gate and up", (".switch_mlp.gate_proj", ".switch_mlp.up_proj")),
    ("routed experts, down", (".switch_mlp.down_proj",)),
    ("dense feed-forward", (".mlp.gate_proj", ".mlp.up_proj", ".mlp.down_proj")),
    ("MTP join", (".eh_proj",)),
)
LAYER_GROUPS = 8  # into which layers are divided, at most


def component_of(path: str) -> str | None:
    return next((name for name, ends in COMPONENTS if any(f".{path}".endswith(end) for end in ends)), None)


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
class Recipe:
    """Bits of every module: what mlx-lm's config.json says under "quantization", and what its convert takes as a predicate."""

    asked: float
    bits: float
    modules: dict[str, dict[str, Any] | bool]
    file: str = ""
    predicted: float = 0.0  # of the build's KL, as a share

    def write(self, file: Path) -> None:
        packed = [m for m in self.modules.values() if isinstance(m, dict)]
        sizes, all_bits = [m["group_size"] for m in packed], [m["bits"] for m in packed]
        usual = max(set(all_bits), key=all_bits.count)
        whole = {"group_size": min(sizes), "bits": usual, "mode": "affine", **self.modules}
        part = file.with_name(f".{file.name}.{os.getpid()}.part")
        part.write_text(json.dumps(whole, indent=1) + "\n")
        os.replace(part, file)
        self.file = str(file)


@dataclass
class Sensitivity:
    """kl: of the build as it is. next: the bits that are spent best."""

    kl: float
    rows: list[Row]
    bits: float
    next: str = ""
    recipe: Recipe | None = None

    def title(self) -> str:
        best = max((r for r in self.rows if r.modules), key=lambda r: r.alone, default=None)
        most = f": most of it by {best.component}, {best.alone:.2g} alone" if best else ""
        return f"Quantization to {self.bits:.3f} bits costs KL {self.kl:.3g}{most}"

    def lines(self) -> list[str]:
        out = [f"next bit: {self.next}"] if self.next else []
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
        widths = [max(len(row[i]) for row in out) for i in range(len(out[0]))]
        places = [str.ljust if i < 2 else str.rjust for i in range(len(widths))]
        return ["  ".join(p(c, w) for p, c, w in zip(places, row, widths, strict=True)).rstrip() for row in out]

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


class Build:
    """A packed build and what it was packed from, both in memory, whose modules can be exchanged."""

    def __init__(self, packed: Side, original: Side) -> None:
        self.model, _ = checkpoint.assemble(packed.folder, mx.float32, **packed.overrides)
        self.whole, _ = checkpoint.assemble(original.folder, mx.float32, **original.overrides)
        for model in (self.model, self.whole):
            model.set_dtype(mx.float32)
        self.args: ModelArgs = self.model.args
        modules, plain = dict(self.model.named_modules()), dict(self.whole.named_modules())
        self.paths = {p: c for p in modules if p in plain and (c := component_of(p)) and _differ(modules[p], plain[p])}

    def logits(self, tokens: Array, restored: Iterable[str] = ()) -> Array:
        """[S, V], with the modules of these paths unpacked."""
        with exchanged(self.model, self.whole, restored):
            logits = self.model(mx.array(tokens))
            mx.eval(logits)
            return np.array(logits[0].astype(mx.float32))

    def alone(self, tokens: Array, packed: Iterable[str]) -> Array:
        """[S, V], of the original, with the modules of these paths packed."""
        with exchanged(self.whole, self.model, packed):
            logits = self.whole(mx.array(tokens))
            mx.eval(logits)
            return np.array(logits[0].astype(mx.float32))

    def size(self, path: str) -> tuple[int, int]:
        """(weights, bytes as stored)."""
        module = dict(self.model.named_modules())[path]
        plain = dict(self.whole.named_modules())[path]
        return plain.weight.size, _stored_bytes(module)

    def bits(self) -> float:
        """A weight, of all that is stored, the MTP layer included."""
        every = [(p, m) for p, m in self.model.named_modules() if not m.children()]
        plain = dict(self.whole.named_modules())
        weights = sum(a.size for p, _ in every for a in plain[p].values() if isinstance(a, mx.array))
        return 8 * sum(_stored_bytes(m) for _, m in every) / weights


def _differ(packed: nn.Module, plain: nn.Module) -> bool:
    return "scales" in packed and "scales" not in plain


def _stored_bytes(module: nn.Module) -> int:
    """Packed: as they are; else in 16 bit, but what is float32 in every build."""
    if "scales" in module:
        of_scales = 2 * sum(module[n].size for n in ("scales", "biases") if n in module)
        return int(module["weight"].nbytes + of_scales)
    arrays = [(n, a) for n, a in module.items() if isinstance(a, mx.array)]
    return sum(a.size * (4 if n == "e_score_correction_bias" else FULL_BYTES) for n, a in arrays)


class exchanged:
    """One model's modules in another's, for a while."""

    def __init__(self, model: Model, other: Model, paths: Iterable[str]) -> None:
        self.model, self.other, self.paths = model, other, list(paths)

    def __enter__(self) -> None:
        self.own = {path: _put(self.model, path, _at(self.other, path)) for path in self.paths}

    def __exit__(self, *error: object) -> None:
        for path, module in self.own.items():
            _put(self.model, path, module)


def _at(model: Any, path: str) -> Any:
    for part in path.split("."):
        model = model[int(part)] if isinstance(model, list) else getattr(model, part)
    return model


def _put(model: Any, path: str, module: Any) -> Any:
    parent, _, name = path.rpartition(".")
    holder = _at(model, parent) if parent else model
    before = getattr(holder, name)
    setattr(holder, name, module)
    return before


def measure(
    packed: Side, original: Side, tokens: Array, due: Array, tell: Callable[[str], None] = lambda _: None
) -> Sensitivity | None:
    """due: the original's logits [S, V]. None where nothing is packed that the original has unpacked."""
    build = Build(packed, original)
    if not build.paths:
        return None
    kl = compare.distributions(build.logits(tokens), due).kl_mean
    rows = []
    for name, layers, paths in groups(build):
        tell(f"restored: {name} {layers}".strip())
        left, alone = (compare.distributions(run(tokens, paths), due).kl_mean for run in (build.logits, build.alone))
        sizes = [build.size(path) for path in paths]
        weights, stored = sum(w for w, _ in sizes), sum(b for _, b in sizes)
        modules = tuple(paths) if name != "layers" else ()
        rows.append(Row(name, layers, weights, 8 * stored / weights, stored, left, 1 - left / kl if kl else 0.0, alone,
                        FULL_BYTES * weights - stored, modules))  # fmt: skip
    found = Sensitivity(kl, rows, build.bits())
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


def layer_of(path: str) -> int | None:
    return stages.layer_of(path.removeprefix("model.") + ".")


# -- where to spend


def _shares(found: Sensitivity, build: Build) -> dict[str, float]:
    """Of each module, its share of the KL: that of its component, divided among its layers as theirs say."""
    layered: dict[int, float] = {}
    for row in found.rows:
        if not row.modules and row.component == "layers":
            for layer in _layers(row.layers):
                layered[layer] = row.alone / len(_layers(row.layers))
    mean = sum(layered.values()) / len(layered) if layered else 1.0
    shares: dict[str, float] = {}
    for row in found.rows:
        if row.modules:
            counts = {p: layered.get(layer_of(p) if layer_of(p) is not None else -1, mean) for p in row.modules}  # type: ignore[arg-type]
            whole = sum(counts.values())
            shares |= {p: row.alone * c / whole for p, c in counts.items()}
    return shares


def _layers(text: str) -> list[int]:
    out: list[int] = []
    for part in text.split(", "):
        first, _, last = part.partition("-")
        out += range(int(first), int(last or first) + 1)
    return out


def packed_bytes(shape: Sequence[int], bits: int, group: int) -> int:
    """Words, and a scale and a bias in 16 bit for each group."""
    weights = int(np.prod(shape))
    return weights * bits // 8 + weights // group * 4


def group_of(width: int) -> int:
    """The largest group that divides a row. (What is packed at all has one.)"""
    return next(g for g in GROUPS if width % g == 0)


def next_bit(found: Sensitivity, build: Build) -> str:
    """The component whose next step buys most KL for its bytes."""
    best, said = 0.0, ""
    for row in found.rows:
        if not row.modules:
            continue
        module = _at(build.model, row.modules[0])
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


def recipe(found: Sensitivity, build: Build, budget: float) -> Recipe:
    """Bits of every module, within `budget` bits a weight of the whole model. Raises ValueError where that is too little."""
    plain, packed = dict(build.whole.named_modules()), dict(build.model.named_modules())
    shares = _shares(found, build)
    every = [p for p, m in plain.items() if not m.children()]
    weights = sum(a.size for p in every for a in plain[p].values() if isinstance(a, mx.array))
    layers = build.args.num_hidden_layers
    # The MTP layer keeps its bits: no KL of the main model tells of its drafts.
    chosen = {p: STEPS[0] for p in build.paths if component_of(p) not in UNPACKED and (layer_of(p) or 0) < layers}
    fixed = sum(_stored_bytes(packed[p]) for p in every if p not in chosen)
    sizes = {
        p: [packed_bytes(plain[p].weight.shape, b, group_of(plain[p].weight.shape[-1])) for b in STEPS] for p in chosen
    }
    spent, most = fixed + sum(s[0] for s in sizes.values()), budget * weights / 8
    if spent > most:
        raise ValueError(
            f"--suggest-bits {budget:g}: all that can be packed in {STEPS[0]} bits takes {8 * spent / weights:.3f} already "
            "(what the build has unpacked stays so, and its MTP layer as it is)"
        )
    own = {p: getattr(packed[p], "bits", 16) for p in chosen}

    def kl(path: str, bits: int) -> float:
        return shares.get(path, 0.0) * 4.0 ** (own[path] - bits)

    while True:
        offers = []
        for path, bits in chosen.items():
            at = STEPS.index(bits)
            for later in range(at + 1, len(STEPS)):
                cost = sizes[path][later] - sizes[path][at]
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
        own_packing = {k: getattr(packed[path], k, None) for k in ("group_size", "bits", "mode")}
        modules[path] = own_packing if path in build.paths else False
    before = sum(kl(p, own[p]) for p in chosen)
    return Recipe(budget, 8 * spent / weights, modules, predicted=sum(kl(p, b) for p, b in chosen.items()) / before)


def convert_arguments(file: str | Path) -> dict[str, Any]:
    """A recipe's file as mlx-lm's convert takes it: `mlx_lm.convert("hf", "mlx", **convert_arguments("recipe.json"))`.

    (It asks for the recipe's smallest group: mlx-lm leaves alone whatever the group that it is told does not divide.)
    """
    recipe: dict[str, Any] = json.loads(Path(file).read_text())

    def of_module(path: str, module: Any, *_: Any) -> bool | dict[str, Any]:
        said = recipe.get(path, False)
        return dict(said) if isinstance(said, dict) else bool(said)

    return {
        "quantize": True,
        "q_group_size": recipe["group_size"],
        "q_bits": recipe["bits"],
        "quant_predicate": of_module,
    }
