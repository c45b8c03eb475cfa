"""What the commands that set two models side by side have in common: how the two are named, and how they are run."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from glm_dsa.console import listen

from ..core.progress import line
from ..engines import oracles


def add_sides(
    commands: argparse._SubParsersAction, name: str, what: str, epilog: str, *, candidate: str, against: str, **more: Any
) -> argparse.ArgumentParser:
    """A command on a CANDIDATE --against another: what is said of both; more: of the other's option."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=what, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("candidate", metavar="CANDIDATE", help=candidate)
    parser.add_argument("--against", help=against, **more)
    return parser


@contextmanager
def running() -> Iterator[Callable[[str], None]]:
    """Two models run: shows the line of progress that is told. Raises ValueError for what somebody's code raises."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what lies in temporary folders is cleared away
    oracles.check()  # brings torch and transformers in, which other commands do without
    listen()  # what the models take in memory
    from ..engines.third_party import Failed

    try:
        with line() as tell:
            yield tell
    except Failed as error:
        raise ValueError(str(error)) from None


def command_line() -> str:
    """The command that runs, to repeat it."""
    return shlex.join(["python", "-m", "verify", *sys.argv[1:]])
