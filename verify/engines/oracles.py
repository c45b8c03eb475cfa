"""The oracles as programs of others: whether they can be had, what they warn of, and whose an error is.

Nothing is imported here that needs them, so that it can be said where they are broken.
"""

from __future__ import annotations

import importlib
import re
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from reference import versions

from ..core.exits import NotJudged

TRIED = f"{versions.OLDEST} to {versions.NEWEST}"
REMEDY = (
    f"expected torch, and transformers {TRIED}; install what constraints.txt names: "
    "pip install -c constraints.txt torch transformers"
)
CANDIDATE, ORACLE, GATE = "candidate", "oracle", "gate"
ROOMS = {
    "glm_dsa": CANDIDATE, "mlx": CANDIDATE, "mlx_lm": CANDIDATE,
    "torch": ORACLE, "transformers": ORACLE, "reference": ORACLE,
    "verify": GATE,
}  # fmt: skip
OTHERS = ("torch", "transformers")  # whose warnings are theirs
FROM_MLX = re.compile(r"\[[\w:. ]+\] ")  # how mlx's own errors begin: its C++ has no frames


def check() -> None:
    """Raises NotJudged, in one line, where an oracle is absent, broken or too old. Brings torch and transformers in."""
    for name in ("torch", "transformers"):
        _import(name, name)
    if versions.is_too_old(version()):
        raise NotJudged(f"transformers {version()}: too old to judge by; {REMEDY}")
    for name in (
        "reference.hf",
        "reference.mtp",
        "reference.checkpoints",
    ):  # the classes that are taken from transformers
        _import(name, f"{name} on transformers {version()}")


def _import(name: str, what: str) -> None:
    try:
        with warnings.catch_warnings():  # a library's own deprecations at import are not ours to fail on
            warnings.simplefilter("ignore")
            importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise NotJudged(f"{what}: its import raises {in_a_line(error)}; {REMEDY}") from None


def version() -> str:
    import transformers

    return str(getattr(transformers, "__version__", "unknown"))


def untried() -> str:
    """What a newer transformers is called in a report; "" for those in the range that was tried."""
    return f"transformers {version()}: untried, {TRIED} were" if versions.is_untried(version()) else ""


# -- whose an error is


def is_fault(error: BaseException) -> bool:
    """Whether an error that ended a test speaks against the candidate: raised in its code, or said by the gate.

    The innermost frame of the candidate, an oracle or the gate decides: whatever they call is theirs.
    """
    if isinstance(error, BaseExceptionGroup):
        return any(map(is_fault, error.exceptions))
    if isinstance(error, (NotJudged, MemoryError)):
        return False
    import pytest

    from ..core.checker import Discrepancy
    from .third_party import Failed

    if isinstance(error, (pytest.fail.Exception, Discrepancy, Failed)):  # of a comparison; what somebody's code did
        return True
    package, place = _place(error)
    if ROOMS.get(package) == GATE:
        is_said = isinstance(error, AssertionError) and place.startswith(" (verify.claims.test_")  # by pytest.raises, say
        return is_said or FROM_MLX.match(str(error)) is not None
    return ROOMS.get(package) == CANDIDATE


def is_others(error: BaseException) -> bool:
    """Whether torch or transformers raised it. (What `reference` itself says of an input is meant for the user.)"""
    return _place(error)[0] in OTHERS


def blame(error: BaseException) -> str:
    """One line: who raised what, and where."""
    if isinstance(error, NotJudged):
        return in_a_line(error, named=False)
    package, place = _place(error)
    who = "the gate itself" if ROOMS.get(package) == GATE else package or "somebody"
    return f"{who} raised {in_a_line(error)}{place}"


def _place(error: BaseException) -> tuple[str, str]:
    """(package, where) of the innermost frame that is in a room."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        package = _package(frame)
        if package in ROOMS:
            return package, f" ({frame.f_globals['__name__']}, line {line})"
    return "", ""


def _package(frame: FrameType) -> str:
    name = str(frame.f_globals.get("__name__", ""))
    return "" if name == __name__ else name.partition(".")[0]


def in_a_line(error: BaseException, named: bool = True) -> str:
    text = " ".join(str(error).split())[:300]
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return f"{type(error).__name__}: {text or 'no message'}" if named else text


# -- warnings


@contextmanager
def heard(counts: Counter[str]) -> Iterator[None]:
    """Where warnings are errors, an oracle's are counted instead, whatever line of ours they point to; our own stay errors."""

    def show(message: Warning | str, category: type[Warning], *_: Any) -> None:
        package = _caller()
        if package not in OTHERS:
            raise message if isinstance(message, Warning) else category(message)
        counts[f"{package}: {category.__name__}: {' '.join(str(message).split())[:300]}"] += 1

    if not any(action == "error" for action, *_ in warnings.filters):
        yield
        return
    with warnings.catch_warnings():  # `always` calls `show` where the warning is made, with its stack
        warnings.filters = [("always" if f[0] == "error" else f[0], *f[1:]) for f in warnings.filters]
        warnings.showwarning = show  # type: ignore[assignment]
        yield


def _caller() -> str:
    """The package, ours or an oracle's, whose code warns: the innermost frame's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        package = _package(frame)
        if package in ROOMS:
            return package
        frame = frame.f_back
    return ""
