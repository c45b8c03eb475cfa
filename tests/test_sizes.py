"""The table of sizes in use: every threshold of the definition stands in it, and a run that misses a side is not judged."""

import ast
from collections import Counter

import pytest

import verify
from verify.core import report, sizes
from verify.faults import edits
from verify.faults.coverage import functions, modules
from verify.selftest.size_mutants import FILES

COUNTED = (*FILES, "inputs")
ORDERS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
NARROW = {f"mx.{kind}" for kind in ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "float16", "bfloat16")}
SMALL = 8  # numbers below it are axes and the like


def places():
    """What may be a threshold: constants, comparisons by order, narrow dtypes, large numbers."""
    for name in COUNTED:
        module = modules()[name]
        text = edits.text_of(module)
        for constant, value in vars(module).items():
            values = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else [value]
            is_own = constant.isupper() and any(f"\n{before}{constant}" in text for before in ("", "STEP, ", "BITS, "))
            if is_own and any(type(v) is int for v in values):
                yield f"{name}.{constant}"
    for where, function in functions().items():
        if where.split(".")[0] in COUNTED:
            yield from (f"{where}: {found}" for found in numbers(edits.source_of(function)))


def numbers(source):
    definition = ast.parse(source).body[0]
    for node in (node for statement in definition.body for node in ast.walk(statement)):
        match node:
            case ast.Compare(ops=ops) if any(isinstance(op, ORDERS) for op in ops):
                yield ast.unparse(node)
            case ast.Attribute() if ast.unparse(node) in NARROW:
                yield ast.unparse(node)
            case ast.Constant(value) if type(value) is int and abs(value) >= SMALL:
                yield str(value)


def test_every_threshold_of_the_definition_stands_in_the_table():
    found, told = set(places()), {t.place for t in sizes.THRESHOLDS if t.place} | set(sizes.NO_SIZE)
    new = "a new threshold: give it a row in verify/core/sizes.py and a case on both sides, or say there why it is no size"
    assert not found - told, (new, sorted(found - told))
    assert not told - found, ("no longer in the definition", sorted(told - found))


@pytest.mark.parametrize(
    "source", ["def f(x):\n    return x[: 1 << 16]", "def f(x):\n    return x if x.size < 4 else -x",
               "def f(x):\n    return x.astype(mx.uint16)"]
)  # fmt: skip
def test_a_new_threshold_would_be_found(source):
    assert list(numbers(source))


def test_the_cases_of_the_table_are_there():
    folder = verify.FOLDER / "claims"
    for case in {t.case for t in sizes.THRESHOLDS}:
        assert f'CLAIM = "{sizes.CLAIM}"' in (folder / case).read_text()


def both_sides():
    ran = {}
    for t in sizes.THRESHOLDS:
        ran.setdefault(t.axis, set()).update(t.at if isinstance(t.at, tuple) else (t.at - 1, t.at))
    return ran


def test_a_side_that_did_not_run_is_missing():
    assert sizes.missing(both_sides()) == []
    for t in sizes.THRESHOLDS:
        for size in t.at if isinstance(t.at, tuple) else (t.at,):
            ran = both_sides()
            ran[t.axis] = {n for n in ran[t.axis] if n < size}
            assert any(line.startswith(sizes.AXES[t.axis]) for line in sizes.missing(ran)), t


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_verdict_without_a_size_in_use_is_none(is_whole):
    out = report.Report(sizes=both_sides(), sizes_are_due=True)
    if not is_whole:
        out.sizes["batch"] = {1, 2}
    out.claims[sizes.CLAIM] = Counter(passed=1)
    out.add(report.Comparison(sizes.CLAIM, "case", "stage", report.AGREES))
    out.finish()
    assert out.verdict_of(sizes.CLAIM) == (report.AGREES if is_whole else report.NOT_JUDGED)
    assert is_whole or any("none from 16 on" in line for line in out.open_lines())


def test_the_report_says_which_sizes_were_run():
    assert sizes.lines({"chunk": {1, 2048}, "trim": set(range(9))}) == [
        "tokens of a call behind a cache: 1, 2,048",
        "tokens forgotten at once: 0 to 8 (9 sizes)",
    ]
