"""mlx-lm's own commands on this definition, and the options that ours adds to them."""

from __future__ import annotations

import argparse
import functools
import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from ..console import MLX_LM, listen
from ..errors import CacheError, GlmDsaError
from ..planning.recipe import kept as kept_recipes
from ..planning.recipe import load as load_recipe
from .conversion import MTP, replaced
from .generation import waiting_for
from .registration import register

TRACEBACK = "GLM_DSA_TRACEBACK"  # environment variable: mlx-lm's errors as they come

log = logging.getLogger("glm_dsa")


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
    module = importlib.import_module(f"mlx_lm.{MLX_LM[command]}")
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
    if waiting_for:
        log.warning(
            "KV cache: not quantized. --kv-bits begins at token %(start)d (--quantized-kv-start), this run ended at "
            "%(tokens)d", waiting_for,
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
    return rest, replaced(module, "convert", functools.partial(module.convert, **chosen))


def _check_target(arguments: Sequence[str]) -> None:
    """A prompt cache is written when all the work is done: better to know before."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    for name, value in [*pairs, *(a.split("=", 1) for a in arguments if "=" in a)]:
        if name == "--prompt-cache-file" and not Path(value).expanduser().resolve().parent.is_dir():
            raise CacheError(f"--prompt-cache-file {value}: its folder does not exist")
