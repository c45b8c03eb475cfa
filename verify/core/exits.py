"""How a run ends, for the gate and every command: one number each, and nothing else calls a fault a fault.

pytest's own 2 to 5 and argparse's 2 stay; they say that there is no verdict.
"""

from __future__ import annotations

from collections.abc import Iterable

from reference.versions import OLDEST

AGREES = 0
FAULT = 1
UNREADABLE = 10  # an input that cannot be read, or an option that asks for what cannot be
NOT_JUDGED = 11  # an oracle failed, is below the oldest supported version, or the references disagree
INTERRUPTED = 130  # as a shell says it
MEANINGS = {
    AGREES: "agrees; or done, where nothing is judged",
    FAULT: "FAULT: of the definition, of the release (wrong headers for its config, too), of the code on trial; "
    "of drift: the two sides differ, be it by their weights alone",
    UNREADABLE: "an input that cannot be read (no such folder, no safetensors, cut short, no config), or an option that asks for "
    "what cannot be",
    NOT_JUDGED: f"not judged: torch or transformers is absent, broken or older than {OLDEST}; an oracle or the gate itself "
    "failed; the references disagree; nothing was compared",
    2: "and 3, 4, 5: pytest's and argparse's own, of runs without a verdict",
    INTERRUPTED: "a command was interrupted (pytest says 2)",
}  # as the documentation has them


class NotJudged(Exception):
    """What should judge cannot: one line saying what failed, what was expected, and what to do."""


def worst(statuses: Iterable[int]) -> int:
    """Of several verdicts the one to end with: FAULT beats unreadable beats not judged beats agreement."""
    return min((status for status in statuses if status != AGREES), default=AGREES)
