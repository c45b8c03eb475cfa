"""The catalogue of faults, how they are seeded, and what is kept of the gate's trial."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import glm_dsa
from glm_dsa import indexer
from tests.gatekeeper import gate
from verify import __main__ as command
from verify import faults
from verify.core import stages
from verify.faults import coverage, edits
from verify.gate import options, plugin
from verify.selftest import judging, keys, scorecard

ROOT = Path(__file__).parents[1]
IN_FIELD = [
    "indexer-rope-layout",
    "indexer-nope-first",
    "indexer-on-shared-layers",
    "shared-layer-goes-dense",
    "shared-from-wrong-layer",
    "indexer-no-relu",
    "indexer-per-head-topk",
    "indexer-caches-zeros",
    "indexer-rmsnorm",
    "indexer-eps",
    "indexer-selects-padding",
    "topk-unmasked-decode",
    "bool-mask-added",
    "latent-eps",
    "mla-rope-half",
    "rope-theta-default",
    "rope-dim-from-head-dim",
    "kv-bits-no-op",
    "kv-quantizes-indexer",
    "trim-main-only",
    "rope-offset-after-cache",
    "router-bias-in-weights",
    "router-group-fill-zero",
    "router-no-norm",
    "router-no-scale",
    "router-bf16",
    "shared-expert-missing",
    "fp8-scale-missed",
    "mtp-dropped",
    "mtp-concat-order",
    "mtp-uses-main-selection",
    "mtp-reuse-skips-key-write",
    "mtp-hidden-before-norm",
    "mtp-feeds-the-same-token",  # mtp-token-fed-twice in the field's list
    "start-forgotten-in-a-batch",  # merged-cache-forgets-first there
    "topk-bucket-overflow",
    "router-weights-from-biased",
    "indexer-eps-zero",
    "indexer-sink-forced",
]


def test_the_catalogue_holds_what_was_seen_in_the_field_and_more():
    assert set(IN_FIELD) <= set(faults.CATALOGUE)
    assert len(faults.CATALOGUE) - len(IN_FIELD) >= 25
    assert len(faults.CATALOGUE) == sum(1 for part in faults.PARTS for _ in part.faults()), "a name comes twice"


@pytest.mark.parametrize("fault", faults.CATALOGUE.values(), ids=lambda fault: fault.name)
def test_a_fault_says_where_it_is_met_and_can_be_seeded(fault):
    assert (fault.claim in plugin.all_claims()) == bool(fault.stage)
    assert fault.stage or fault.equivalent
    codes = {edit.where: edits.find(edit.where).__code__ for edit in fault.edits}
    with faults.seeded(fault.name):
        assert all(edits.find(where).__code__ is not code for where, code in codes.items())
    assert all(edits.find(where).__code__ is code for where, code in codes.items())


def test_a_seed_is_undone_when_what_runs_under_it_fails():
    code = indexer.Indexer.score.__code__
    with pytest.raises(RuntimeError, match="on purpose"), faults.seeded("indexer-no-relu"):
        raise RuntimeError("on purpose")
    assert indexer.Indexer.score.__code__ is code


def test_two_faults_at_once_even_in_one_function():
    assert "mx.maximum" in inspect.getsource(indexer.Indexer.score)
    with faults.seeded("indexer-no-relu", "indexer-ignores-mask"):
        assert "maximum" not in indexer.Indexer.score.__code__.co_names
        assert "inf" not in indexer.Indexer.score.__code__.co_names


def test_a_setter_can_be_found():
    assert edits.find("cache.LayerCache.state.fset").__name__ == "state"
    assert edits.find("cache.LayerCache.state.fset") is not edits.find("cache.LayerCache.state")


def test_a_change_of_nothing_that_runs_is_refused():
    edit = edits.Edit("cache.LayerCache.to_quantized", "bits: int = 8", "bits: int = 4")
    with pytest.raises(LookupError, match="outside of what runs"), edits.edited([edit]):
        pass


@pytest.mark.parametrize("due", ["there is no such text", "axis=-1"])
def test_words_that_do_not_stand_there_once_are_refused(due):
    edit = edits.Edit("indexer.Indexer._rotate_first", due, "")
    with pytest.raises(LookupError, match="expected once"), edits.edited([edit]):
        pass


def test_functions_that_run_are_noted():
    config = glm_dsa.ModelArgs.from_dict
    with coverage.recorded() as ran:
        assert config is not None
        glm_dsa.rope.softmax_scale(type("Args", (), {"qk_head_dim": 4, "rope_scaling": None})())
    assert ran == {"rope.softmax_scale"}


def test_a_fault_is_named_by_claim_and_stage():
    fault = faults.named("indexer-no-relu")
    assert judging.is_named(fault, fault.claim, "layers.2.self_attn.indexer.scores")
    assert judging.is_named(fault, fault.claim, "self_attn.indexer.scores (chunks)")
    assert not judging.is_named(fault, fault.claim, "layers.2.self_attn.indexer.scores_of_others")
    assert not judging.is_named(fault, "final logits", "layers.2.self_attn.indexer.scores")
    assert not judging.is_named(fault, fault.claim, "layers.2.self_attn.indexer.topk")


# -- the commands


def test_the_catalogue_is_listed(capsys):
    assert command.main(["faults"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(faults.CATALOGUE)
    assert command.main(["faults", "indexer-eps"]) == 0
    assert "`eps=args.indexer_norm_eps` -> `eps=1e-5`" in capsys.readouterr().out
    assert command.main(["faults", "indexer-esp"]) == 10
    assert capsys.readouterr().err.strip() == (
        "verify: no fault is named 'indexer-esp' (indexer-eps?); `python -m verify faults` lists them"
    )
    for arguments, line in {
        "--faults no-such": "no fault is named 'no-such'", "--random 0": "--random 0: expected 1 or more",
        "--kept --keep": "--kept runs nothing", "--keep --faults indexer-eps": "--keep keeps a record of all faults",
        "--json no/such/file": "--json no/such/file: expected a file in a folder",
        "--json verify": "--json verify: expected a file in a folder",
        "--kept --random 50": "--kept runs nothing", "--kept --in-order": "--kept runs nothing",
        "--changed --kept": "--changed chooses", "--changed --faults indexer-eps": "--changed chooses",
        "--release": "--release is asked of the kept record: add --kept",
    }.items():  # fmt: skip
        assert command.main(["judge", *arguments.split()]) == 10
        err = capsys.readouterr().err
        assert err.startswith(f"verify: {line}")
        assert err.count("\n") == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", "1\n2", '{"rules": ["x"], "clean": [], "random": {}}'])
def test_a_record_that_is_none(tmp_path, text):
    with pytest.raises(ValueError, match="No such file or directory; python -m verify judge --keep writes it"):
        scorecard.Judged.read(tmp_path / "none.jsonl")
    (tmp_path / "odd.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"odd.jsonl: no record of a judge"):
        scorecard.Judged.read(tmp_path / "odd.jsonl")


@pytest.mark.slow("verify/selftest", "verify/faults", "verify/gate", "verify/core", "verify/cases")
def test_judging_ends_to_end_on_two_faults(tmp_path, capfd):
    """Two that are caught; with every part of it as a process, and no pass before."""
    names = "experts-gelu,router-softmax"
    chosen = ["-k", "router or embedding", "-p", "no:cacheprovider"]
    arguments = [
        "verify/claims/test_router.py",
        "-q",
        "-p",
        "verify.selftest.judging",
        "--judge-out",
        str(tmp_path / "out"),
        "--judge-faults",
        names,
        "--judge-lazily",
    ]
    out = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, *chosen], cwd=ROOT, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stdout
    assert "without a fault: 0 tests, 0 comparisons" in out.stdout
    found = json.loads((tmp_path / "out").read_text())["faults"]
    assert {name: (f["claim"], f["stage"]) for name, f in found.items()} == {
        "experts-gelu": ("router and experts", "mlp.experts"),
        "router-softmax": ("router and experts", "mlp.gate.weights"),
    }
    assert all(found[name]["key"] == keys.key(faults.named(name)) for name in found)


def test_bad_options(given):
    with pytest.raises(LookupError, match="no fault is named 'x'"):
        options.Asked.of(given({"--fault": ["x"]}))
    with pytest.raises(ValueError, match="--fault seeds our definition"):
        options.Asked.of(given({"--fault": ["indexer-eps"], "--implementation": "mine.py"}))
    with pytest.raises(ValueError, match="--random -1: how many"):
        options.Asked.of(given({"--random": -1}))


def test_a_seeded_gate_fails_and_says_what_was_seeded():
    arguments = ["verify/claims/test_rope.py", "-q", "--fault", "rope-backwards", "-k", "test_rotation and 2047"]
    status, said = gate(*arguments)
    assert status == 1
    assert "the definition as it is: seeded with rope-backwards: turns by minus the angle" in said
    assert "FAULT in 1 of" in said.strip().splitlines()[-1]


# -- what is kept


@pytest.fixture(scope="module")
def kept():
    return scorecard.Judged.read()


def test_every_fault_was_judged_and_named(kept):
    assert set(kept.found) == set(kept.rules["faults"]) == set(faults.CATALOGUE), (
        "run `python -m verify judge --changed --keep`"
    )
    assert kept.problems() == []
    assert kept.random["cases"] >= 50


def test_the_table_tells_what_was_once_passed(kept):
    assert set(faults.CATALOGUE) >= faults.ONCE_PASSED
    assert kept.markdown().count("(once passed)") == len(faults.ONCE_PASSED)


def test_values_move_far_beyond_their_bound(kept):
    """Where a value is compared, a fault moves it by 100 bounds, but for those that are slight by nature."""
    near = {name: f["bounds"] for name, f in kept.found.items() if f.get("bounds") and f["bounds"] < 100}
    slight = [name for name in near if "slightly" not in faults.named(name).shows]
    assert slight == []


def test_a_judge_that_is_not_content_says_why(kept):
    record = {**kept.record, "faults": {**kept.found, "indexer-eps": {"tests": 3}}}
    record["random"] = {**kept.random, "false_alarms": ["random-3, logits: error 3"]}
    problems = scorecard.Judged(record).problems()
    assert "indexer-eps: not caught; declared: self_attn.indexer.k [indexer scores and selections]" in problems
    assert "false alarms: random-3, logits: error 3" in problems
    assert stages.kind("layers.0.output") == "output"
