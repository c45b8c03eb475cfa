"""What the records rest on: keys, the core, and which rows a change asks for again."""

import json

import pytest

from verify import ROOT, faults
from verify.selftest import changed, command, keys, record, scorecard

ROPE, INDEXER = "rope-backwards", "indexer-no-relu"


@pytest.fixture
def kept():
    return record.read()


@pytest.fixture
def current(kept):
    """The record as if a full run had judged this tree."""
    rows = {n: {k: v for k, v in row.items() if k != "since"} for n, row in kept["faults"].items()}
    keyed = {n: {**row, "key": keys.key(faults.named(n))} for n, row in rows.items()}
    return {**kept, "full": keys.core(), "faults": keyed}


@pytest.fixture
def edit(monkeypatch):
    """edit(file, due, wrong): the file as the digests see it."""
    texts, code = {}, keys.named_code
    keys.core.cache_clear()

    def changed_file(name, due, wrong):
        text = (ROOT / name).read_text()
        assert due in text, due
        wrong = text.replace(due, wrong, 1)
        texts[ROOT / name] = keys.code_of(wrong) if name.endswith(".py") else wrong
        monkeypatch.setattr(keys, "named_code", lambda file: texts.get(file) or code(file))
        keys.core.cache_clear()

    yield changed_file
    keys.core.cache_clear()


# -- the file


def test_a_record_is_a_header_and_a_line_for_each_fault(kept):
    lines = record.KEPT.read_text().splitlines()
    header, *rows = map(json.loads, lines)
    assert [row["name"] for row in rows] == list(faults.CATALOGUE)
    assert header["full"]
    assert not [word for word in ("seconds", "note", "tests_before") for line in lines if f'"{word}"' in line]
    assert record.as_lines(kept) == record.KEPT.read_text(), "written again it is the same"


# -- keys


def test_an_equation_that_changes_is_in_the_keys_of_its_faults_and_of_no_others(edit):
    before = {name: keys.key(fault) for name, fault in faults.CATALOGUE.items()}
    edit("glm_dsa/rope.py", "args.qk_head_dim**-0.5", "args.qk_head_dim**-0.25")
    now = {name: keys.key(fault) for name, fault in faults.CATALOGUE.items()}
    others = {name for name in now if now[name] != before[name]}
    assert others == {n for n, f in faults.CATALOGUE.items() if any(e.where.startswith("rope.") for e in f.edits)}
    assert ROPE in others
    assert INDEXER not in others


def test_a_claims_file_is_in_the_keys_of_its_faults(edit):
    before = {name: keys.key(fault) for name, fault in faults.CATALOGUE.items()}
    edit("verify/claims/test_rope.py", "def test_rotation(", "def test_turning(")
    others = {name for name, fault in faults.CATALOGUE.items() if keys.key(fault) != before[name]}
    assert others >= {f.name for f in faults.CATALOGUE.values() if f.claim == faults.named(ROPE).claim}
    assert INDEXER not in others


def test_edits_are_in_the_key():
    fault, other = faults.named(ROPE), faults.named(INDEXER)
    assert len({keys.key(fault), keys.key(other), keys.key(type(fault)(**{**vars(fault), "edits": other.edits}))}) == 3


CORE = {
    "verify/core/checker.py": "class Judge", "verify/engines/definition.py": "class Ours",
    "verify/cases/random_specs.py": "def random_specs", "verify/gate/plugin.py": "def judge(",
    "verify/faults/edits.py": "def edited(", "verify/claims/behind.py": "class Held", "verify/selftest/judging.py": "def under(",
    "reference/equations.py": "def rms_norm", "glm_dsa/trace.py": "def tap(", "constraints.txt": "torch",
}  # fmt: skip


@pytest.mark.parametrize("file", CORE)
def test_the_core_has_what_every_row_rests_on(edit, file):
    before = keys.core()
    edit(file, CORE[file], CORE[file] + "_")
    assert keys.core() != before


def test_the_core_has_nothing_that_rows_have_keys_for_and_no_training(edit):
    before = keys.core()
    edit("glm_dsa/rope.py", "args.qk_head_dim**-0.5", "args.qk_head_dim**-0.25")
    edit("verify/claims/test_rope.py", "def test_rotation(", "def test_turning(")
    assert keys.core() == before
    assert not [file for file in keys.references() if "train" in str(file.relative_to(ROOT))]


def test_words_decide_nothing():
    code = 'def f(a):\n    """What."""\n    b = "# no comment"  # why\n\n    return a, b\n'
    assert keys.code_of(code) == 'def f(a):\n    b = "# no comment"\n    return a, b'
    assert keys.code_of(code.replace("What", "Else").replace("# why", "# else")) == keys.code_of(code)
    assert keys.code_of(code.replace("no comment", "another")) != keys.code_of(code)
    assert keys.code_of('class A: "words"; b = 1\n') == 'class A: "words"; b = 1'


