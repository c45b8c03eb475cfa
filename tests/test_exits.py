"""How runs end: 0 agrees, 1 FAULT, 10 unreadable, 11 not judged; and that only what is on trial can be at fault."""

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import pytest
import torch

import glm_dsa.__main__
import verify.__main__
from reference import checkpoints, hf, versions
from verify.cases import Case, Spec
from verify.commands import drift as drift_command
from verify.core import exits, interrupts
from verify.core.bounds import ReferencesDisagree
from verify.core.checker import Discrepancy
from verify.core.report import FAULT, MEASURED, NOT_JUDGED, Comparison, Report
from verify.drift.result import Drift
from verify.engines import oracles
from verify.engines.third_party import Failed
from verify.selftest import command as judge_command

ROOT = Path(__file__).parents[1]
RAISES = "raise RuntimeError('built for another torch')\n"
OLD = "__version__ = '5.2.0'\n"


def run(*arguments, path=None):
    """(exit status, what was printed) of a process, with a folder ahead of all others on its path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, filter(None, (path, ROOT))))}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    return done.returncode, done.stdout + done.stderr


def raised_in(package, error):
    """The error, as if code of that package had raised it."""
    scope = {"__name__": package, "error": error}
    exec("def fails():\n    raise error", scope)  # noqa: S102
    try:
        scope["fails"]()
    except BaseException as caught:
        return caught


def raises(error):
    def call(*_, **__):
        raise error

    return call


# -- whose an error is


@pytest.mark.parametrize("package", ["glm_dsa.cache", "mlx.nn.layers.linear", "mlx_lm.models.base"])
def test_what_the_candidate_raises_is_a_fault(package):
    assert oracles.is_fault(raised_in(package, KeyError("x")))


@pytest.mark.parametrize(
    "package", ["transformers.models.x", "torch.nn.modules.linear", "reference.equations", "verify.core.compare"]
)
def test_what_an_oracle_or_the_gate_raises_is_none(package):
    error = raised_in(package, KeyError("x"))
    assert not oracles.is_fault(error)
    who = "the gate itself" if package.startswith("verify") else package.partition(".")[0]
    assert oracles.blame(error).startswith(f"{who} raised KeyError")
    assert package in oracles.blame(error)


def test_what_the_gate_says_is_a_fault():
    """A comparison that failed, somebody's code that failed, a refusal that a test waited for, mlx's C++ without frames."""
    assert oracles.is_fault(raised_in("verify.core.checker", Discrepancy("differs")))
    assert oracles.is_fault(raised_in("verify.implementation.judge", Failed("does not load")))
    assert oracles.is_fault(raised_in("verify.claims.test_weights", AssertionError("not refused")))
    assert not oracles.is_fault(raised_in("verify.cases", AssertionError()))
    with pytest.raises(ValueError, match="reshape") as caught:
        mx.zeros(3).reshape(2)
    assert oracles.is_fault(raised_in("verify.engines.definition", type(caught.value)(str(caught.value))))


def test_no_machine_and_no_disagreement_is_a_fault():
    for error in (MemoryError(), exits.NotJudged("x"), ReferencesDisagree("x")):
        assert not oracles.is_fault(raised_in("glm_dsa.attention", error))


def test_of_several_errors_one_at_fault_is_enough():
    theirs, ours = raised_in("torch.x", ValueError("x")), raised_in("glm_dsa.x", ValueError("x"))
    assert oracles.is_fault(ExceptionGroup("found", [theirs, ours]))
    assert not oracles.is_fault(ExceptionGroup("found", [theirs, theirs]))


def test_what_torch_raises_on_the_way_is_torchs():
    with pytest.raises(RuntimeError) as caught:
        hf.additive_causal_mask(1, 2, 2, torch.float32).expand(3, 3)
    assert not oracles.is_fault(caught.value)


def test_a_checkpoint_that_hf_did_not_finish_is_written_anew(tmp_path, monkeypatch):
    """The next test must not judge what is there of it: we refuse that, and the refusal would be a FAULT."""
    spec = Spec("tiny", checkpoints.tiny(num_hidden_layers=4))
    with monkeypatch.context() as patched:
        patched.setattr("transformers.modeling_utils.safe_save_file", raises(RuntimeError("an oracle's")))
        with pytest.raises(RuntimeError, match="an oracle's"):
            Case(spec, tmp_path, 0)
    case = Case(spec, tmp_path, 0)
    assert case.ours.model is not None
    assert [folder.name for folder in tmp_path.iterdir()] == ["tiny"]


# -- warnings


def warns(package, category=FutureWarning):
    exec("def old():\n    warnings.warn('renamed', category, stacklevel=2)\nold()",  # noqa: S102
         {"__name__": package, "warnings": warnings, "category": category})  # fmt: skip


def test_an_oracles_warning_is_counted_and_our_own_is_an_error():
    """Whatever line it points to: HF's point at ours where we call what it gave up."""
    counts: Counter = Counter()
    with oracles.heard(counts):
        warns("transformers.utils.deprecation")
        warns("transformers.utils.deprecation")
        with pytest.raises(FutureWarning, match="renamed"):
            warns("glm_dsa.cache")
        with pytest.raises(RuntimeWarning):
            warns("reference.equations", RuntimeWarning)
    assert counts == {"transformers: FutureWarning: renamed": 2}
    with pytest.raises(FutureWarning):
        warns("transformers.utils.deprecation")  # heard no more


