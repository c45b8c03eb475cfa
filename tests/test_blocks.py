"""Generated blocks: what stands in README.md and docs/ is what code and records make of it."""

import pytest

from docs import blocks
from tests.carried import diagnosing, kept

# Those that run a command end to end, each a process of its own.
RUN = {
    "failure": pytest.mark.slow(
        "docs/", "README.md", "verify/claims/test_layers", "verify/gate", "verify/core", "verify/cases", "verify/engines",
        "verify/faults", "reference/", "glm_dsa/indexer", "glm_dsa/rope",
    ),
    "drift": pytest.mark.slow(
        "docs/", "README.md", "verify/drift", "verify/commands", "verify/core", "verify/engines", "verify/faults",
        "verify/__main__", "reference/", "glm_dsa/", "constraints.txt",
    ),
    "implementation": pytest.mark.slow(
        "docs/", "README.md", "verify/implementation", "verify/claims/test_implementation", "verify/gate", "verify/core",
        "verify/cases", "verify/engines", "reference/", "constraints.txt",
    ),
}  # fmt: skip
PAGES = {page: blocks.blocks_in(page.read_text(encoding="utf-8")) for page in blocks.pages()}


@pytest.mark.parametrize("name", [pytest.param(name, marks=RUN.get(name, ())) for name in blocks.BLOCKS])
def test_a_block_is_current_wherever_it_stands(name):
    due, written = blocks.BLOCKS[name].made(), [found[name] for found in PAGES.values() if name in found]
    assert written, f"{name}: no page has <!-- {name} -->"
    for text in written:
        assert blocks.BLOCKS[name].is_current(text, due), f"{name}: run make docs; it should read:\n{due}"


def test_a_block_that_is_not_current_is_rewritten_and_nothing_else():
    page = "before\n<!-- exits -->\n| old |\n<!-- end of exits -->\nbehind\n"
    due = blocks.BLOCKS["exits"].made()
    assert blocks.rewritten(page) == f"before\n<!-- exits -->\n{due}\n<!-- end of exits -->\nbehind\n"
    assert blocks.rewritten(blocks.rewritten(page)) == blocks.rewritten(page)


def test_figures_of_another_machine_are_current_and_another_stage_is_not():
    block = blocks.BLOCKS["drift"]
    assert block.is_current("layers.0.mlp 1.26e-06 agrees", "layers.0.mlp  3.1e-07  agrees")
    assert not block.is_current("layers.0.mlp 1.26e-06 agrees", "layers.0.mlp 1.26e-06 FAULT")
    assert not blocks.BLOCKS["exits"].is_current("| 10 |", "| 11 |")


@pytest.mark.parametrize(
    ("page", "subject"),
    [
        ("<!-- exit -->\n-\n<!-- end of exit -->\n", "<!-- exit -->: no such block"),
        ("<!-- exits -->\n-\n", "<!-- end of exits -->"),
    ],
)
def test_marks_that_cannot_be_are_refused(page, subject):
    with pytest.raises(ValueError, match=subject):
        blocks.rewritten(page)


def test_enough_of_what_was_diagnosed_was_right():
    records = kept.read()[1]
    assert diagnosing.kinds(records)
    assert all(diagnosing.enough(records, kind) for kind in diagnosing.kinds(records))
