"""The mutation test's own parts: what it changes, that it puts it back, and how it counts."""

import ast
import json
import time
from typing import NamedTuple

import pytest

from glm_dsa import moe, rope
from verify.faults import edits
from verify.selftest import mutants, mutation

SOURCE = '''
def f(x: int = 3, *, flag=True):
    """A text with 2 numbers."""
    if x < 2 and not flag:
        x.append(-1)
    y = x[..., 0] * 2.0 if x is None else x + 1
    raise ValueError(f"{x + 1} of 7")
'''


def test_every_kind_of_change_is_made_once():
    made = [change for _, change in mutants.changes(SOURCE)]
    for change in (
        "x < 2 -> x <= 2", "2 -> 3", "x < 2 and (not flag) -> x < 2 or not flag", "not flag -> flag", "-1 -> 1", "1 -> 2",
        "x.append(-1) -> pass", "0 -> 1", "x[..., 0] * 2.0 -> x[..., 0] / 2.0", "2.0 -> 4.0", "x is None -> x is not None",
        "x + 1 -> x - 1",
    ):  # fmt: skip
        assert change in made, made
    assert any(change.startswith("if x < 2 and (not flag):") for change in made)


def test_words_defaults_and_annotations_stay():
    made = [ast.unparse(mutants.changed(SOURCE, number)) for number, _ in enumerate(mutants.changes(SOURCE))]
    assert len(set(made)) == len(made) > 10  # each is another
    for text in made:
        assert "of 7" in text
        assert "A text with 2 numbers." in text
        assert "x: int=3, *, flag=True" in text


@pytest.fixture(scope="module")
def every():
    return list(mutants.mutants())


def test_every_mutant_of_the_definition_can_be_made_and_is_put_back(every):
    assert len(every) > 1500
    assert len({m.name for m in every}) == len(every)
    code = edits.find("rope.rotate").__code__
    for mutant in [m for m in every if m.where == "rope.rotate"]:
        with mutants.applied(mutant):
            assert rope.rotate.__code__ is not code
        assert rope.rotate.__code__ is code


def test_a_constant_is_changed_wherever_it_was_imported(every):
    mutant = next(m for m in every if m.where == "moe.SORT_FROM")
    own = moe.SORT_FROM
    with mutants.applied(mutant):
        assert own + 1 == moe.SORT_FROM
    assert own == moe.SORT_FROM


def test_the_score_leaves_out_what_cannot_be_noticed(monkeypatch, tmp_path):
    monkeypatch.setattr(mutants, "EQUIVALENT", {("a.f", "1 -> 2"): "no output depends on it"})
    file = tmp_path / "0.jsonl"
    fates = [("a.f#0", "1 -> 2", "survived 3 tests"), ("a.f#1", "x -> y", "begun"), ("a.f#1", "x -> y", "noticed by t"),
             ("a.g#0", "x + 1 -> x - 1", "survived 9 tests"), ("a.g#1", "z", "begun")]  # fmt: skip
    file.write_text("".join(json.dumps({"mutant": m, "line": 1, "change": c, "fate": f}) + "\n" for m, c, f in fates))
    text = mutation.score(mutation.noted([file, tmp_path / "none"]))
    assert text.splitlines()[0] == "3 mutants, 1 of them equivalent; of the others 1 of 2 noticed (50.0%)"
    assert "  a.g#0 (line 1): x + 1 -> x - 1" in text
    assert "  a.f#0: 1 -> 2: no output depends on it" in text


def test_a_hang_is_cut_short(monkeypatch):
    monkeypatch.setattr(mutation, "PATIENCE", 1)
    with mutation.alarm():
        mutation.signal.alarm(1)
        with pytest.raises(TimeoutError, match="over 1 s"):
            time.sleep(5)


@pytest.mark.parametrize("again", [False, True])
def test_a_run_goes_on_where_another_ended(pytestconfig, tmp_path, again):
    """What was begun twice in a row took the process with it; what survived is tried once more where that is asked for."""
    file = tmp_path / "0.jsonl"
    fates = [("a", "begun"), ("a", "survived 3 tests"), ("b", "begun"), ("b", "noticed by t"), ("c", "begun"), ("c", "begun"),
             ("d", "begun"), ("d", "survived 9 tests"), ("d", "begun"), ("e", "begun")]  # fmt: skip
    file.write_text(
        "".join(json.dumps({"mutant": mutant, "change": "1 -> 2", "fate": fate}) + "\n" for mutant, fate in fates)
    )
    trial = mutation.Mutation(pytestconfig, file, "", (0, 1), every=False, again=again, sizes=False)
    ended = {"b", "c"} if again else {"a", "b", "c"}
    assert trial.done() == ended
    assert mutation.noted([file])["c"]["fate"] == "noticed: the process ends with it"
    assert trial.done() == ended  # and once more


def test_what_is_called_equivalent_is_there(every):
    assert set(mutants.EQUIVALENT) <= {(mutant.where, mutant.change) for mutant in every}


class Named(NamedTuple):
    """In the place of pytest's item."""

    nodeid: str


def test_the_first_pass_is_made_once_for_processes_that_follow_one_another(pytestconfig, tmp_path, monkeypatch):
    items = [Named(name) for name in "ab"]

    def made():
        return mutation.Mutation(pytestconfig, tmp_path / "0.jsonl", "", (0, 1), every=False, again=False, sizes=False)

    def as_it_is(trial, items):
        trial.reached, trial.seconds = {items[0]: {"rope.rotate"}}, {items[0]: 2.5}
        return trial.reached

    monkeypatch.setattr(mutation.Mutation, "as_it_is", as_it_is)
    first = made()
    first.as_it_was(items)
    monkeypatch.setattr(mutation.Mutation, "as_it_is", None)  # would fail if it were called
    second = made()
    second.as_it_was(items)
    assert (second.reached, second.seconds) == (first.reached, first.seconds)
