"""Numbers and tables as command lines and recipes spell them: "0-3,6", "16k", columns that are aligned."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence

UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}
RANGES = re.compile(r"[0-9]{1,4}(-[0-9]{1,4})?(\s*,\s*[0-9]{1,4}(-[0-9]{1,4})?)*")


def parse_ranges(text: str) -> set[int]:
    """ "0-3,6" -> {0, 1, 2, 3, 6}. Raises ValueError, to be put behind what was given."""
    if not RANGES.fullmatch(text):
        raise ValueError("expected numbers and ranges, e.g. 0-3,6")
    numbers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if last and int(last) < int(first):
            raise ValueError("ranges go from the lower number to the higher")
        numbers |= set(range(int(first), int(last or first) + 1))
    return numbers


def ranges(numbers: Iterable[int], separator: str = ",") -> str:
    """[0, 1, 2, 6] -> "0-2,6"."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return separator.join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def parse_count(text: str, most: int) -> int:
    """ "16k" -> 2^14, "1M" -> 2^20, "1000000" -> 10^6. most: a power of two. Raises ValueError, to be put behind what was given."""
    match = re.fullmatch(r"([0-9]{1,12})([kKmM]?)", text)
    count = int(match[1]) * UNITS[match[2].lower()] if match else 0
    if not 1 <= count <= most:
        raise ValueError(
            f"expected a number of tokens, up to 2^{most.bit_length() - 1}: 1000000, 128k (2^17), 1M (2^20)"
        )
    return count


def in_gb(nbytes: float, digits: int = 2) -> str:
    """Bytes in GB of 10^9."""
    return f"{nbytes / 1e9:.{digits}f}"


def in_gib(nbytes: float, digits: int = 2) -> str:
    """Bytes in GiB of 2^30."""
    return f"{nbytes / 2**30:.{digits}f}"


def table(rows: Sequence[Sequence[str]], right: Container[int] = (), ruled: bool = False) -> list[str]:
    """Lines of aligned columns, those of `right` to the right; ruled: with a line of dashes below the first row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    if ruled:
        lines.insert(1, "  ".join("-" * width for width in widths))
    return lines
