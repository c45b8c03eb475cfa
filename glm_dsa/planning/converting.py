"""A recipe followed: every tensor of a model in the dtype, or the bits, that it is to be kept in; and the MTP layer, or none."""

from __future__ import annotations

from collections import Counter
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from ..errors import GlmDsaError, RecipeError
from ..model import Model, parameters_of
from ..weights import module_inventory
from .formats import Format
from .recipe import Recipe


def keep_or_drop_mtp(model: Model, config: dict[str, Any], choice: str | None) -> str:
    """choice: "keep", "drop", or None: kept where it is there. Of a build without the layer, config names none: engines that
    are promised one make it of nothing. Returns a line for people, or "". Raises `GlmDsaError`."""
    if choice == "keep" and model.mtp is None:
        raise GlmDsaError("--mtp keep: expected an MTP layer that fits the model, got none; leave --mtp out")
    if choice == "drop":
        model.drop_mtp()
    if model.mtp is not None or not config.get("num_nextn_predict_layers"):
        return ""
    config["num_nextn_predict_layers"] = 0
    return "MTP layer: none in this build; its config.json says so (num_nextn_predict_layers = 0)"


class ByRecipe:
    """A recipe as mlx-lm's convert takes one: a predicate of modules."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.formats = recipe, dict[str, Format]()

    def prepare(self, model: Any) -> None:
        """Every tensor in the dtype that it is kept, or packed, in. Raises `RecipeError`."""
        if not isinstance(model, Model):
            raise RecipeError(f"{self.recipe.source}: recipes are for GLM-5.x and 4.7-Flash; this is another model")
        packed = next((name for name, module in model.named_modules() if "scales" in module), None)
        if packed is not None:
            raise RecipeError(
                f"{self.recipe.source}: {packed} is packed already; convert the original, or its bf16 build"
            )
        self.formats = self.recipe.formats(model.args, model.mtp is not None)
        parameters = parameters_of(model)
        cast = {name: parameters[name].astype(getattr(mx, kept.dtype)) for name, kept in self.formats.items()}
        for name, kept in self.formats.items():
            is_narrowed = kept.dtype == "float16" and not kept.is_packed and parameters[name].dtype != mx.float16
            if is_narrowed and (mx.isinf(cast[name]) & ~mx.isinf(parameters[name])).any().item():
                raise RecipeError(
                    f"{self.recipe.source}: {name} has values beyond float16 (65,504): keep it in bfloat16"
                )
        model.update(tree_unflatten(list(cast.items())))

    def __call__(self, path: str, module: Any) -> bool | dict[str, Any]:
        kept = self.formats[f"{path}.weight"]
        return kept.packing() if kept.is_packed else False

    def packings(self) -> list[Format]:
        return [kept for kept in self.formats.values() if kept.is_packed]

    def check(self, model: Any) -> None:
        """What was planned is what will be written, to the byte."""
        due = {
            s.name: self.formats[s.name].nbytes(s.shape) for s in module_inventory(model.args) if s.name in self.formats
        }
        found: Counter[str] = Counter()
        for name, value in parameters_of(model).items():
            path, _, part = name.rpartition(".")
            is_part = part in ("scales", "biases") and f"{path}.weight" in due
            found[f"{path}.weight" if is_part else name] += value.nbytes
        wrong = next((n for n in {**due, **found} if due.get(n) != found.get(n)), None)
        if wrong is not None:
            raise RecipeError(
                f"{self.recipe.source}: {wrong} takes {found.get(wrong)} bytes, {due.get(wrong)} were planned; nothing written"
            )
