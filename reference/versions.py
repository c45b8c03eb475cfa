"""Which transformers the oracles were tried with. Apart from hf.py, which cannot be imported where transformers cannot."""

from __future__ import annotations

import re

OLDEST = "5.18.0"  # the first whose two indexer classes have the same parameters
NEWEST = "5.24.0"


def parts(version: str) -> tuple[int, ...]:
    """ "5.24.0.dev0" -> (5, 24, 0)."""
    found = re.match(r"\d+(?:\.\d+){0,2}", version)
    numbers = [int(number) for number in found[0].split(".")] if found else [0]
    return tuple([*numbers, 0, 0][:3])


def is_too_old(version: str) -> bool:
    return parts(version) < parts(OLDEST)


def is_untried(version: str) -> bool:
    """Newer than any that was tried: used where the references agree, and said."""
    return parts(version) > parts(NEWEST)