# -- the report


def report_of(**outcomes):
    report = Report()
    report.claims = {claim: Counter(counts) for claim, counts in outcomes.items()}
    report.comparisons = [Comparison(claim, "case", "stage", "agrees") for claim in outcomes]
    report.unjudged = {(c, "torch raised OSError: x"): ["test"] for c in outcomes if outcomes[c].get(NOT_JUDGED)}
    report.finish()
    return report


def test_fault_beats_not_judged_and_that_beats_agreement():
    sound, without, bad = {"passed": 2}, {"passed": 1, NOT_JUDGED: 1}, {"failed": 1}
    for claims, status, said in (
        ({"a": sound}, 0, "agrees with HF"),
        ({"a": sound, "b": without}, 11, "NOT JUDGED: 1 of 2 claims, 'b': torch raised OSError"),
        ({"a": bad, "b": without}, 1, "FAULT in 1 of 2 claims: 'a'; 1 not judged: 'b'"),
        ({"a": sound, "b": bad}, 1, "FAULT in 1 of 2"),
    ):
        report = report_of(**claims)
        failed = sum(c.get("failed", 0) + c.get(NOT_JUDGED, 0) for c in claims.values())
        assert report.exit_status(int(failed > 0), failed) == status
        assert report.verdict(status).startswith(said)
        assert report.footer(status)["verdict"].startswith(said)
        assert ("b: test" in report.not_verified) == (claims.get("b") is without)
    assert exits.worst([0, 11, 10]) == 10
    assert exits.worst([11, 10, 1]) == 1
    assert exits.worst([]) == 0


def test_pytests_own_status_stays_and_failed_tests_of_no_claim_count():
    assert report_of(a={"passed": 1}).exit_status(2) == 2
    assert report_of(a={"passed": 1}).verdict(2).startswith("NO VERDICT")
    assert report_of(a={NOT_JUDGED: 1}).exit_status(1, failed=2) == 1


def test_what_compared_nothing_is_not_judged():
    report = report_of(a={"passed": 1}, b={"passed": 1})
    report.comparisons.pop()
    assert report.exit_status(0) == 11
    assert report.verdict(11) == "NOT JUDGED: nothing was compared in 'b'"
    measured = Comparison("b", "case", "stage", MEASURED)
    assert not measured.is_judged
    assert Comparison("b", "case", "stage", FAULT).is_judged


def test_an_untried_version_is_said_with_what_the_references_say(monkeypatch):
    monkeypatch.setattr(oracles, "version", lambda: "5.30.0")
    report = report_of(**{"the references agree": {"passed": 1}})
    report.untried = oracles.untried()
    assert report.of_untried() == "transformers 5.30.0: untried, 5.18.0 to 5.24.0 were; the references agree"
    assert report.of_untried() in report.lines(0)
    report.claims["the references agree"][NOT_JUDGED] = 1
    assert report.of_untried().endswith(": not judged")
    monkeypatch.setattr(oracles, "version", lambda: versions.NEWEST)
    assert oracles.untried() == ""


# -- versions


