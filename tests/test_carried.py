"""The catalogue's faults in HF's modules and in mlx-lm's definition: that they are the same mistakes."""

from dataclasses import replace

import pytest

from tests.carried import IN_HF, IN_STOCK, NOT_CARRIED, diagnosing, kept, write_stock
from tests.carried.compared import CLEAR, TOLERANCE, Trial
from tests.carried.in_hf import Edit, Set, patched, places
from verify import ROOT
from verify.faults import CATALOGUE
from verify.faults.edits import unwrapped
from verify.selftest import keys

# `python -m tests.carried` tries all of them
STALE = {name for task in kept.stale(diagnosing.tasks(), kept.read()[1]) if task.what == "alone" for name in task.names}
SAMPLE = [name for number, name in enumerate(IN_HF) if number % 9 == 0 or name in STALE]

STREAMED = [  # functions, attributes that copies keep, a class, the frequencies, a norm outside of the layers, experts in chunks
    "indexer-selects-recent",
    "kv-latent-unnormed",
    "shared-from-wrong-layer",
    "yarn-ramp-reversed",
    "final-norm-skipped",
    "experts-left-sorted",
]
STOCK = [
    "indexer-no-relu",
    "yarn-ramp-reversed",
    "mask-one-too-far",
    "experts-of-another-token",
    "router-groups-ignored",
]


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    return Trial(tmp_path_factory.mktemp("carried"))


def test_every_fault_is_carried_or_a_reason_is_given():
    assert len(IN_HF) >= 75
    carried = set(IN_HF) | set(NOT_CARRIED)
    assert not set(CATALOGUE) - carried, "carry it in in_hf.py, or say in not_carried.py why HF cannot have it"
    assert not carried - set(CATALOGUE), "no fault of the catalogue: rename or remove it in in_hf.py, in_stock.py, not_carried.py"
    assert not set(IN_HF) & set(NOT_CARRIED), "carried, and a reason why not: one of both"
    assert not any(CATALOGUE[name].equivalent for name in IN_HF)
    assert len(IN_STOCK) >= 25
    assert set(IN_STOCK) <= set(IN_HF)


@pytest.mark.parametrize("name", SAMPLE)
def test_in_hf_it_is_the_same_mistake(trial, name):
    found = trial.compared(name)
    assert found.stage == found.ours
    assert found.error <= TOLERANCE
    assert found.effect >= CLEAR


@pytest.mark.parametrize("name", IN_HF)
def test_nothing_stays_behind(trial, name):
    fault = IN_HF[name]
    model = trial.case_of(fault).hf

    def state():
        codes = [f.__code__ for edit in fault.changes if isinstance(edit, Edit) for f, *_ in places(edit)]
        return codes, [(type(module), {k: id(v) for k, v in vars(module).items()}) for module in model.modules()]

    def fails(before):
        assert state() != before
        raise RuntimeError("on purpose")

    before = state()
    with pytest.raises(RuntimeError, match="on purpose"), fault.patch(model):
        fails(before)
    assert state() == before


@pytest.mark.parametrize("name", STREAMED)
def test_in_layers_that_are_read_one_at_a_time(trial, name):
    assert trial.streamed(name) <= TOLERANCE


def test_words_that_do_not_stand_there_once_are_refused(trial):
    model = trial.case_of(IN_HF["indexer-no-relu"]).hf
    for due, wrong in (("no such text", ""), ("residual", ""), ("residual = hidden_states\n        h", "")):
        with (
            pytest.raises(LookupError, match="expected once"),
            patched(model, (Edit("DecoderLayer.forward", due, wrong),)),
        ):
            pass
    comment = Edit("Attention.forward", "# Kept for BC", "# kept")
    with pytest.raises(LookupError, match="nothing that runs"), patched(model, (comment,)):
        pass


def test_two_at_once(trial):
    model = trial.case_of(IN_HF["indexer-no-relu"]).hf
    forward = unwrapped(type(model.model.layers[0].self_attn.indexer).forward)
    with patched(model, (*IN_HF["indexer-no-relu"].changes, *IN_HF["indexer-selects-recent"].changes)):
        assert "relu" not in forward.__code__.co_names
        assert "as_subclass" in forward.__code__.co_names
    assert "relu" in forward.__code__.co_names


@pytest.mark.parametrize("name", STOCK)
def test_in_mlx_lm(trial, name):
    assert trial.stock_compared(name).is_the_same


@pytest.mark.parametrize("name", IN_STOCK)
def test_mlx_lm_can_be_written_with_it(tmp_path, name):
    right, wrong = write_stock(tmp_path / "right.py").read_text(), write_stock(tmp_path / "wrong.py", name).read_text()
    assert right != wrong
    compile(wrong, name, "exec")


# -- the record of what drift names


@pytest.fixture
def rows():
    """The record as if a full run had diagnosed this tree."""
    each = {kept.of_task(task): task for task in diagnosing.tasks()}
    found = {kept.identity(row): row for row in kept.read()[1]}
    made = [{**next(iter(found.values())), "what": i[0], "names": list(i[1]), "where": i[2], "dtype": i[3]} for i in each]
    return [
        {k: v for k, v in {**found.get(kept.identity(row), row), "key": kept.key(each[kept.identity(row)])}.items() if k != "since"}
        for row in made
    ]


