"""`python -m verify drift`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from glm_dsa.console import show
from glm_dsa.text import parse_ranges

from ..core import exits, stages
from ..core.files import whole
from . import options

if TYPE_CHECKING:
    from ..drift import Drift, Recording

EPILOG = """\
a side is a checkpoint, an implementation, or both: ./release, OWNER/NAME, hf, equations, mlx_lm.models.glm_moe_dsa,
FILE.py, mlx_lm.models.glm_moe_dsa@./release; options behind it: ./release,kv_bits=8 (kv_group_size, dtype, device,
revision, and conventions: indexer_rope, indexer_norm_eps, latent_norm_eps, main_rope, index_topk, ...).
exit status: 0 where every stage agrees, 1 where not, 10 for what cannot be read or does not run, 11 where nothing can be
judged: an oracle failed, the references disagree, or the candidate agrees where it shows something, and does not show all."""


def add(commands: argparse._SubParsersAction) -> None:
    parser = options.add_sides(
        commands, "drift", "two models side by side: where they part first, and why", EPILOG,
        candidate="a checkpoint, an implementation, or both",
        against="likewise (default: HF on the candidate's weights)", metavar="REFERENCE",
    )  # fmt: skip
    parser.add_argument("--prompt-file", metavar="F", type=Path, help="text to run on (default: random tokens)")
    parser.add_argument("--tokens", metavar="N", type=int, help="the prompt's length (default: 4 index_topk)")
    parser.add_argument("--seed", type=int, default=0, help="of random tokens (default 0)")
    parser.add_argument("--layers", metavar="LIST", help="report these layers only, e.g. 3,7-9")
    parser.add_argument("--stages", metavar="PATTERN", help="report these stages only, e.g. 'self_attn.indexer.*'")
    parser.add_argument(
        "--suggest-bits", metavar="BITS", type=float, help="write a recipe of so many bits a weight: recipe.toml"
    )
    parser.add_argument(
        "--thorough", action="store_true", help="run models of more than 1 GiB too as often as small ones (20 times)"
    )
    parser.add_argument(
        "--watch", metavar="STAGE", action="append", default=[], help="write this stage's arrays as .npz, to --out or here"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="write report.html, report.json and report.jsonl there")


def run(chosen: argparse.Namespace) -> int:
    with options.running() as tell:
        from ..drift import compare

        _check(chosen)
        found = compare(
            chosen.candidate, chosen.against, prompt_file=chosen.prompt_file, length=chosen.tokens, seed=chosen.seed,
            layers=_layers(chosen.layers), stages=chosen.stages, thorough=chosen.thorough,
            suggest_bits=chosen.suggest_bits, keep=_watch(chosen.watch, chosen.out or Path()), tell=tell,
        )  # fmt: skip
    found.command = options.command_line()
    _write(found, chosen)
    return status_of(found)


def status_of(found: Drift) -> int:
    if found.agrees:
        return exits.AGREES
    differs = not found.same_weights or found.strays or found.divergence or found.elsewhere or found.cached
    return exits.FAULT if differs else exits.NOT_JUDGED  # some of its outputs are out of sight


def _check(chosen: argparse.Namespace) -> None:
    """What cannot be, before anything runs."""
    if chosen.out is not None and chosen.out.exists() and not chosen.out.is_dir():
        raise ValueError(f"--out {chosen.out}: a file is there; expected the name of a folder")
    if chosen.out is not None:
        there = next(p for p in (chosen.out.absolute(), *chosen.out.absolute().parents) if p.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise ValueError(f"--out {chosen.out}: nothing can be written to {there}")
    for stage in chosen.watch:
        kind = stages.kind(stage)
        if kind not in (*stages.IN_LAYER, "embed", "norm", "logits"):
            raise ValueError(
                f"--watch {stage}: no such stage; expected one of layers.N.{', layers.N.'.join(stages.IN_LAYER[:3])}, ..."
            )


def _layers(text: str | None) -> list[int] | None:
    """ "3,7-9" -> [3, 7, 8, 9]. Raises ValueError."""
    if text is None:
        return None
    try:
        return sorted(parse_ranges(text))
    except ValueError as error:
        raise ValueError(f"--layers {text}: {error}") from None


def _write(found: Drift, chosen: argparse.Namespace) -> None:
    folder = chosen.out or Path()
    if found.sensitivity is not None and found.sensitivity.recipe is not None:
        folder.mkdir(parents=True, exist_ok=True)
        found.sensitivity.recipe.write(folder / "recipe.toml")
    files = [_arrays(folder, stage) for stage in dict.fromkeys(chosen.watch)]
    files += found.write(chosen.out) if chosen.out is not None else []
    show("\n".join([found.summary(), *(["", *map(str, files)] if files else [])]))


def _arrays(folder: Path, stage: str) -> Path:
    return folder / f"{stage}.npz"


def _watch(wanted: list[str], folder: Path) -> Callable[[dict[str, Recording]], None] | None:
    """Writes the arrays of these stages, of the reference and the candidate, while their recordings are there."""
    if not wanted:
        return None

    def keep(recordings: dict[str, Recording]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        names = {"reference": "reference", "local": "candidate local", "own": "candidate own"}
        for stage in wanted:
            arrays = {n: a for n, r in names.items() if (a := recordings[r].get(stage)) is not None}
            if not arrays:
                raise ValueError(f"--watch {stage}: neither side shows it")
            with whole(_arrays(folder, stage)) as part:
                np.savez(part, **arrays)

    return keep
