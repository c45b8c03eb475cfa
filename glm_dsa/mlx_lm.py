"""mlx-lm on this definition. The one file that knows mlx-lm; written against 0.32.

`register()` puts this definition in the place of mlx-lm's own, for this process: whatever mlx-lm loads from then on, by
`mlx_lm.load` or by its commands, runs on it. What mlx-lm decides by its own classes is decided here for ours.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import json
import logging
import os
import pkgutil
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

try:
    import mlx_lm.models.cache
    import mlx_lm.utils
    from mlx_lm.tuner.lora import LoRASwitchLinear
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "mlx_lm":
        raise
    raise ModuleNotFoundError("glm_dsa.mlx_lm needs mlx-lm: pip install 'glm-dsa[mlx-lm]'", name=error.name) from None

from . import foreign, memory
from .cache import LayerCache, cache_bytes
from .checkpoint import add_mtp
from .config import ModelArgs
from .console import listen
from .errors import CacheError, CheckpointError, GlmDsaError, RecipeError
from .linear import QuantizedMultiLinear, QuantizedSwitchLinear, SwitchLinear
from .model import Model
from .planning.converting import ByRecipe, keep_or_drop_mtp
from .planning.formats import AFFINE
from .planning.recipe import kept as kept_recipes
from .planning.recipe import load as load_recipe
from .storage import stored_headers
from .store import KvQuantization

__all__ = ["COMMANDS", "Model", "ModelArgs", "attach", "register", "run"]

MODEL_TYPES = ("glm_moe_dsa", "glm4_moe_lite")
COMMANDS = {  # mlx-lm's commands that load a model: the module of each
    "benchmark": "benchmark",
    "cache_prompt": "cache_prompt",
    "chat": "chat",
    "convert": "convert",
    "fuse": "fuse",
    "generate": "generate",
    "lora": "lora",
    "perplexity": "perplexity",
    "server": "server",
    "evaluate": "evaluate",
    "dwq": "quant.dwq",
}
MTP = ("keep", "drop")
AS_THEY_COME = "as they come"  # no dtype that mlx-lm's convert knows, and so none that it casts to
TRACEBACK = "GLM_DSA_TRACEBACK"  # environment variable: mlx-lm's errors as they come
MODEL_FILE = "glm_dsa_model.py"
MODEL_FILE_TEXT = '''\
"""Written by `python -m glm_dsa attach`: mlx-lm runs it when it loads this model with trust_remote_code=True."""

try:
    from glm_dsa.mlx_lm import Model, ModelArgs, register
except ImportError as error:
    raise ImportError("this model runs on glm-dsa, with mlx-lm: pip install 'glm-dsa[mlx-lm]'") from error

register()
'''

log = logging.getLogger("glm_dsa")
_waiting_for: dict[str, int] = {}  # the start that --kv-bits has not reached yet, and the tokens so far


# -- registration


def register() -> None:
    """From now on, mlx-lm loads GLM-5.x and 4.7-Flash with this definition, in this process. Repeating it is harmless.

    Raises `GlmDsaError` where mlx-lm has changed so that this would not hold.
    """
    for model_type in MODEL_TYPES:
        name = f"mlx_lm.models.{model_type}"
        sys.modules[name] = sys.modules[__name__]
        setattr(mlx_lm.models, model_type, sys.modules[__name__])
    mlx_lm.models.cache.LayerCache = LayerCache  # type: ignore[attr-defined]  # where load_prompt_cache looks classes up by name
    SwitchLinear.to_lora = QuantizedSwitchLinear.to_lora = _to_lora  # type: ignore[attr-defined]
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


def _load_config(original: Callable[[Path], dict[str, Any]], model_path: Path) -> dict[str, Any]:
    """What `attach` wrote leads here: no code of the checkpoint's need be trusted to come back to it."""
    try:
        config = original(model_path)
    except (OSError, ValueError):
        foreign.refuse_folder(Path(model_path))
        raise
    file = Path(model_path) / MODEL_FILE
    if config.get("model_file") == MODEL_FILE and file.is_file() and file.read_bytes() == MODEL_FILE_TEXT.encode():
        del config["model_file"]
    return config


