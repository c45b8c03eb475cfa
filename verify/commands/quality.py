"""`python -m verify quality`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from glm_dsa.console import show
from glm_dsa.errors import printable

from ..core import exits
from ..core.files import whole
from . import options

EPILOG = """\
a side is a checkpoint, or an implementation on one: ./release, OWNER/NAME, hf@./release, ./release,kv_bits=8,dtype=bfloat16
(as in drift). Without a dtype both run in float32. The text is any file in UTF-8; the kept checkpoints have kept texts."""


def add(commands: argparse._SubParsersAction) -> None:
    parser = options.add_sides(
        commands, "quality", "how far a model's predictions of a text are from another's: KL, agreement, perplexity, bits per byte",
        EPILOG, candidate="a checkpoint, or an implementation on one",
        against="likewise: what it was made from", metavar="BASE", required=True,
    )  # fmt: skip
    parser.add_argument("--text", metavar="F", type=Path, help="the text that both are to predict")
    parser.add_argument("--tokens", metavar="N", type=int, help="its first N tokens (default: all)")
    parser.add_argument("--context", metavar="N", type=int, default=2048, help="tokens of a window (default 2048)")
    parser.add_argument(
        "--stride",
        metavar="N",
        type=int,
        default=None,
        help="between windows (default: half a context; an odd one whole)",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures there")


def run(chosen: argparse.Namespace) -> int:
    stride = chosen.stride
    if stride is None:
        stride = chosen.context // 2 if chosen.context % 2 == 0 else chosen.context
    with options.running() as tell:
        from ..quality import measure

        if chosen.json is not None and not _can_be_written(chosen.json):
            raise ValueError(f"--json {chosen.json}: expected a file in a folder that is there")
        found = measure(
            chosen.candidate, chosen.against, text=chosen.text, length=chosen.tokens, context=chosen.context,
            stride=stride, tell=tell,
        )  # fmt: skip
    found.command = options.command_line()
    if chosen.json is not None:
        with whole(chosen.json) as part:
            part.write_text(json.dumps(found.as_dict(), indent=2) + "\n")
    show("\n".join(printable(text) for text in found.lines()))
    return exits.AGREES


def _can_be_written(file: Path) -> bool:
    return "\0" not in str(file) and file.absolute().parent.is_dir() and (file.is_file() or not file.exists())