# -- what is to be judged again


def test_nothing_is_due_where_nothing_changed(current):
    assert changed.due(current, keep=False).names == []


def test_what_a_change_of_an_equation_makes_due(current, edit):
    edit("glm_dsa/rope.py", "args.qk_head_dim**-0.5", "args.qk_head_dim**-0.25")
    due = changed.due(current, keep=False)
    assert ROPE in due.stale
    assert INDEXER not in due.names
    assert due.sentinels == []


def test_a_core_that_changed_makes_sentinels_due_of_each_claim(current):
    due = changed.due({**current, "full": "another"}, keep=True)
    claims = [current["faults"][name]["claim"] for name in due.sentinels]
    assert set(claims) == {row["claim"] for row in current["faults"].values() if row.get("claim")}
    assert max(map(claims.count, claims)) == changed.OF_A_CLAIM
    assert len(due.sentinels) <= 30
    of_rope = [n for n, row in current["faults"].items() if row.get("claim") == faults.named(ROPE).claim]
    nearest = sorted(of_rope, key=lambda name: current["faults"][name].get("bounds", float("inf")))[: changed.OF_A_CLAIM]
    assert set(nearest) <= set(due.sentinels)


def test_a_record_that_somebody_made_is_judged_again_by_who_keeps_nothing(current):
    rows = {**current["faults"], ROPE: {**current["faults"][ROPE], "since": keys.core()}}
    assert changed.due({**current, "faults": rows}, keep=False).names == [ROPE]
    assert changed.due({**current, "faults": rows}, keep=True).names == []


def test_a_fault_that_the_record_does_not_have_is_due(current):
    rows = {name: row for name, row in current["faults"].items() if name != ROPE}
    assert changed.due({**current, "faults": rows}, keep=True).stale == [ROPE]


def test_rows_are_renewed_each_by_itself(current):
    stale = {**current, "faults": {**current["faults"], ROPE: {**current["faults"][ROPE], "key": "old"}}}
    found = {name: {"claim": "c", "stage": "s", "case": "x", "key": keys.key(faults.named(name))} for name in (ROPE, INDEXER)}
    signs = {ROPE: dict.fromkeys(current["rules"]["faults"][ROPE], "...")}
    kept = changed.renewed(stale, {"faults": found, "rules": {"faults": signs}})
    assert kept["faults"][ROPE] == found[ROPE] | {"since": keys.core()}
    assert kept["faults"][INDEXER] == current["faults"][INDEXER], "a sentinel's row stays as the full run had it"
    assert kept["rules"]["faults"][ROPE] == signs[ROPE]
    assert list(kept["faults"]) == list(faults.CATALOGUE)


# -- what is told


def test_a_row_that_is_met_elsewhere_is_named(current):
    row = current["faults"][ROPE]
    assert changed.differences(current, {ROPE: row}) == []
    lines = changed.differences(current, {ROPE: {"tests": 3, "key": row["key"]}})
    assert lines == [f"{ROPE}: expected {row['stage']} [{row['claim']}], as the record has it, got not caught"]
    assert scorecard.undeclared({ROPE: {"tests": 3}}) == [
        f"{ROPE}: not caught; declared: {faults.named(ROPE).stage} [{faults.named(ROPE).claim}]"
    ]


def test_a_stale_row_is_a_problem_and_says_what_to_run(current):
    assert scorecard.Judged(current).problems() == []
    rows = {**current["faults"], ROPE: {**current["faults"][ROPE], "key": "old"}}
    assert scorecard.Judged({**current, "faults": rows}).problems() == [
        f"{ROPE}: judged when its edits, modules or claim were others; run `python -m verify judge --changed --keep`"
    ]


def test_the_caption_says_how_old_a_record_is(current):
    core = keys.core()
    assert scorecard.Judged(current).caption() == f"full run at {core}"
    rows = {**current["faults"], ROPE: {**current["faults"][ROPE], "since": core}}
    assert scorecard.Judged({**current, "faults": rows, "full": "another"}).caption() == (
        "full run at another; 1 rows judged since; core changed since"
    )


def test_no_release_of_a_core_that_no_full_run_judged(current):
    assert scorecard.Judged(current).unfit() == []
    assert scorecard.Judged({**current, "full": "another"}).unfit() == [
        f"expected a full run at core {keys.core()}, got another; make full renews it"
    ]


def test_a_part_that_wrote_nothing_is_no_verdict(tmp_path):
    with pytest.raises(command.Failed, match="faults: no result; its last lines:\nlast"):
        command.result(tmp_path, "faults", {"faults": "last"})
