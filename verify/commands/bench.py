"""`python -m verify bench`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from glm_dsa import ModelArgs
from glm_dsa.console import show
from glm_dsa.text import parse_count

from .. import FOLDER
from ..core import exits
from ..core.files import whole
from ..core.progress import line
from ..engines import oracles
from . import options

MOST_CONTEXT = 1 << 24
CONTEXTS = "1k,2k,4k,8k,16k,32k,64k"
KEPT = FOLDER / "bench" / "measured.json"
ON_PAPER = {"config", "context", "bits", "kv_bits", "memory", "bandwidth", "rate"}
GLM_5_2 = FOLDER / "configs" / "glm-5.2.json"


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "bench",
        help="what attention costs as the context grows: ours beside mlx-lm's and HF's (5 to 10 minutes)",
        description="Attention and indexer of one layer at an eighth of GLM-5.2's widths, on caches that are filled, ours beside "
        "mlx-lm's and HF's on the same weights. Exit status 0 where every target is met.",
    )
    parser.add_argument("--contexts", metavar="LIST", default=CONTEXTS, help=f"default {CONTEXTS}")
    parser.add_argument(
        "--chunk", metavar="N", type=int, help="tokens of a chunk in prefill (default 128; on paper 2048)"
    )
    parser.add_argument("--rounds", metavar="N", type=int, default=3, help="of each side, in both orders (default 3)")
    parser.add_argument(
        "--hf-up-to", metavar="T", default="16k", help="the longest context for HF (default 16k; 0: none)"
    )
    parser.add_argument("--no-true-widths", action="store_true", help="leave out the layer of GLM-5.2's own widths")
    parser.add_argument("--out", metavar="DIR", type=Path, help="write bench.json and a figure for each table there")
    parser.add_argument("--kept", action="store_true", help="run nothing: the record that the documentation shows")
    parser.add_argument(
        "--keep",
        action="store_true",
        help="make it the record that is kept (run make docs then, for the table that is made of it)",
    )
    paper = parser.add_argument_group("on paper")
    paper.add_argument(
        "--paper", action="store_true", help="run nothing: memory, bytes and operations of a whole model"
    )
    paper.add_argument("--config", metavar="F", type=Path, default=GLM_5_2, help="a config.json (default: GLM-5.2's)")
    paper.add_argument("--context", metavar="T", default="1M", help="tokens (default 1M: 2^20)")
    paper.add_argument("--bits", type=float, default=3.5, help="a weight (default 3.5)")
    paper.add_argument("--kv-bits", type=int, default=8, help="of the KV cache, 16 or 8 (default 8)")
    paper.add_argument("--memory", metavar="GB", type=float, default=512.0, help="of the machine (default 512)")
    paper.add_argument("--bandwidth", metavar="GB/S", type=float, default=819.0, help="default 819")
    paper.add_argument("--rate", metavar="TFLOPS", type=float, default=28.0, help="default 28")
    parser.set_defaults(defaults={action.dest: action.default for action in parser._actions})


def run(chosen: argparse.Namespace) -> int:
    _check(chosen)
    return _paper(chosen) if chosen.paper else _bench(chosen)


def _bench(chosen: argparse.Namespace) -> int:
    if not chosen.kept:
        oracles.check()
    from ..bench import tables
    from ..bench.plots import draw
    from ..bench.suite import Bench, Course

    if chosen.kept:
        found = Bench.of_dict(json.loads(KEPT.read_text()))
        show("\n".join(tables.summary(found)))
        return exits.AGREES if all(t.met for t in found.targets) else exits.FAULT
    contexts = sorted({tokens(part, "--contexts") for part in chosen.contexts.split(",") if part})
    if not contexts:
        raise ValueError("--contexts: expected numbers of tokens, e.g. 1k,16k")
    chunk = 128 if chosen.chunk is None else chosen.chunk
    if chunk < 1 or chosen.rounds < 1:
        raise ValueError(f"--chunk {chunk} --rounds {chosen.rounds}: expected 1 or more")
    if chosen.out is not None:
        chosen.out.mkdir(parents=True, exist_ok=True)
    with line() as tell:
        hf = 0 if chosen.hf_up_to == "0" else tokens(chosen.hf_up_to, "--hf-up-to")
        course = Course(
            contexts, chunk, chosen.rounds, hf_up_to=hf, true_context=None if chosen.no_true_widths else 16384,
            tell=tell,
        )  # fmt: skip
        found = course.run()
    found.command = options.command_line()
    show("\n".join(tables.summary(found)))
    text = json.dumps(found.as_dict(), indent=1) + "\n"
    files = [] if chosen.out is None else [chosen.out / "bench.json"]
    for file in (*files, *([KEPT] if chosen.keep else [])):
        with whole(file) as part:
            part.write_text(text)
    if chosen.out is not None:
        files += draw(found, chosen.out)
        show("\n".join(["", *map(str, files)]))
    return exits.AGREES if all(t.met for t in found.targets) else exits.FAULT


def _check(chosen: argparse.Namespace) -> None:
    """What goes together. Raises ValueError."""
    given = {name for name, default in chosen.defaults.items() if getattr(chosen, name, default) != default}
    for what, allowed in (
        ("kept", {"kept"}),
        ("paper", {"paper", "chunk", *ON_PAPER}),
        ("keep", {"keep", "rounds", "out"}),
    ):
        if what in given and given - allowed:
            raise ValueError(f"--{what}: --{min(given - allowed).replace('_', '-')} does not go with it")
    if "paper" not in given and given & ON_PAPER:
        raise ValueError(f"--{min(given & ON_PAPER).replace('_', '-')} is for --paper")


def _paper(chosen: argparse.Namespace) -> int:
    from ..bench.roofline import Machine, paper

    for name in ("bits", "memory", "bandwidth", "rate"):
        if not 0 < getattr(chosen, name) < 1e6:
            raise ValueError(f"--{name} {getattr(chosen, name):g}: expected a number above 0, and below 1e6")
    args = ModelArgs.from_file(chosen.config)
    machine = Machine(chosen.memory, chosen.bandwidth, chosen.rate)
    chunk = 2048 if chosen.chunk is None else chosen.chunk
    if chunk < 1:
        raise ValueError(f"--chunk {chunk}: expected 1 or more")
    found = paper(args, tokens(chosen.context, "--context"), chosen.bits, chosen.kv_bits, chunk, machine)
    show("\n".join(found.lines()))
    return 0


def tokens(text: str, option: str) -> int:
    """ "16k" -> 16384. Raises ValueError."""
    try:
        return parse_count(text, MOST_CONTEXT)
    except ValueError as error:
        raise ValueError(f"{option} {text}: {error}") from None