def test_the_record_is_of_these_mistakes():
    stale = kept.stale(diagnosing.tasks(), kept.read()[1])
    assert not stale, "run `python -m tests.carried --drift --changed --keep`"
    full, found = kept.read()
    assert kept.KEPT.read_text() == kept.as_lines(full, found), "written again it is the same"
    assert "seconds" not in kept.KEPT.read_text()


def test_a_mistake_that_changes_is_due(rows, monkeypatch):
    tasks = diagnosing.tasks()
    assert not kept.due(tasks, kept.core(), rows, keep=False)
    name = "indexer-no-relu"
    monkeypatch.setitem(IN_HF, name, replace(IN_HF[name], changes=(Edit("Indexer.forward", "F.relu(scores)", "-scores"),)))
    due = kept.due(tasks, kept.core(), rows, keep=False)
    assert {task.names for task in due if len(task.names) == 1} == {(name,)}
    assert {task.where for task in due} == {kept.HF}


def test_a_fault_that_is_added_leaves_the_lots_of_the_others(monkeypatch):
    before = {kept.of_task(task): task.without for task in diagnosing.tasks()}
    monkeypatch.setitem(CATALOGUE, "a-new-one", CATALOGUE["indexer-no-relu"])
    monkeypatch.setitem(IN_HF, "a-new-one", IN_HF["indexer-no-relu"])
    after = {kept.of_task(task): tuple(n for n in task.without if n != "a-new-one") for task in diagnosing.tasks()}
    own = {one for one in after if "a-new-one" in one[1]}
    assert own
    lost = set(before) - set(after)
    assert len(lost) <= sum(one[0] == "together" for one in own), "none but what it takes the place of"
    assert {one: without for one, without in after.items() if one not in own} == {
        one: without for one, without in before.items() if one not in lost
    }


def test_a_run_that_is_cut_short_keeps_what_it_has(monkeypatch, tmp_path, rows):
    tasks, header = diagnosing.tasks(), kept.core()
    file = tmp_path / "diagnosed.jsonl"
    file.write_text(kept.as_lines(header, [{**row, "key": "old"} for row in rows[:3]] + rows[3:]))
    by_name = {kept.identity(row): row for row in rows}

    def cut(chosen, processes):
        assert list(chosen) == tasks[:3]
        yield from (by_name[kept.of_task(task)] for task in chosen[:2])
        raise KeyboardInterrupt

    monkeypatch.setattr(kept, "KEPT", file)
    monkeypatch.setattr(diagnosing, "diagnosed", cut)
    with pytest.raises(KeyboardInterrupt):
        diagnosing.changed(1, keep=True)
    assert kept.stale(tasks, kept.read()[1]) == tasks[2:3]


def test_what_stands_in_an_attributes_place_is_in_the_key():
    def key_of(value):
        return kept.carried_text(replace(IN_HF["indexer-eps"], changes=(Set("k_norm", "eps", value),)))

    one = key_of(lambda m, c: 1e-5)
    other = key_of(lambda m, c: 1e-4)
    assert one != other
    assert all(kept.text_of(c.value) for f in IN_HF.values() for c in f.changes if isinstance(c, Set))


def test_another_core_asks_for_sentinels_of_each_kind(rows):
    due = kept.due(diagnosing.tasks(), "another", rows, keep=True)
    assert len(due) == kept.SENTINELS
    assert {(task.what, task.where) for task in due} == {(row["what"], row["where"]) for row in rows}
    assert set(due.values()) == {"sentinels, of a core that changed"}
    assert kept.caption("another", rows) == "full run at another; core changed since"


def test_the_core_of_drift_has_the_definition_and_no_table(monkeypatch):
    before, code = kept.core.__wrapped__(), keys.named_code
    for file in ("drift/session.py", "engines/run_hf.py", "faults/edits.py"):
        changed = ROOT / "verify" / file
        monkeypatch.setattr(keys, "named_code", lambda f, changed=changed: code(f) + ("x" if f == changed else ""))
        assert kept.core.__wrapped__() != before, file
    monkeypatch.setattr(keys, "named_code", lambda f: code(f) + ("x" if f == ROOT / "glm_dsa" / "rope.py" else ""))
    assert kept.core.__wrapped__() != before
    assert all((ROOT / table).read_text().count(kept.BEFORE) == 1 for table in kept.TABLES)


def test_what_is_no_longer_right_is_told(rows):
    row = rows[0]
    name = f"alone {row['names'][0]} in hf, float32"
    assert kept.differences(rows, [row]) == []
    wrong = {**row, "right": False, "found": "ValueError: no"}
    assert kept.differences(rows, [wrong]) == [f"{name}: expected it named as the record has it, got ValueError: no"]
    elsewhere = {**row, "found": {**row["found"], "stage": "norm"}}
    assert kept.differences(rows, [elsewhere]) == [
        f"{name}: expected {row['found']['stage']}, as the record has it, got norm"
    ]


def test_rows_that_were_diagnosed_again_are_marked(rows):
    tasks = diagnosing.tasks()
    old = [{**rows[0], "key": "old"}, *rows[1:]]
    found = [kept.renewed(tasks, old, [rows[0], {**rows[1], "right": False}])[i] for i in (0, 1)]
    assert found == [rows[0] | {"since": kept.core()}, rows[1]], "a sentinel's row stays as the full run had it"
    marked = [found[0], *rows[1:]]
    assert list(kept.due(tasks, kept.core(), marked, keep=False)) == [tasks[0]]
    assert not kept.due(tasks, kept.core(), marked, keep=True)
