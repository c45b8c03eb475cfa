"""What a model takes in memory, told before its weights are read, and refused where this machine has less.

A model as `checkpoint.assemble` makes it holds no weight yet, and knows the size of each: what is packed as it is packed, FP8
unpacked, the rest in the dtype asked for. (`plan` counts the same from a config alone; a test holds the two together.)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import mlx.nn as nn

from .errors import CheckpointError
from .model import parameters_of

log = logging.getLogger("glm_dsa")


def physical() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def taken(module: nn.Module) -> int:
    """Bytes of all parameters, whether they were read or not."""
    return sum(array.nbytes for array in parameters_of(module).values())


def check_model(source: str, model: nn.Module) -> None:
    """As `check`, of all of a model's weights at once."""
    kind = "packed" if any("scales" in module for _, module in model.named_modules()) else "unpacked"
    largest = max(array.nbytes for array in parameters_of(model).values())
    check(
        f"{source}: weights, {kind}", taken(model),
        "load a build of fewer bits (python -m glm_dsa plan says what each takes); pytest verify/ --checkpoint goes through "
        "this one a layer at a time",
        f", and up to {gib(largest)} more while they are read",
    )  # fmt: skip


def check(what: str, needed: int, instead: str, more: str = "", tell: Callable[[str], None] = log.info) -> None:
    """Tells what is needed, beside what there is. Raises `CheckpointError` where this machine has less: `instead` says what
    to do then."""
    there = physical()
    if needed > there:
        raise CheckpointError(f"{what} take {gib(needed)} of memory, and this machine has {gib(there)}; {instead}")
    tell(f"{what} take {gib(needed)} of {gib(there)} of memory{more}")


def gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:,.1f} GiB" if nbytes >= 1 << 30 else f"{nbytes / 2**20:,.1f} MiB"
