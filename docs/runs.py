"""Blocks that are what a command says when it is run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from reference import checkpoints

from . import tables

ROOT = Path(__file__).parents[1]
STOCK = "pytest verify/ --implementation mlx_lm.models.glm_moe_dsa"
DRIFT = "python -m verify drift mlx_lm.models.glm_moe_dsa@./small-keys"
FAILURE = "pytest verify/claims/test_layers.py --fault indexer-rope-layout -k glm-5.2-interleaved-long"


@cache
def said(command: str, folder: Path = ROOT) -> str:
    """What it prints, in a process of its own: tests put this definition in mlx-lm's place. Raises ValueError unless it ends
    with a FAULT."""
    python, *arguments = shlex.split(command)
    arguments = [sys.executable, *(["-m", "pytest"] if python == "pytest" else []), *arguments]
    done = subprocess.run(  # noqa: S603
        arguments, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    if done.returncode != 1:
        raise ValueError(
            f"{command}: expected exit status 1, got {done.returncode}; it said:\n{done.stdout}{done.stderr}"
        )
    return done.stdout


def failure() -> str:
    """One stage that fails, under a fault that was seeded."""
    found = re.search(
        r"^E? *(layers\.0\.self_attn\.indexer\.k .*?\n.*?again: [^\n]*)", said(FAILURE), re.DOTALL | re.MULTILINE
    )
    if found is None:
        raise ValueError(f"{FAILURE}: expected a fault of layers.0.self_attn.indexer.k, got:\n{said(FAILURE)}")
    first, *rest = [line.removeprefix("E").strip() for line in found[1].splitlines()]
    return tables.fenced("\n".join([first, *(f"  {line}" for line in rest)]))


def implementation() -> str:
    """The list of faults, and the verdict."""
    table = said(STOCK)[said(STOCK).index("\nclaim ") :]
    faults = table[table.index("\nfaults\n") + 1 :].partition("\n\n")[0]
    return tables.fenced(f"{faults}\n\n{table.strip().splitlines()[-1]}")


def drift() -> str:
    with TemporaryDirectory() as scratch:
        checkpoints.write(Path(scratch) / "small-keys", checkpoints.tiny(num_hidden_layers=4), seed=9)
        return tables.fenced(said(DRIFT, Path(scratch)).strip())
