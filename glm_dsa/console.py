"""What the commands print."""

from __future__ import annotations

import logging
import os
import sys

MLX_LM = {  # mlx-lm's commands that load a model, and the module of each; named here, where no mlx-lm need be installed
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


def show(text: str) -> None:
    """To the standard output, all of it, or as much as is read of it (`| head` has seen enough)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def listen() -> None:
    """What this package logs, to the standard error; once."""
    log = logging.getLogger("glm_dsa")
    if log.handlers:
        return
    handler = _Stderr()
    handler.setFormatter(logging.Formatter("[glm-dsa] %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


class _Stderr(logging.StreamHandler):
    """Whatever the standard error is by then."""

    @property
    def stream(self):
        return sys.stderr

    @stream.setter
    def stream(self, _):
        pass
