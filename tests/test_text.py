"""Numbers and tables as command lines and recipes spell them."""

import pytest

from glm_dsa import text


@pytest.mark.parametrize(
    ("written", "numbers"), [("0-3,6", {0, 1, 2, 3, 6}), ("7", {7}), ("0-1, 5 ,3-3", {0, 1, 3, 5})], ids=str
)
def test_ranges_are_read(written, numbers):
    assert text.parse_ranges(written) == numbers
    assert text.parse_ranges(text.ranges(sorted(numbers), ", ")) == numbers


@pytest.mark.parametrize("written", ["", "1-", "-1", "1,", "a", "1-2-3", "99999"])
def test_what_is_no_range_is_refused(written):
    with pytest.raises(ValueError, match="expected numbers and ranges"):
        text.parse_ranges(written)


def test_a_range_goes_up():
    with pytest.raises(ValueError, match="from the lower number to the higher"):
        text.parse_ranges("0,6-3")


@pytest.mark.parametrize(("written", "count"), [("1000000", 10**6), ("128k", 1 << 17), ("1M", 1 << 20), ("16m", 1 << 24)])
def test_counts_are_read(written, count):
    assert text.parse_count(written, 1 << 24) == count


@pytest.mark.parametrize("written", ["", "0", "k", "1g", "1.5k", "-1", "17M", "1" * 13])
def test_what_is_no_count_is_refused(written):
    with pytest.raises(ValueError, match=r"expected a number of tokens, up to 2\^24"):
        text.parse_count(written, 1 << 24)


def test_a_table():
    rows = [("what", "bits", ""), ("a", "8", "packed"), ("other", "16", "")]
    assert text.table(rows, right=(1,)) == ["what   bits", "a         8  packed", "other    16"]
    assert text.table(rows, ruled=True)[:2] == ["what   bits", "-----  ----  ------"]
