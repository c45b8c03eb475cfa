"""Recipes: which tensor is kept how, in a few rules.

    name = "GLM-5.2, 3.5 bit"
    purpose = "GLM-5.2 at a long context in 512 GB"
    dtype = "bfloat16"              # what no rule names, and the scales of what is packed

    [[rule]]
    component = ["attention", "shared experts"]
    bits = 4                        # group_size = 64, mode = "affine"

    [[rule]]
    tensors = "*.self_attn.o_proj.weight"
    layers = "0-3,77"
    dtype = "float32"

A rule names tensors by component, by layer, by a pattern of their name in an MLX build (`*` matches dots too), or by several
of these, all of which must hold. The last rule that matches a tensor decides. A rule that packs passes by what cannot be
packed (norms, biases, the router) among what it names; one that finds nothing to act on is an error. The router's correction
bias is float32 always. Planning, converting and auditing follow the same `Recipe.formats`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..config import ModelArgs
from ..errors import RecipeError
from ..text import parse_ranges, ranges
from ..weights import LAYER, TensorSpec, module_inventory
from .components import COMPONENTS
from .formats import AFFINE, BYTES, Format, packed

KEPT = Path(__file__).parent / "recipes"
LARGEST, MOST_RULES = 1 << 20, 4096  # bytes of a recipe, and its rules
CORRECTION_BIAS = "e_score_correction_bias"


@dataclass(frozen=True)
class Rule:
    """number: from 1 on. components, layers: empty for any."""

    number: int
    components: tuple[str, ...]
    tensors: str
    layers: frozenset[int]
    format: Format

    def matches(self, spec: TensorSpec) -> bool:
        if self.components and not {spec.component, spec.part} & set(self.components):
            return False
        layer = LAYER.fullmatch(spec.name)
        if self.layers and (layer is None or int(layer[1]) not in self.layers):
            return False
        return fnmatchcase(spec.name, self.tensors)

    def acts_on(self, spec: TensorSpec) -> bool:
        """A packing rule passes by what cannot be packed; none changes the correction bias."""
        if spec.name.endswith(CORRECTION_BIAS):
            return False
        return spec.is_packable or not self.format.is_packed

    def __str__(self) -> str:
        layers = f"layers {ranges(sorted(self.layers), ', ')}" if self.layers else ""
        tensors = repr(self.tensors) if self.tensors != "*" else ""
        where = ", ".join(filter(None, (" and ".join(self.components), tensors, layers)))
        return f"rule {self.number} ({where or 'everything'}: {self.format})"


@dataclass(frozen=True)
class Recipe:
    source: str
    name: str
    purpose: str
    dtype: str
    rules: tuple[Rule, ...]

    def formats(self, args: ModelArgs, with_mtp: bool) -> dict[str, Format]:
        """{tensor of `module_inventory`: its format}. Raises `RecipeError`."""
        return {name: format for name, (format, _) in self.decided(args, with_mtp).items()}

    def decided(self, args: ModelArgs, with_mtp: bool) -> dict[str, tuple[Format, Rule | None]]:
        """As `formats`, with the rule that decided."""
        plain = Format(self.dtype)
        out: dict[str, tuple[Format, Rule | None]] = {}
        specs = [s for s in module_inventory(args) if with_mtp or s.component != "mtp"]
        layers = args.num_hidden_layers + args.num_nextn_predict_layers
        for rule in self.rules:
            self._check(rule, specs, layers)
        for spec in specs:
            deciding = next((r for r in reversed(self.rules) if r.matches(spec) and r.acts_on(spec)), None)
            kept = plain if deciding is None else deciding.format
            if spec.name.endswith(CORRECTION_BIAS):
                kept = Format("float32")
            if kept.is_packed and spec.shape[-1] % kept.group_size:
                raise RecipeError(
                    f"{self.source}: {deciding}: {spec.name} has rows of {spec.shape[-1]}, which groups of "
                    f"{kept.group_size} do not divide"
                )
            out[spec.name] = kept, deciding
        return out

    def _check(self, rule: Rule, specs: Sequence[TensorSpec], layers: int) -> None:
        """That the rule does something here, and something in each layer and to each component that it names. (A component
        that the model does not have, the MTP layer, say, is passed by.)"""
        matched = [s for s in specs if rule.matches(s)]
        if not matched:
            raise RecipeError(f"{self.source}: {rule} matches no tensor of this model")
        if rule.layers and max(rule.layers) >= layers:
            raise RecipeError(
                f"{self.source}: {rule}: layer {max(rule.layers)}; the last of this model is {layers - 1}"
            )
        for component in rule.components or ("",):
            own = [s for s in matched if component in ("", s.component, s.part)]
            if not own and any(component in (s.component, s.part) for s in specs):
                raise RecipeError(f"{self.source}: {rule}: of component {component} nothing matches")
            if own and not any(rule.acts_on(s) for s in own):
                why = "cannot be packed" if rule.format.is_packed else "is kept in float32, always"
                raise RecipeError(f"{self.source}: {rule}: {own[0].name} {why}; name what can be")


def load(source: str | Path) -> Recipe:
    """A recipe from a file, or by the name of one that is kept with this package. Raises `RecipeError`."""
    path = Path(source)
    if str(source) in kept():
        path = KEPT / f"{source}.toml"
    try:
        if not path.is_file():
            raise RecipeError(
                f"{source}: no recipe: expected the name of a .toml file, or of one that is kept ({', '.join(kept())})"
            )
        text = path.read_bytes()
        if len(text) > LARGEST:
            raise RecipeError(f"{source}: {len(text):,} bytes; a recipe has at most {LARGEST:,}")
        return parse(tomllib.loads(text.decode()), str(source))
    except OSError as error:
        raise RecipeError(f"{source}: {error.strerror or error}") from None
    except RecipeError:
        raise
    except (ValueError, RecursionError) as error:  # TOML's own; numbers of more digits than Python reads or writes
        raise RecipeError(f"{source}: not valid TOML ({error})") from None


def kept() -> list[str]:
    """Names of the recipes that come with this package."""
    return sorted(file.stem for file in KEPT.glob("*.toml"))


def parse(said: Mapping[str, Any], source: str) -> Recipe:
    """What a TOML file says -> `Recipe`. Raises `RecipeError`."""
    unknown = sorted(set(said) - {"name", "purpose", "dtype", "rule"})
    if unknown:
        raise RecipeError(f"{source}: unknown key {unknown[0]!r}; name, purpose, dtype and [[rule]] are known")
    for key in ("name", "purpose"):
        if not isinstance(said.get(key, ""), str):
            raise RecipeError(f"{source}: {key} = {said[key]!r}: expected a text")
    dtype = _dtype(said.get("dtype", "bfloat16"), source)
    rules = said.get("rule", [])
    if isinstance(rules, list) and len(rules) > MOST_RULES:
        raise RecipeError(f"{source}: {len(rules):,} rules; a recipe has at most {MOST_RULES:,}")
    if not isinstance(rules, list) or not rules or not all(isinstance(r, dict) for r in rules):
        raise RecipeError(f"{source}: no rules; each begins with a line [[rule]]")
    return Recipe(
        source, said.get("name", Path(source).stem), said.get("purpose", ""), dtype,
        tuple(_rule(rule, number, dtype, source) for number, rule in enumerate(rules, 1)),
    )  # fmt: skip


def _rule(said: Mapping[str, Any], number: int, dtype: str, source: str) -> Rule:
    where = f"{source}: rule {number}"
    unknown = sorted(set(said) - {"component", "tensors", "layers", "bits", "group_size", "mode", "dtype"})
    if unknown:
        raise RecipeError(
            f"{where}: unknown key {unknown[0]!r}; component, tensors and layers say what, bits, group_size, mode or dtype how"
        )
    packing = {key: said[key] for key in ("bits", "group_size", "mode") if key in said}
    if "dtype" in said and packing:
        raise RecipeError(
            f"{where}: dtype and {next(iter(packing))} conflict: packed or plain? (scales have the recipe's own dtype)"
        )
    if "dtype" in said:
        kept = Format(_dtype(said["dtype"], where))
    elif "bits" in packing or packing.get("mode", AFFINE) != AFFINE:
        try:
            kept = packed(dtype, packing.get("bits"), packing.get("group_size"), packing.get("mode"))
        except ValueError as error:
            raise RecipeError(f"{where}: {error}") from None
    else:
        raise RecipeError(f"{where}: expected bits (with group_size and mode, if need be) or dtype")
    if not {"component", "tensors", "layers"} & set(said):
        raise RecipeError(f'{where}: what is it for? expected component, tensors or layers (tensors = "*" for all)')
    tensors = said.get("tensors", "*")
    if not isinstance(tensors, str) or not tensors:
        raise RecipeError(f"{where}: tensors = {tensors!r}: expected a pattern of names, e.g. '*.o_proj.weight'")
    return Rule(number, _components(said.get("component"), where), tensors, _layers(said.get("layers"), where), kept)


def _components(said: Any, where: str) -> tuple[str, ...]:
    if said is None:
        return ()
    names = [said] if isinstance(said, str) else said
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise RecipeError(f"{where}: component = {said!r}: expected a name, or a list of names")
    for name in names:
        if name not in COMPONENTS:
            raise RecipeError(f"{where}: unknown component {name!r}; known are {', '.join(COMPONENTS)}")
    return tuple(names)


def _layers(said: Any, where: str) -> frozenset[int]:
    """ "0-3,77" or 77 -> {0, 1, 2, 3, 77}."""
    if said is None:
        return frozenset()
    text = str(said) if type(said) is int else said
    try:
        return frozenset(parse_ranges(text if isinstance(text, str) else ""))
    except ValueError as error:
        raise RecipeError(f"{where}: layers = {said!r}: {error}") from None


def _dtype(said: Any, where: str) -> str:
    if not isinstance(said, str) or said not in BYTES:
        raise RecipeError(f"{where}: dtype = {said!r}: expected one of {', '.join(BYTES)}")
    return said
