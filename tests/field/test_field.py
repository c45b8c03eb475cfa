"""The corpus of the field: what people bring, each with what must be said of it. Rows: tests/field/rows/."""

import re

import pytest

from .makers import Bench
from .rows import PARTS

pytestmark = pytest.mark.usefixtures("unregistered")  # commands of mlx-lm's put this definition in its place

ROWS = {f"{part}-{row.name.replace(' ', '-')}": row for part, rows in PARTS.items() for row in rows}
LONGEST = 60  # lines of an audit, for any input


@pytest.fixture(scope="session")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("field"))


def test_rows_are_seventy_or_more_each_with_a_name_of_its_own():
    assert len(ROWS) == sum(map(len, PARTS.values())) >= 70
    for row in ROWS.values():
        assert re.fullmatch(r"([DP]\d+|[\w.-]+/[\w.-]+(#\d+)?)(, ([DP]\d+|[\w.-]+/[\w.-]+(#\d+)?))*", row.seen), (
            row.name
        )
        assert len(row.what) > 10, row.name


@pytest.mark.parametrize("row", [pytest.param(row, marks=row.marks, id=name) for name, row in ROWS.items()])
def test_what_people_bring(row, bench, tmp_path):
    said = row.asked(bench, row.made(bench, tmp_path / "input"))
    told = f"{row.what}\n{said.text[-6000:]}"
    assert "Traceback (most recent call last)" not in said.text, told
    for pattern in row.says:
        assert re.search(pattern, said.text, re.IGNORECASE), f"{pattern!r} is not said, exit code {said.code}: {told}"
    for pattern in row.never:
        found = re.search(pattern, said.text)
        assert not found, f"{found[0]!r} is said, exit code {said.code}: {told}"
    assert said.code in row.codes, f"exit code {said.code}, expected {row.code}: {told}"
    assert len(said.text.splitlines()) <= LONGEST or "verdict: " not in said.text or "not verified" in said.text, told
