"""What pages hold between `<!-- NAME -->` and `<!-- end of NAME -->`, made from code and kept records: `make docs` rewrites it.

A block is declared in BLOCKS, under its name, and stands wherever a page has its marks. tests/test_blocks.py holds that each is
current. No other code writes into a page.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from . import runs, tables

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"<!-- (?P<name>[\w./-]+) -->\n(?P<text>.*?)\n<!-- end of (?P=name) -->", re.DOTALL)
MARK = re.compile(r"^<!-- (?!end of )(.+) -->$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """made: its text. is_measured: errors and bounds in it are figures of the machine, and may differ from one to the next."""

    made: Callable[[], str]
    is_measured: bool = False

    def is_current(self, written: str, due: str) -> bool:
        return without_figures(written) == without_figures(due) if self.is_measured else written == due


BLOCKS = {
    "claims": Block(tables.claims), "judged": Block(tables.judged), "diagnosed": Block(tables.diagnosed),
    "results": Block(tables.results), "bench": Block(tables.bench), "cache": Block(tables.cache), "rooms": Block(tables.rooms),
    "exits": Block(tables.exit_statuses), "recipes": Block(tables.recipes), "plan": Block(tables.plan_of_glm_5_2),
    "family": Block(tables.family), "fault": Block(tables.fault),
    "failure": Block(runs.failure, is_measured=True), "drift": Block(runs.drift, is_measured=True),
    "implementation": Block(runs.implementation),
    **{f"examples/{name}": Block(partial(tables.code, f"examples/{name}")) for name in tables.examples()},
}  # fmt: skip


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks_in(page: str) -> dict[str, str]:
    """{name: text} of a page. Raises ValueError for marks that no block explains, or that have no end."""
    found = {match["name"]: match["text"] for match in BLOCK.finditer(page)}
    for mark in MARK.findall(page):
        if mark not in BLOCKS:
            raise ValueError(f"<!-- {mark} -->: no such block; expected one of {', '.join(sorted(BLOCKS))}")
        if mark not in found:
            raise ValueError(f"<!-- {mark} -->: expected <!-- end of {mark} --> behind it, found none")
    return found


def rewritten(page: str) -> str:
    """The page with each of its blocks as it should read; what is current stays as it is."""

    def replaced(match: re.Match[str]) -> str:
        block, written = BLOCKS[match["name"]], match["text"]
        due = block.made()
        return match[0] if block.is_current(written, due) else match[0].replace(f"\n{written}\n", f"\n{due}\n")

    blocks_in(page)
    return BLOCK.sub(replaced, page)


def without_figures(text: str) -> str:
    return re.sub(r"\d+\.?\d*(e[+-]?\d+)?%?", "#", " ".join(text.split()))


def main() -> int:
    for page in pages():
        before = page.read_text(encoding="utf-8")
        after = rewritten(before)
        if after != before:
            page.write_text(after, encoding="utf-8")
            print(f"{page.relative_to(ROOT)}: rewritten")
    return 0


if __name__ == "__main__":
    sys.exit(main())