def _load_model(original: Callable[..., Any], model_path: Path, lazy: bool = False, **kwargs: Any) -> Any:
    """What mlx-lm cannot read is named, an MTP head elsewhere is added; what the model takes is told before its weights are
    read, and one that cannot fit is refused."""
    try:
        model, config = original(model_path, lazy=True, **kwargs)
    except (RuntimeError, ValueError, OSError) as error:
        foreign.refuse_folder(Path(model_path))
        for name, tensor in stored_headers(Path(model_path)).items() if isinstance(error, RuntimeError) else ():
            if tensor.dtype == "F64":
                raise CheckpointError(
                    f"{tensor.file}: {name} is F64: expected F32, BF16 or F16, all that mlx-lm's loader reads; cast it first "
                    "(glm_dsa.load reads it)"
                ) from None
        raise
    if isinstance(model, Model) and add_mtp(model, Path(model_path)):
        log.info("MTP layer: read from a file beside those that mlx-lm reads")
    if isinstance(model, Model) and lazy:
        log.info("%s: weights take %s; they are read as they are needed", model_path, memory.gib(memory.taken(model)))
    elif isinstance(model, Model):
        memory.check_model(str(model_path), model)
    if not lazy:
        mx.eval(model.parameters())
    return model, config


def _load_prompt_cache(original: Callable[..., Any], file_name: str, *args: Any, **kwargs: Any) -> Any:
    try:
        return original(file_name, *args, **kwargs)
    except GlmDsaError as error:
        raise CacheError(f"{file_name}: {error}") from None
    except Exception as error:  # whatever it stumbles over: missing, truncated, no metadata, other classes
        raise CacheError(
            f"{file_name}: no prompt cache that can be read ({type(error).__name__}: {error}); make it with cache_prompt"
        ) from None


def _insert_cache(
    original: Callable[..., None], store: Any, model: Any, tokens: list[int], prompt_cache: list[Any], **kwargs: Any
) -> None:
    """Keeps for reuse only what every cache holds. After speculative decoding mlx-lm's key can be longer than its caches:
    text from them would silently lack a token, and rewinding them would fail. A draft model may be of another kind."""
    known = (LayerCache, mlx_lm.models.cache.KVCache, mlx_lm.models.cache.QuantizedKVCache)
    is_ours = any(isinstance(cache, LayerCache) for cache in prompt_cache)
    if is_ours and all(isinstance(cache, known) for cache in prompt_cache):
        held = min(len(tokens), *(cache.offset for cache in prompt_cache))
        for cache in prompt_cache:
            cache.trim(cache.offset - held)
        tokens = tokens[:held]
    if tokens:
        original(store, model, tokens, prompt_cache, **kwargs)


# -- KV quantization


def _quantize_kv(
    original: Callable[..., None],
    prompt_cache: list[Any],
    quantized_kv_start: int,
    kv_group_size: int,
    kv_bits: int | None,
) -> None:
    """mlx-lm's switch, after each chunk and step, once `quantized_kv_start` tokens are there. Made visible, and what
    cannot work is refused at the first chunk, not when that many tokens have been computed."""
    first = prompt_cache[0] if prompt_cache else None
    if kv_bits is None or not isinstance(first, LayerCache):
        return original(prompt_cache, quantized_kv_start, kv_group_size, kv_bits)
    if first.quantization is None:
        KvQuantization(kv_bits, kv_group_size).check(first.widths.latent, first.widths.rope)
    else:
        first.to_quantized(kv_group_size, kv_bits)  # raises where it is packed otherwise
    was = first.quantization
    original(prompt_cache, quantized_kv_start, kv_group_size, kv_bits)
    now = prompt_cache[0].quantization
    _waiting_for.clear()
    if now is None:
        _waiting_for.update(start=quantized_kv_start, tokens=first.length)
    elif was is None:
        size = first.dtype.size if first.dtype else 0
        log.info(
            "KV cache: %s from here on, the %d tokens so far included: %d bytes a token and layer instead of %d",
            now, first.length, cache_bytes(first.widths, size, now)[0], cache_bytes(first.widths, size)[0],
        )  # fmt: skip


# -- conversion


def _dequantize_model(original: Callable[[Any], Any], model: Any) -> Any:
    """mlx-lm unpacks its own classes only, and would save a model that is packed in parts, under a config that says not."""
    packed = (QuantizedMultiLinear, QuantizedSwitchLinear)
    ours = [(name, m.dequantized()) for name, m in model.named_modules() if isinstance(m, packed)]
    if ours:
        model.update_modules(tree_unflatten(ours))
    return original(model)