def test_the_versions_that_are_allowed_are_those_that_were_tried():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (allowed,) = [d for d in project["optional-dependencies"]["verify"] if d.startswith("transformers")]
    assert allowed == f"transformers>={'.'.join(versions.OLDEST.split('.')[:2])},<6"
    pinned = re.search(r"^transformers==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned[1] == versions.NEWEST


def test_make_versions_asks_the_references_under_both():
    said = subprocess.run(["make", "-n", "versions"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"for version in {versions.OLDEST} {versions.NEWEST};" in said
    assert "/bin/python -m pytest verify/claims/test_references.py" in said


def test_versions_are_compared_by_their_numbers():
    assert versions.parts("5.24.0.dev0") == (5, 24, 0)
    assert versions.is_too_old("5.2.0")
    assert versions.is_too_old("unknown")
    assert not versions.is_too_old("5.18")
    assert not versions.is_untried("5.9.9")
    assert versions.is_untried("6.0.0rc1")


def test_the_cache_goes_by_the_name_that_hf_gives_it():
    class Before(torch.nn.Module):
        def forward(self, x, past_key_values=None):
            return x

    class After(torch.nn.Module):
        def forward(self, x, cache=None):
            return x

    assert hf.cache_keyword(Before()) == "past_key_values"
    assert hf.cache_keyword(After()) == "cache"


# -- as processes


@pytest.mark.parametrize(
    ("command", "source", "said"),
    [
        ("pytest verify/ -q", RAISES, "transformers: its import raises RuntimeError: built for another torch"),
        ("pytest verify/ -q", OLD, "transformers 5.2.0: too old to judge by"),
        ("verify drift .", RAISES, "transformers: its import raises RuntimeError: built for another torch"),
    ],
)
def test_broken_or_old_transformers_is_one_line_and_not_judged(tmp_path, command, source, said):
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text(source)
    status, out = run(*command.split(), path=tmp_path)
    assert status == exits.NOT_JUDGED, out
    (line,) = out.strip().splitlines()
    assert said in line
    assert f"expected torch, and transformers {versions.OLDEST} to {versions.NEWEST}" in line
    assert "pip install -c constraints.txt" in line


def test_no_torch_is_one_line_and_not_judged(tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    status, out = run("pytest", "verify/", "-q", path=tmp_path)
    assert (status, out.count("\n")) == (exits.NOT_JUDGED, 1), out
    assert "verdict: NOT JUDGED: torch: its import raises ModuleNotFoundError" in out


PLUGIN = """
import pytest, signal, warnings

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background has not

@pytest.fixture(autouse=True)
def changed(monkeypatch):
    import transformers.models.glm_moe_dsa.modeling_glm_moe_dsa as theirs
    scope = dict(before=theirs.GlmMoeDsaTopkRouter.forward, warnings=warnings, __name__=theirs.__name__)
    exec({body!r}, scope)
    monkeypatch.setattr(theirs.GlmMoeDsaTopkRouter, "forward", scope["forward"])
"""
RAISES_TOO = """
def forward(self, *args, **kwargs):
    raise TypeError("no such router")
"""
WARNS_AND_IS_OFF = """
def forward(self, *args, **kwargs):
    warnings.warn("soon gone", FutureWarning)
    logits, weights, experts = before(self, *args, **kwargs)
    return logits, weights * 1.01, experts
"""
INTERRUPTED = """
def forward(self, *args, **kwargs):
    import signal
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise ValueError("could not determine the shape") from None
"""
ONE = ["verify/claims/test_references.py", "-q", "-p", "no:cacheprovider", "-k"]


def references_with(tmp_path, body):
    """One case of the claim, under a router of HF's that was changed: (status, what was printed, the report's records)."""
    (tmp_path / "changed.py").write_text(PLUGIN.format(body=body))
    chosen = [*ONE, "test_hf_agrees and grouped-interleaved and short and float32"]
    status, out = run("pytest", *chosen, "-p", "changed", "--report", tmp_path / "out", path=tmp_path)
    return status, out, [json.loads(line) for line in (tmp_path / "out" / "report.jsonl").read_text().splitlines()]


def test_an_oracle_that_raises_is_not_judged(tmp_path):
    status, out, (_, *found, footer) = references_with(tmp_path, RAISES_TOO)
    assert status == exits.NOT_JUDGED, out
    last = out.strip().splitlines()[-1]
    assert last.startswith("verdict: NOT JUDGED: 1 of")
    assert "transformers raised TypeError: no such router" in last
    assert (footer["exit_status"], footer["claims"]["the references agree"]) == (exits.NOT_JUDGED, NOT_JUDGED)
    assert not [c for c in found if c["verdict"] == FAULT]


def test_an_interrupt_that_torch_makes_an_error_of_ends_the_run(tmp_path):
    status, out, (_, *found, footer) = references_with(tmp_path, INTERRUPTED)
    assert status == pytest.ExitCode.INTERRUPTED, out
    assert out.strip().splitlines()[-1].startswith("verdict: NO VERDICT")
    assert (footer["exit_status"], found) == (status, [])


@pytest.mark.slow("verify/core", "verify/gate", "verify/engines/oracles")
def test_references_that_disagree_are_not_judged_and_a_warning_inside_hf_is_told(tmp_path):
    """The warning is no verdict: the reason given is the disagreement."""
    status, out, (_, *found, footer) = references_with(tmp_path, WARNS_AND_IS_OFF)
    assert status == exits.NOT_JUDGED, out
    last = out.strip().splitlines()[-1]
    assert last.startswith("verdict: NOT JUDGED: 1 of")
    assert "HF and the equations differ at layers." in last
    assert not [c for c in found if c["verdict"] == FAULT]
    (text,) = footer["oracle warnings"]
    assert text == "transformers: FutureWarning: soon gone"
    assert f"  {footer['oracle warnings'][text]} x {text}" in out


# -- commands


def test_what_a_release_lacks_is_its_fault_and_what_cannot_be_read_is_not(tmp_path, capsys):
    folder = checkpoints.write(tmp_path / "ck", checkpoints.glm_5_2(num_hidden_layers=3, first_k_dense_replace=1))
    assert verify.__main__.main(["audit", str(folder)]) == exits.AGREES
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    assert verify.__main__.main(["audit", str(folder)]) == exits.FAULT
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:100])
    capsys.readouterr()
    assert verify.__main__.main(["audit", str(folder)]) == exits.UNREADABLE
    assert shard.name in capsys.readouterr().err
    assert glm_dsa.__main__.main(["inventory", str(folder)]) == exits.UNREADABLE == glm_dsa.__main__.UNREADABLE


def test_a_command_that_breaks_gives_no_verdict(monkeypatch, capsys):
    for error, status, said in (
        (raised_in("transformers.x", ValueError("odd")), exits.NOT_JUDGED, "verify: not judged: transformers raised"),
        (raised_in("verify.audit.audit", ValueError("--x: odd")), exits.UNREADABLE, "verify: --x: odd"),
        (raised_in("verify.audit.audit", TypeError("odd")), exits.NOT_JUDGED, "verify: not judged: the gate itself raised"),
        (exits.NotJudged("no oracle"), exits.NOT_JUDGED, "verify: not judged: no oracle"),
    ):

        def fails(*_, error=error):
            raise error

        monkeypatch.setattr(verify.__main__, "_audit", fails)
        assert verify.__main__.main(["audit", "x"]) == status
        assert capsys.readouterr().err.splitlines()[-1].startswith(said)


@pytest.fixture
def default_handler():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_handler")
@pytest.mark.parametrize("becomes", [ValueError("could not determine the shape"), None])
def test_a_command_that_was_interrupted_says_so_whatever_became_of_it(monkeypatch, capsys, becomes):
    def audit(_):
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        if becomes is not None:
            raise becomes
        return exits.FAULT

    monkeypatch.setattr(verify.__main__, "_audit", audit)
    assert verify.__main__.main(["audit", "x"]) == exits.INTERRUPTED
    assert not capsys.readouterr().err


def test_interrupts_are_noted_and_handled_as_before(default_handler):
    with interrupts.noted() as came:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert came == [signal.SIGINT]
        with ThreadPoolExecutor(1) as pool:  # signals belong to the main thread: nothing is set here
            assert pool.submit(lambda: interrupts.noted().__enter__()).result() == []
    assert signal.getsignal(signal.SIGINT) is default_handler
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interrupts.noted() as came:
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signal.raise_signal(signal.SIGINT)
    assert came == []


def test_drift_is_not_judged_where_all_that_shows_agrees_and_not_all_shows():
    side = type("Side", (), {"dtype": "float32"})()
    seen = Drift(side, side, 8, "", True)
    assert drift_command.status_of(seen) == exits.AGREES
    seen.unseen = ["layers.0.mlp"]
    assert drift_command.status_of(seen) == exits.NOT_JUDGED
    seen.cached = object()
    assert drift_command.status_of(seen) == exits.FAULT
    assert drift_command.status_of(Drift(side, side, 8, "", False)) == exits.FAULT


def test_a_judge_without_a_verdict_on_sound_checkpoints_is_not_content(tmp_path):
    records = [{"type": "header"}, {"type": "footer", "comparisons": 1, "seconds": 1, "verdict": "agrees with HF"}]
    (tmp_path / "report.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert judge_command.sound(tmp_path, 1)["false_alarms"] == []
    records[-1]["verdict"] = "NOT JUDGED: 1 of 2 claims"
    (tmp_path / "report.jsonl").write_text("\n".join(map(json.dumps, records)))
    with pytest.raises(exits.NotJudged, match="NOT JUDGED: 1 of 2"):
        judge_command.sound(tmp_path, 1)


def test_every_exit_status_has_a_meaning():
    known = {value for name, value in vars(exits).items() if name.isupper() and isinstance(value, int)}
    assert known <= set(exits.MEANINGS)
    assert {2, 3, 4, 5} & set(exits.MEANINGS) == {2}  # pytest's own stand in one row
