"""mlx-lm's convert: recipes, the MTP layer, and what is packed by default."""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx.utils import tree_unflatten

from ..errors import GlmDsaError, RecipeError
from ..linear import QuantizedMultiLinear, QuantizedSwitchLinear
from ..model import Model
from ..planning.converting import ByRecipe, keep_or_drop_mtp
from ..planning.formats import AFFINE
from ..planning.recipe import load as load_recipe

MTP = ("keep", "drop")
AS_THEY_COME = "as they come"  # no dtype that mlx-lm's convert knows, and so none that it casts to

log = logging.getLogger("glm_dsa")


def dequantize_model(original: Callable[[Any], Any], model: Any) -> Any:
    """mlx-lm unpacks its own classes only, and would save a model that is packed in parts, under a config that says not."""
    packed = (QuantizedMultiLinear, QuantizedSwitchLinear)
    ours = [(name, m.dequantized()) for name, m in model.named_modules() if isinstance(m, packed)]
    if ours:
        model.update_modules(tree_unflatten(ours))
    return original(model)


def convert(
    original: Callable[..., Any],
    *args: Any,
    recipe: str | Path | None = None,
    mtp: str | None = None,
    **kwargs: Any,
) -> Any:
    """mlx-lm's convert, which takes besides a recipe (a file, or the name of one that comes with this package), and mtp="keep"
    or "drop" (by default the MTP layer is kept where it can be). Nothing half-written is left behind."""
    if mtp not in (None, *MTP):
        raise GlmDsaError(f"mtp = {mtp!r}: expected {' or '.join(MTP)}")
    target = Path(inspect.signature(original).bind(*args, **kwargs).arguments.get("mlx_path", "mlx_model"))
    was_there = target.exists() or target.is_symlink()
    module: Any = importlib.import_module("mlx_lm.convert")
    load = functools.partial(_load_to_convert, module.load, mtp)
    try:
        with replaced(module, "load", load):
            return _convert_by(original, recipe, args, kwargs)
    except BaseException:
        if not was_there and not (target / "config.json").exists():  # which follows the weights: an upload may fail
            shutil.rmtree(target, ignore_errors=True)
        raise


def _load_to_convert(original: Callable[..., Any], mtp: str | None, *args: Any, **kwargs: Any) -> Any:
    model, tokenizer, config = original(*args, **kwargs)
    if isinstance(model, Model) and (line := keep_or_drop_mtp(model, config, mtp)):
        log.info("%s", line)
    return model, tokenizer, config


def _convert_by(original: Callable[..., Any], recipe: str | Path | None, args: Any, kwargs: dict[str, Any]) -> Any:
    if recipe is None:
        return original(*args, **kwargs)
    predicate = ByRecipe(load_recipe(recipe))
    said = inspect.signature(original).bind(*args, **kwargs).arguments
    for option in ("q_bits", "q_group_size", "quant_predicate", "dtype", "dequantize"):
        if said.get(option):
            raise RecipeError(f"--recipe and --{option.replace('_', '-')} conflict: a recipe says all of it")
    if said.get("q_mode", AFFINE) != AFFINE:
        raise RecipeError("--recipe and --q-mode conflict: a recipe says all of it")
    # No dtype of mlx-lm's: it would round all to it first, and what a rule keeps in more bits with it.
    chosen = {"quantize": True, "quant_predicate": predicate, "dtype": AS_THEY_COME}
    return original(*args, **kwargs | chosen)


def quantize_model(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """By a recipe, where there is one. Says so where a predicate packs the indexer: it may be asked for, but is no default."""
    by = kwargs.get("quant_predicate")
    if isinstance(by, ByRecipe):
        by.prepare(model)
        config = {k: v for k, v in args[0].items() if k not in ("quantization", "quantization_config")}
        config |= {key: by.recipe.dtype for key in ("dtype", "torch_dtype") if key in config}
        if not by.packings():
            return model, config
        # mlx-lm leaves alone whatever the group that it is told does not divide
        least = min(by.packings(), key=lambda kept: kept.group_size)
        model, config = original(model, config, least.group_size, least.bits, mode=least.mode, quant_predicate=by)
        by.check(model)
        return model, config
    _refuse_packed(model)
    model, config = original(model, *args, **kwargs)
    if isinstance(model, Model) and not any("scales" in module for _, module in model.named_modules()):
        raise GlmDsaError("nothing was quantized: no width of this model is divided by the group size asked for")
    if packed := _packed_indexers(model):
        log.warning(
            "%d modules of the indexer are quantized now (%s, ...): it decides which tokens are attended to beyond "
            "index_topk, and near ties flip. The default leaves it alone.",
            len(packed), packed[0],
        )  # fmt: skip
    return model, config


def _refuse_packed(model: Any) -> None:
    """mlx-lm passes by whatever is packed already, and would say of it that it was quantized."""
    if not isinstance(model, Model):
        return
    bits = sorted({module.bits for _, module in model.named_modules() if "scales" in module})
    if bits:
        raise GlmDsaError(
            f"expected unpacked weights, got a build in {' and '.join(map(str, bits))} bit; convert the original, or unpack it "
            "first with -d (--dequantize)"
        )


def _packed_indexers(model: Any) -> list[str]:
    if not isinstance(model, Model):
        return []
    return [name for name, module in model.named_modules() if ".indexer." in name and "scales" in module]


def mixed_recipe(original: Callable[..., Any], recipe: str, model: Any, *args: Any, **kwargs: Any) -> Any:
    """A mixed recipe by name says how many bits, not what: what the model leaves alone by default stays as it is."""
    bits_of = original(recipe, model, *args, **kwargs)
    if not isinstance(model, Model):
        return bits_of
    return lambda path, module: model.quant_predicate(path, module) and bits_of(path, module)


@contextmanager
def replaced(holder: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    original = getattr(holder, name)
    setattr(holder, name, function)
    try:
        yield
    finally:
        setattr(holder, name, original)