def _convert(
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
        with _replaced(module, "load", load):
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


def _quantize_model(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
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
    before = set(_packed_indexers(model))
    model, config = original(model, *args, **kwargs)
    if isinstance(model, Model) and not any("scales" in module for _, module in model.named_modules()):
        raise GlmDsaError("nothing was quantized: no width of this model is divided by the group size asked for")
    packed = [name for name in _packed_indexers(model) if name not in before]
    if packed:
        log.warning(
            "%d modules of the indexer are quantized now (%s, ...): it decides which tokens are attended to beyond "
            "index_topk, and near ties flip. The default leaves it alone.",
            len(packed), packed[0],
        )  # fmt: skip
    return model, config


def _packed_indexers(model: Any) -> list[str]:
    if not isinstance(model, Model):
        return []
    return [name for name, module in model.named_modules() if ".indexer." in name and "scales" in module]


def _mixed_recipe(original: Callable[..., Any], recipe: str, model: Any, *args: Any, **kwargs: Any) -> Any:
    """A mixed recipe by name says how many bits, not what: what the model leaves alone by default stays as it is."""
    bits_of = original(recipe, model, *args, **kwargs)
    if not isinstance(model, Model):
        return bits_of
    return lambda path, module: model.quant_predicate(path, module) and bits_of(path, module)


WRAPPERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("mlx_lm.utils", "load_config"): _load_config,
    ("mlx_lm.utils", "load_model"): _load_model,
    ("mlx_lm.generate", "load_prompt_cache"): _load_prompt_cache,
    ("mlx_lm.models.cache:LRUPromptCache", "insert_cache"): _insert_cache,
    ("mlx_lm.generate", "maybe_quantize_kv_cache"): _quantize_kv,
    ("mlx_lm.utils", "dequantize_model"): _dequantize_model,
    ("mlx_lm.convert", "dequantize_model"): _dequantize_model,
    ("mlx_lm.fuse", "dequantize_model"): _dequantize_model,
    ("mlx_lm.utils", "quantize_model"): _quantize_model,
    ("mlx_lm.convert", "quantize_model"): _quantize_model,
    ("mlx_lm.convert", "convert"): _convert,
    ("mlx_lm", "convert"): _convert,
    ("mlx_lm.convert", "mixed_quant_predicate_builder"): _mixed_recipe,
}


# -- LoRA


class LoRAExperts(LoRASwitchLinear):
    """mlx-lm's low-rank update of stacked experts, around ours. (Its own asks for the classes and attributes of its own.)"""

    @staticmethod
    def from_base(linear: Any, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> LoRAExperts:
        experts, outputs, inputs = linear.weight.shape
        if isinstance(linear, QuantizedSwitchLinear):
            inputs = inputs * 32 // linear.bits
        lora = LoRAExperts(inputs, outputs, experts, r=r, dropout=dropout, scale=scale)
        lora.linear = linear
        return lora

    def fuse(self, dequantize: bool = False) -> Any:
        linear = self.linear
        plain = linear.dequantized() if isinstance(linear, QuantizedSwitchLinear) else linear
        fused = SwitchLinear(*plain.weight.shape)
        fused.weight = plain.weight + (self.scale * self.lora_b @ self.lora_a).astype(plain.weight.dtype)
        if linear is plain or dequantize:
            return fused
        return fused.to_quantized(**linear.packing(), global_scale="global_scale" in linear)


def _to_lora(self: Any, r: int, scale: float, dropout: float) -> LoRAExperts:
    return LoRAExperts.from_base(self, r, dropout, scale)


# -- commands


def run(command: str, arguments: Sequence[str]) -> int:
    """mlx-lm's own command on this definition. Returns its exit status."""
    register()
    listen()
    if any(a.startswith("--max-k") for a in arguments):  # argparse takes abbreviations
        raise CacheError(
            "--max-kv-size: mlx-lm hands it only to models without a cache of their own, so it would do nothing here; "
            "leave it out"
        )
    if command == "cache_prompt":
        _check_target(arguments)
    module = importlib.import_module(f"mlx_lm.{COMMANDS[command]}")
    arguments, within = _with_recipe(command, arguments)
    sys.argv = [f"python -m glm_dsa {command}", *arguments]
    if command == "convert" and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is half-written is cleared away
    try:
        with within:
            module.main()
    except (KeyboardInterrupt, EOFError):
        return 130
    except Exception as error:  # mlx-lm's commands have no error type for a user's mistakes
        if isinstance(error, GlmDsaError) or TRACEBACK in os.environ:
            raise
        what = str(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"
        if type(error).__name__ == "HFValidationError":
            what = f"no such folder, and no name of the hub either: {what}"
        raise GlmDsaError(f"mlx-lm {command}: {what} (set {TRACEBACK}=1 to see where)") from error
    if _waiting_for:
        log.warning(
            "KV cache: not quantized. --kv-bits begins at token %(start)d (--quantized-kv-start), this run ended at "
            "%(tokens)d", _waiting_for,
        )  # fmt: skip
    return 0


def _with_recipe(command: str, arguments: Sequence[str]) -> tuple[list[str], AbstractContextManager[Any]]:
    """The arguments that mlx-lm knows, and what puts the others in force."""
    if command != "convert":
        return list(arguments), nullcontext()
    parser = argparse.ArgumentParser(prog="python -m glm_dsa convert", add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe")
    parser.add_argument("--mtp", choices=MTP)
    own, rest = parser.parse_known_args(arguments)
    if {"-h", "--help"} & set(rest):
        kept = ", ".join(kept_recipes())
        print(f"--recipe R: besides mlx-lm's own options, bits by component: a .toml, or one that is kept ({kept})")
        print(f"--mtp {'|'.join(MTP)}: the MTP layer; by default it is kept where it can be\n")
    chosen = {key: value for key, value in vars(own).items() if value is not None}
    if not chosen:
        return rest, nullcontext()
    if own.recipe is not None:
        load_recipe(own.recipe)  # before anything is read
    module: Any = importlib.import_module("mlx_lm.convert")
    return rest, _replaced(module, "convert", functools.partial(module.convert, **chosen))


@contextmanager
def _replaced(holder: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    original = getattr(holder, name)
    setattr(holder, name, function)
    try:
        yield
    finally:
        setattr(holder, name, original)


def _check_target(arguments: Sequence[str]) -> None:
    """A prompt cache is written when all the work is done: better to know before."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    for name, value in [*pairs, *(a.split("=", 1) for a in arguments if "=" in a)]:
        if name == "--prompt-cache-file" and not Path(value).expanduser().resolve().parent.is_dir():
            raise CacheError(f"--prompt-cache-file {value}: its folder does not exist")


def attach(folder: str | Path, force: bool = False) -> Path:
    """Writes a `model_file` into a checkpoint folder, and its name into config.json: with trust_remote_code, any mlx-lm
    then loads this checkpoint with this definition. Returns the file. Repeating it is harmless.

    Raises `CheckpointError`, having changed nothing, where the folder is none of our models', or names another file.
    """
    folder = Path(folder)
    config_file = folder / "config.json"
    try:
        ModelArgs.from_file(folder)
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error)) from None
    known = config.get("model_file")
    if known not in (None, MODEL_FILE) and not force:
        raise CheckpointError(
            f"{config_file}: model_file is {known!r} already; --force puts {MODEL_FILE!r} in its place"
        )
    target = folder / MODEL_FILE
    is_new = not target.exists()
    if not is_new and not target.is_file():
        raise CheckpointError(f"{target}: is there already, and no file")
    if not is_new and target.read_bytes() != MODEL_FILE_TEXT.encode() and not force:
        raise CheckpointError(f"{target}: is there already, and not what would be written; --force overwrites it")
    _replace(target, MODEL_FILE_TEXT)
    try:
        if known != MODEL_FILE:
            _replace(config_file, json.dumps(config | {"model_file": MODEL_FILE}, indent=2, ensure_ascii=False) + "\n")
    except CheckpointError:
        if is_new:
            target.unlink()
        raise
    return target


def _replace(file: Path, text: str) -> None:
    """All of it, or none."""
    new = None
    try:
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}.", delete=False) as new:
            new.write(text.encode())
        os.chmod(new.name, file.stat().st_mode & 0o777 if file.exists() else 0o644)
        os.replace(new.name, file)
    except (OSError, UnicodeError) as error:
        if new is not None:
            Path(new.name).unlink(missing_ok=True)
        raise CheckpointError(f"{file}: cannot be written: {getattr(error, 'strerror', None) or error}") from None
