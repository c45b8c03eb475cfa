"""How a run ends, for the gate and every command: one number each, and nothing else calls a fault a fault.

pytest's own 2 to 5 and argparse's 2 stay; they say that there is no verdict.
"""

from __future__ import annotations

from collections.abc import Iterable

AGREES = 0
FAULT = 1
UNREADABLE = 10  # an input that cannot be read, or an option that asks for what cannot be
NOT_JUDGED = 11  # an oracle failed, is below the oldest supported version, or the references disagree
INTERRUPTED = 130  # as a shell says it


class NotJudged(Exception):
    """What should judge cannot: one line saying what failed, what was expected, and what to do."""


def worst(statuses: Iterable[int]) -> int:
    """Of several verdicts the one to end with: FAULT beats unreadable beats not judged beats agreement."""
    return min((status for status in statuses if status != AGREES), default=AGREES)
