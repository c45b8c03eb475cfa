"""Sizes in use: what is counted, every threshold of the definition, and the case that runs both sides of it.

A verdict speaks of the sizes that were run and of no others. tests/test_sizes.py holds the table to the code: a number or a
comparison of sizes in the definition that stands in no row here fails there.
"""

from __future__ import annotations

from dataclasses import dataclass

# what is counted: {name: in words, as the report has it}
AXES = {
    "prompt": "tokens of a first call",
    "chunk": "tokens of a call behind a cache",
    "context": "tokens that a cache holds",
    "batch": "rows of a batch",
    "selected": "keys that a query selects",
    "times": "context over index_topk",
    "pairs": "token-expert pairs of a call",
    "trim": "tokens forgotten at once",
    "vocabulary": "tokens of the vocabulary",
    "bits": "bits of a packed value",
    "group": "values of a packed group",
}


@dataclass(frozen=True)
class Threshold:
    """Where the definition does otherwise, or a number could end.

    place: "module.NAME" of a constant, or "module.Class.method: expression" as the code has it; "" for what is usual in use.
    axis: what is counted. at: from which size on. case: the test that runs sizes on both sides, "file::test".
    """

    place: str
    axis: str
    at: int
    case: str


# Of calls behind a cache: each of a few tokens, and both sides of each power of two up to 256.
EVERY_LENGTH = (*range(1, 10), *(n + d for n in (16, 32, 64, 128, 256) for d in (-1, 0, 1)))
