"""The gate as a process: its last lines, its report, its options, and what it refuses."""

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
import torch

from reference import checkpoints, kept
from tests.gatekeeper import gate
from verify import cases
from verify.core.report import AGREES, FAULT, Comparison, Report
from verify.gate import options, plugin


def report_with(outcomes, comparisons=(), **not_verified):
    report = Report()
    report.claims = {claim: Counter(counts) for claim, counts in outcomes.items()}
    report.comparisons = [Comparison(*c) for c in comparisons]
    report.not_verified = not_verified
    report.finish()
    return report


GOOD = ("a", "case", "stage", AGREES)


def test_a_run_with_nothing_left_out_says_so():
    assert (
        report_with({"a": {"passed": 2}}, [GOOD]).verdict(0)
        == "agrees with HF and the equations in 1 of 1 claims, 1 comparisons"
    )


def test_no_silent_green():
    """Zero cases, a test that compared nothing, a skipped claim, an odd exit: none reads as a pass."""
    assert report_with({}).verdict(0).startswith("NOT JUDGED")
    assert report_with({"a": {"passed": 1}}, [GOOD]).verdict(2).startswith("NO VERDICT")
    for outcomes in ({"passed": 1}, {"skipped": 1}, {"deselected": 3}, {}):
        report = report_with({"a": {"passed": 1}, "b": outcomes}, [GOOD])
        assert "b" in report.not_verified
        assert report.verdict(0).endswith("1 not verified, listed above")
        assert "in 1 of 2 claims" in report.verdict(0)
    assert "FAULT in 1 of 2 claims: 'b'" in report_with(
        {"a": {"passed": 1}, "b": {"passed": 1, "failed": 1}}, [GOOD]
    ).verdict(0)


def test_a_claim_with_skipped_tests_agrees_in_part():
    report = report_with({"a": {"passed": 1, "skipped": 1}}, [GOOD])
    assert report.verdict_of("a") == "agrees in part"


def test_a_run_that_ended_early_has_no_verdict():
    """Interrupted, whatever the exit status says."""
    report = report_with({"a": {"passed": 3}}, [GOOD])
    report.planned["a"] = 4
    report.finish()
    assert report.verdict(0).startswith("NO VERDICT")
    assert report.verdict_of("a") == "agrees in part"
    assert report.not_verified["a: not run"] == "the run ended before"


def test_an_earlier_report_does_not_stay(tmp_path):
    (tmp_path / "report.jsonl").write_text('{"type": "footer", "verdict": "agrees"}')
    Report(tmp_path).clear()
    assert (tmp_path / "report.jsonl").read_text() == ""


def test_a_single_test_is_a_part():
    status, out = gate(
        "verify/claims/test_rope.py::test_frequencies[64-linear]",
        "verify/claims/test_layers.py",
        "--layers",
        "77",
        "-k",
        "64-linear or glm-4.7",
    )
    assert status == 11
    assert "rope, both layouts: left out: others of its tests: the command line names single ones" in out
    assert "verdict: NOT JUDGED: nothing was compared" in out.strip().splitlines()[-1]


def test_a_case_that_is_judged_in_some_claims_names_claims_that_exist():
    assert set(cases.HALF_SPLIT_CLAIMS) < set(plugin.all_claims())


def test_an_exact_check_that_failed_is_the_worst():
    assert Comparison("a", "case", "stage", FAULT).share == float("inf")


def test_bad_options_are_one_line():
    status, out = gate("verify/", "--checkpoint", "nowhere")
    assert status == 10
    assert "nowhere: no such folder" in out
    assert "Traceback" not in out


def test_what_a_file_judges(given):
    """A file that is named is collected, whatever the options: it must say itself that it has nothing to judge."""
    release, others = plugin.CLAIMS / "test_release.py", plugin.CLAIMS / "test_rope.py"
    theirs = plugin.CLAIMS / "test_implementation_cache.py"
    plain, on_code = given({}), given({"--implementation": "x"})
    assert plugin.left_out(release, plain) == "judges a release: add --checkpoint DIR_OR_REPO"
    assert not plugin.left_out(release, given({"--checkpoint": "x"}))
    assert not plugin.left_out(others, plain)
    assert not plugin.left_out(theirs, on_code)
    assert plugin.left_out(others, on_code).startswith("--implementation is judged by test_implementation*.py")
    assert plugin.left_out(theirs, plain).startswith("--implementation is judged by test_implementation*.py")
    assert not plugin.left_out(Path("tests/test_rope.py"), on_code)


def test_a_fault_named_twice_is_seeded_once(given):
    options.Asked.of(given({"--fault": ["indexer-eps", "indexer-eps"]}))


def test_what_modules_draw_is_the_same_in_each_run(given):
    def drawn(seed):
        plugin.pytest_runtest_setup(SimpleNamespace(config=given({"--seed": seed})))
        return mx.random.normal((3,)).tolist(), torch.randn(3).tolist()

    assert drawn(0) == drawn(0) != drawn(1)


