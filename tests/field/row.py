"""A row of the corpus: an input as people have it, what is asked of it, and what must be said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from verify.core.exits import AGREES, FAULT, NOT_JUDGED, UNREADABLE

if TYPE_CHECKING:
    import pytest

    from .makers import Bench

__all__ = ["AGREES", "FAULT", "NOT_JUDGED", "REFUSED", "SETTLED", "UNREADABLE", "Row", "Said"]

REFUSED = (FAULT, UNREADABLE)  # condemned, or not read: where the field has no usage yet
SETTLED = (AGREES, FAULT)  # read, and something is said of it that is no verdict on the weights


@dataclass(frozen=True)
class Said:
    """How a question ended: its exit code, and everything that was printed."""

    code: int
    text: str


@dataclass(frozen=True)
class Row:
    """`what`: what people did. `seen`: owner/name#number, owner/name, or an id of the project's own lists (D1 to D21, P1 to
    P20).

    `says` and `never` are regular expressions, searched for in what is printed: each of the first must be there (in letters
    of either case), the subject that has to be named; none of the second may be. `code` is one exit code, or several. `marks`:
    pytest's, of a row that is slow and whose like a quicker row or test has.
    """

    name: str
    what: str
    seen: str
    made: Callable[[Bench, Path], Path]
    asked: Callable[[Bench, Path], Said]
    code: int | tuple[int, ...] = AGREES
    says: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    marks: pytest.MarkDecorator | tuple[()] = ()

    @property
    def codes(self) -> tuple[int, ...]:
        return self.code if isinstance(self.code, tuple) else (self.code,)
