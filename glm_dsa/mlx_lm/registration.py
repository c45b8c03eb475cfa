"""Where this definition takes mlx-lm's place: as a model, and in the functions that decide by mlx-lm's own classes."""

from __future__ import annotations

import functools
import pkgutil
import sys
from collections.abc import Callable
from typing import Any

import mlx_lm.models.cache

from ..cache import LayerCache
from ..config import MODEL_TYPES
from ..errors import GlmDsaError
from ..linear import QuantizedSwitchLinear, SwitchLinear
from . import conversion, generation, loading
from .lora import to_lora

WRAPPERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("mlx_lm.utils", "load_config"): loading.load_config,
    ("mlx_lm.utils", "load_model"): loading.load_model,
    ("mlx_lm.utils", "sharded_load"): loading.sharded_load,
    ("mlx_lm.generate", "load_prompt_cache"): generation.load_prompt_cache,
    ("mlx_lm.models.cache:LRUPromptCache", "insert_cache"): generation.insert_cache,
    ("mlx_lm.generate", "maybe_quantize_kv_cache"): generation.quantize_kv,
    ("mlx_lm.utils", "dequantize_model"): conversion.dequantize_model,
    ("mlx_lm.convert", "dequantize_model"): conversion.dequantize_model,
    ("mlx_lm.fuse", "dequantize_model"): conversion.dequantize_model,
    ("mlx_lm.utils", "quantize_model"): conversion.quantize_model,
    ("mlx_lm.convert", "quantize_model"): conversion.quantize_model,
    ("mlx_lm.convert", "convert"): conversion.convert,
    ("mlx_lm", "convert"): conversion.convert,
    ("mlx_lm.convert", "mixed_quant_predicate_builder"): conversion.mixed_recipe,
}


def register() -> None:
    """From now on, mlx-lm loads GLM-5.x and 4.7-Flash with this definition, in this process. Repeating it is harmless.

    Raises `GlmDsaError` where mlx-lm has changed so that this would not hold.
    """
    door = sys.modules[__package__]  # mlx-lm takes Model and ModelArgs from it
    for model_type in MODEL_TYPES:
        sys.modules[f"mlx_lm.models.{model_type}"] = door
        setattr(mlx_lm.models, model_type, door)
    mlx_lm.models.cache.LayerCache = LayerCache  # type: ignore[attr-defined]  # where load_prompt_cache looks classes up by name
    SwitchLinear.to_lora = QuantizedSwitchLinear.to_lora = to_lora  # type: ignore[attr-defined]
    for (owner, name), wrapper in WRAPPERS.items():
        _wrap(owner, name, wrapper)


def _wrap(owner: str, name: str, wrapper: Callable[..., Any]) -> None:
    holder = pkgutil.resolve_name(owner)
    original = getattr(holder, name, None)
    if not callable(original):
        raise GlmDsaError(f"{owner}.{name} is no more: this mlx-lm is not one that glm-dsa knows (0.32 is)")
    if hasattr(original, "wrapped_by_glm_dsa"):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    wrapped.wrapped_by_glm_dsa = True  # type: ignore[attr-defined]
    setattr(holder, name, wrapped)