def test_bad_options_that_need_no_process(given):
    with pytest.raises(ValueError, match="--layers 0-99999999999: expected numbers and ranges"):
        options.parse_layers("0-99999999999")
    with pytest.raises(ValueError, match="--layers 0-x: expected numbers and ranges"):
        options.parse_layers("0-x")
    with pytest.raises(ValueError, match=r"--report README.md: a file is there"):
        Report(Path("README.md")).clear()
    with pytest.raises(NotADirectoryError):
        Report(Path("README.md/sub")).clear()
    with pytest.raises(ValueError, match="--seed -1: expected 0 or more"):
        options.Asked.of(given({"--seed": -1}))
    with pytest.raises(pytest.exit.Exception, match="run it without -n"):
        plugin.pytest_configure(given({"numprocesses": 2}))
    with pytest.raises(ValueError, match="--index-topk belongs to --checkpoint"):
        options.Asked.of(given({"--index-topk": 8, "--device": "cpu"}))
    with pytest.raises(ValueError, match="--tokens belongs to --checkpoint without --implementation"):
        options.Asked.of(given({"--checkpoint": "ck", "--implementation": "mine.py", "--tokens": 8}))
    with pytest.raises(ValueError, match="--tokens belongs to --checkpoint"):
        options.Asked.of(given({"--tokens": 0}))
    for option in ("--real-shape", "--long"):
        with pytest.raises(ValueError, match=f"{option} belongs to our definition: .* --implementation"):
            options.Asked.of(given({"--implementation": "mine.py", option: True}))
    for asked in ({"--random": -3}, {"--implementation": "mine.py"}, {"--implementation": "mine.py", "--random": -3}):
        with pytest.raises(ValueError, match=r"--random -?\d: how many checkpoints, 1 or more, and no --checkpoint"):
            options.Asked.of(given({"--random": 2} | asked))


def test_a_checkpoint_of_ones_own(tmp_path, given):
    """Judged under its own conventions; a report with header, comparisons and footer; what was left out is listed."""
    folder = checkpoints.write(tmp_path / "release", checkpoints.glm_5_2(index_topk=512, num_hidden_layers=4))
    asked = options.Asked.of(given({"--checkpoint": str(folder)}))
    assert (asked.specs, asked.release.name) == ([], "release")
    assert "add --index-topk 16" in asked.only
    arguments = [
        "--index-topk",
        "16",
        "--report",
        str(tmp_path / "out"),
        "--layers",
        "0-1",
        "-k",
        "release and (rope or router or layers or logits)",
    ]
    status, out = gate("verify/", "--checkpoint", str(folder), *arguments)
    assert status == 0, out
    last = next(line for line in out.splitlines() if line.startswith("verdict: "))
    assert last.startswith("verdict: agrees with HF and the equations in")
    assert "not verified, listed above" in last
    assert "indexer_rope = interleaved (key indexer_rope_interleave)" in out
    assert "stages of other layers: --layers 0-1" in out
    assert "torch 2." in out
    header, *comparisons, footer = [
        json.loads(line) for line in (tmp_path / "out" / "report.jsonl").read_text().splitlines()
    ]
    assert (header["type"], footer["type"]) == ("header", "footer")
    assert header["versions"]["transformers"]
    assert header["conventions"]["indexer_rope = interleaved (key indexer_rope_interleave)"] == ["release"]
    assert header["cases"] == ["release"]
    assert footer["comparisons"] == sum(c["verdict"] != "measured" for c in comparisons) > 100
    assert footer["verdict"] in last
    assert {c["verdict"] for c in comparisons} == {"agrees", "measured"}
    assert not [c for c in comparisons if c["stage"].startswith(("layers.2.", "layers.3."))]


def test_a_kept_checkpoint_that_is_not_as_its_card_says_stops_the_gate(tmp_path):
    folder = Path(shutil.copytree(kept.TRAINED / "interleaved", tmp_path / "kept"))
    kept.check_kept(folder)
    for damage, message in (
        (lambda: (folder / "config.json").write_text("{}"), "config.json: not the file of the model card"),
        (lambda: (folder / "config.json").unlink(), "config.json: not the file of the model card"),
        (lambda: (folder / "more.json").write_text("{}"), "config.json: not the file of the model card"),
        (lambda: (folder / "measured.json").unlink(), "not as this repository keeps it"),
    ):
        damage()
        kept.check_kept.cache_clear()
        with pytest.raises(ValueError, match=message):
            kept.check_kept(folder)
    kept.check_kept.cache_clear()


def test_tests_that_were_left_out_for_one_reason_take_one_line():
    more = {
        "a: test_x[1]": "no such case",
        "a: test_x[2]": "no such case",
        "a: test_y": "too long",
        "Metal": "no such case",
    }
    report = report_with({"a": {"passed": 1, "skipped": 3}}, [GOOD], **more)
    assert report.open_lines() == ["a: 2 tests: no such case", "a: test_y: too long", "Metal: no such case"]
    assert report.verdict(0).endswith("3 not verified, listed above")


def test_one_fault_of_many_layers_takes_one_line_with_the_worst_figures():
    report = report_with({"a": {"failed": 3}})
    for layer, error in ((0, 2.0), (1, 7.5), (2, 3.0)):
        report.add(
            Comparison("a", "case", f"layers.{layer}.output", FAULT, error, 1.0, note=f"error {error}, so many bounds")
        )
    report.add(Comparison("a", "case", "layers.1.output", FAULT, note="does not hold: finite logits"))
    assert report.faults() == [
        "  layers 0-2, output: error 7.5, so many bounds  [case]",
        "  layer 1, output: does not hold: finite logits  [case]",
    ]
