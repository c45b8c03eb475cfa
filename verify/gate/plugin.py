"""Options of the gate, its fixtures, and the hooks that turn a pytest run into a verdict."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from .. import FOLDER
from ..core import exits
from ..engines import oracles

try:
    oracles.check()
except exits.NotJudged as error:  # before pytest has begun, so that no hook of it could say this
    print(f"verdict: NOT JUDGED: {error}", file=sys.stderr)
    raise SystemExit(exits.NOT_JUDGED) from None

import mlx.core as mx
import torch

from .. import cases, faults
from ..core import interrupts, report, sizes
from ..core.checker import Discrepancy, Judge
from ..core.progress import Progress
from ..core.report import FAULT, RAISES, Comparison
from ..implementation import subject as theirs
from ..release.resume import Saved
from ..release.run import Trial
from . import options
from .options import ASKED, Asked

CLAIMS = FOLDER / "claims"
REPORT = pytest.StashKey[report.Report]()
INTERRUPTS = pytest.StashKey[list[int]]()
BY_LAYER = "the release, layer by layer"
RELEASE = "test_release"  # how the files are named that judge a release
PRINTED = 6  # failures that are printed in full
WIDE = 1024  # from this hidden size on, torch's work is worth all cores
IMPLEMENTATION = "test_implementation"  # how the files are named that judge somebody's code
# The references judge first: nothing else counts until they agree. Then from the parts to the whole, so that the first fault
# met is the one nearest to its cause.
ORDER = (
    "references", "config", "weights", "rope", "router", "indexer", "attention", "layers", "logits", "indexshare", "cache",
    "positions", "sizes", "cache_sizes", "packed_sizes", "kv_quantization", "cache_operations", "mtp", "behaviour",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    options.add(parser)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None) or hasattr(config, "workerinput"):
        pytest.exit("the gate keeps one report, in one process: run it without -n", returncode=exits.UNREADABLE)
    until_the_end = ExitStack()
    config.add_cleanup(until_the_end.close)
    config.stash[INTERRUPTS] = until_the_end.enter_context(interrupts.noted())
    try:
        asked = Asked.of(config)
        target = config.getoption("--report")
        out = report.Report(Path(target) if target else None)
        out.clear()
    except exits.NotJudged as error:
        obey(config)
        pytest.exit(f"NOT JUDGED: {error}", returncode=exits.NOT_JUDGED)
    except (ValueError, LookupError, OSError) as error:  # GlmDsaError too
        obey(config)
        pytest.exit(str(error), returncode=exits.UNREADABLE)
    for argument in config.args:  # what is named is collected, whatever pytest_ignore_collect says
        if why := left_out((config.invocation_params.dir / argument.partition("::")[0]).resolve(), config):
            pytest.exit(f"{argument}: {why}", returncode=exits.UNREADABLE)
    out.conventions, out.not_verified = asked.conventions(), asked.not_verified(config)
    out.untried = oracles.untried()
    out.header = {
        "versions": report.versions(), "seed": config.getoption("--seed"),
        "dtype": config.getoption("--dtype"), "device": config.getoption("--device"),
        "command": "pytest " + shlex.join(str(a) for a in config.invocation_params.args if a != "--resume"),
        "cases": asked.names, "conventions": out.conventions, "untried": out.untried,
    }  # fmt: skip
    if asked.release is not None:
        out.told.add(BY_LAYER)
        if asked.release.args.hidden_size >= WIDE:
            torch.set_num_threads(os.cpu_count() or 1)
    if asked.implementation is not None:
        out.header["implementation"] = asked.implementation.text
    config.stash[REPORT], config.stash[ASKED], config.stash[BUILT] = out, asked, Built()


def obey(config: pytest.Config) -> None:
    """Ends the run, where an interrupt came and did not end it: what became of it is no failure of anybody's."""
    if config.stash[INTERRUPTS]:
        raise KeyboardInterrupt


def pytest_report_header(config: pytest.Config) -> list[str]:
    """What a release will take, before anything of it is read."""
    release = config.stash[ASKED].release
    return [] if release is None else [release.memory(), f"run on {release.prompt}"]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if left_out(collection_path, config) else None


def left_out(file: Path, config: pytest.Config) -> str:
    """Why a file has nothing to judge in this run; empty where it has."""
    if file.parent != CLAIMS or not file.name.startswith("test_"):
        return ""
    is_of_implementations = file.name.startswith(IMPLEMENTATION)
    if is_of_implementations != (config.getoption("--implementation") is not None):
        return f"--implementation is judged by {IMPLEMENTATION}*.py alone, and they judge nothing else"
    if file.name.startswith(RELEASE) and config.getoption("--checkpoint") is None:
        return "judges a release: add --checkpoint DIR_OR_REPO"
    return ""


# -- fixtures


@pytest.fixture(scope="session")
def gate(request: pytest.FixtureRequest) -> report.Report:
    return request.config.stash[REPORT]


@dataclass
class Built:
    """What a run has built so far, by the names of its cases: what one test made, the next ones use."""

    cases: dict[str, cases.Case] = field(default_factory=dict)
    theirs: dict[str, theirs.Theirs] = field(default_factory=dict)


BUILT = pytest.StashKey[Built]()


@pytest.fixture(name=theirs.FIXTURE)
def on_trial(request: pytest.FixtureRequest, case: cases.Case) -> theirs.Theirs:
    """The implementation on a case; what one test finds wrong with it, the next ones know."""
    implementation = request.config.stash[ASKED].implementation
    assert implementation is not None
    return request.config.stash[BUILT].theirs.setdefault(case.name, theirs.Theirs(implementation, case))


@pytest.fixture
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> cases.Case:
    spec: cases.Spec = request.param
    built = request.config.stash[BUILT].cases
    if spec.name not in built:
        scratch = tmp_path_factory.getbasetemp() / "checkpoints"
        built[spec.name] = cases.Case(spec, scratch, request.config.getoption("--seed"))
    return built[spec.name]


@pytest.fixture(scope="session")
def trial(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> Iterator[Trial]:
    """The release's one pass. What an interrupted run needs is let go when all was judged."""
    release = pytestconfig.stash[ASKED].release
    assert release is not None
    if release.refused:
        pytest.skip("it does not load")
    seed, cache = pytestconfig.getoption("--seed"), getattr(pytestconfig, "cache", None)
    chosen = [pytestconfig.getoption(option) for option in ("keyword", "markexpr", "--fault")]
    saved = Saved(cache and cache.mkdir("glm-dsa"), [release.identity(seed), chosen])
    if not pytestconfig.getoption("--resume"):
        saved.drop()
    with faults.seeded(*pytestconfig.getoption("--fault")):  # what a fault does in constructors is done here
        running = Trial(release, seed, saved, timed=pytestconfig.getoption("--timings"))
    capturing: Any = pytestconfig.pluginmanager.getplugin("capturemanager")
    aside = capturing.global_and_fixture_disabled if capturing else nullcontext
    finished = len(running.finished) if pytestconfig.getoption("--resume") else None
    progress = Progress(release.nbytes(), aside, finished)
    running.tell, running.passed = progress.at, progress.layer
    yield running
    progress.close()
    if {"logits", "top"} <= set(running.said):
        saved.drop()


@pytest.fixture
def judge(request: pytest.FixtureRequest, gate: report.Report) -> Judge:
    asked, seed = request.config.stash[ASKED], request.config.getoption("--seed")
    again = ["pytest", request.node.nodeid] + (["--seed", str(seed)] if seed else [])
    return Judge(gate, request.module.CLAIM, shlex.join([*again, *options.again(request.config)]), seed, asked.layers)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`case` runs over all checkpoints that have what the test needs: `needs("indexer")`, "shared" (layers), "mtp"; over one
    of each family where layouts and trained weights make no difference (`any_layout`)."""
    asked = metafunc.config.stash[ASKED]
    if "layer" in metafunc.fixturenames and metafunc.module.__name__.endswith("test_release"):
        release = asked.release
        assert release is not None
        metafunc.parametrize("layer", release.layers[:1] if release.refused else release.layers)
    if "case" not in metafunc.fixturenames:  # "theirs" brings it
        return
    needs = {what for mark in metafunc.definition.iter_markers("needs") for what in mark.args}
    claim = getattr(metafunc.module, "CLAIM", None)
    own = getattr(metafunc.module, "SPECS", None)  # checkpoints of a claim's own
    if own is not None and asked.is_of_definition:
        chosen = {name for mark in metafunc.definition.iter_markers("on") for name in mark.args}
        specs = [s for s in own if not chosen or s.name in chosen]
    elif own is not None:
        specs = []
    else:
        specs = [s for s in asked.specs if needs <= s.has and (not s.claims or claim in s.claims)]
    if any(metafunc.definition.iter_markers("any_layout")):
        one = list({s.family: s for s in reversed(specs)}.values())[::-1]
        if len(one) < len(specs):
            where = "formats, padded drafts, cache sequences, packed runs: other RoPE layouts, trained weights"
            metafunc.config.stash[REPORT].not_verified[where] = "left out for time: neither makes a difference there"
        specs = one
    if not specs:
        why = f"no checkpoint of this run has what it needs: {', '.join(sorted(needs))}"
        if own is not None:
            why = "of the definition, whatever it runs on: pytest verify/ without a checkpoint"
        metafunc.parametrize("case", [pytest.param(None, marks=pytest.mark.skip(reason=why))])
        return
    metafunc.parametrize("case", specs, ids=[s.name for s in specs], indirect=True)


# -- from outcomes to a verdict


def files_of(claim: str) -> set[str]:
    every = CLAIMS.glob("test_*.py")
    return {file.name for file in every if f'\nCLAIM = "{claim}"' in file.read_text(encoding="utf-8")}


def all_claims(of_implementations: bool = False) -> list[str]:
    """Every claim of the gate, whether its file was collected or not; or those on somebody's implementation."""
    files = [file for file in sorted(CLAIMS.glob("test_*.py")) if not file.name.startswith(RELEASE)]
    files = [file for file in files if file.name.startswith(IMPLEMENTATION) == of_implementations]
    texts = (file.read_text(encoding="utf-8") for file in files)
    return [match[1] for text in texts if (match := re.search(r'^CLAIM = "(.*)"$', text, re.MULTILINE))]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    out, asked = config.stash[REPORT], config.stash[ASKED]
    if asked.only:
        items[:] = [item for item in items if item.path.name.startswith(RELEASE)]
    if config.getoption("--random"):
        items[:] = [item for item in items if "case" in getattr(item, "fixturenames", ())]
        out.not_verified["what needs no checkpoint"] = "--random judges checkpoints alone"
    places = {f"test_{part}.py": place for place, part in enumerate(ORDER)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
    ours = [item for item in items if hasattr(getattr(item, "module", None), "CLAIM")]
    for item in ours:
        out.claims.setdefault(item.module.CLAIM, Counter())  # type: ignore[attr-defined]
    if any("::" in str(argument) for argument in config.args):
        for claim in list(out.claims):
            out.leave_out(claim, 1, "others of its tests: the command line names single ones")
    for claim in all_claims(asked.implementation is not None) if ours and not asked.only else ():
        out.claims.setdefault(claim, Counter())  # files that the command line does not name
    if ours:
        out.open()


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        if hasattr(getattr(item, "module", None), "CLAIM"):
            out = item.config.stash[REPORT]
            out.leave_out(item.module.CLAIM, 1, "tests deselected on the command line")  # type: ignore[attr-defined]


def pytest_collection_finish(session: pytest.Session) -> None:
    claims = (getattr(getattr(item, "module", None), "CLAIM", None) for item in session.items)
    out = session.config.stash[REPORT]
    out.planned.update(claim for claim in claims if claim is not None)
    files = {item.path.name for item in session.items if getattr(getattr(item, "module", None), "CLAIM", None) == sizes.CLAIM}
    out.sizes_are_due = files == files_of(sizes.CLAIM) and not out.claims[sizes.CLAIM]["left out"]


@pytest.hookimpl(wrapper=True, trylast=True)  # inside pytest's own, which makes errors of warnings
def pytest_collection(session: pytest.Session) -> Any:
    with oracles.heard(session.config.stash[REPORT].warned):
        return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """What modules draw where they are made is the same in each run: mlx's own first seed is the clock."""
    seed = item.config.getoption("--seed")
    mx.random.seed(seed)
    torch.manual_seed(seed)


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    with oracles.heard(item.config.stash[REPORT].warned):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Any:
    """Seeded faults are in force while a test runs, not while checkpoints and references are prepared."""
    with faults.seeded(*pyfuncitem.config.getoption("--fault")):
        try:
            return (yield)
        except Discrepancy as found:
            pytest.fail(str(found), pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Any:
    obey(item.config)
    result = yield
    claim = getattr(getattr(item, "module", None), "CLAIM", None)
    if claim is not None and (result.when == "call" or result.outcome != "passed"):
        out = item.config.stash[REPORT]
        outcome = result.outcome
        if outcome == "failed" and not out.saw_fault(claim):
            assert call.excinfo is not None
            stage = f"{RAISES} {call.excinfo.typename}"
            if oracles.is_fault(call.excinfo.value):
                out.add(Comparison(claim, name_of(item), stage, FAULT, note=one_line(call)))
            else:
                outcome, why = report.NOT_JUDGED, oracles.blame(call.excinfo.value)
                out.add(Comparison(claim, name_of(item), stage, outcome, note=why))
                out.unjudged.setdefault((claim, why), []).append(item.name)
        out.claims.setdefault(claim, Counter())[outcome] += 1
        out.judged_so_far = len(out.comparisons)
        if outcome == "skipped":
            reason = result.longrepr[2] if isinstance(result.longrepr, tuple) else str(result.longrepr)
            reason = reason.removeprefix("Skipped: ")
            if theirs.FIXTURE in getattr(item, "fixturenames", ()):  # a line for each reason, not for each test
                name = item.callspec.params["case"].name  # type: ignore[attr-defined]
                theirs.add_name(out.not_verified, f"{claim}: {reason}", name)
            else:
                out.not_verified[f"{claim}: {item.name}"] = reason
    return result


def name_of(item: pytest.Item) -> str:
    """The case that a test is about."""
    case = getattr(getattr(item, "callspec", None), "params", {}).get("case")
    return case.name if isinstance(case, cases.Spec) else item.name


def one_line(call: pytest.CallInfo) -> str:
    assert call.excinfo is not None
    first = str(call.excinfo.value).splitlines()
    return f"{call.excinfo.typename}: {first[0] if first else 'no message'}"


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    out = session.config.stash.get(REPORT, None)
    if out is None or not out.claims:
        return
    out.finish()
    session.exitstatus = out.exit_status(int(session.exitstatus), session.testsfailed)
    if session.config.stash[ASKED].layers is not None:
        out.not_verified["stages of other layers"] = f"--layers {session.config.getoption('--layers')}"
    out.header["exit_status"] = int(session.exitstatus)
    out.close(int(session.exitstatus))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any) -> Any:
    """A release at fault in each of its layers would fill pages: the first failures are printed, the report lists them all."""
    stats, failed = terminalreporter.stats, terminalreporter.stats.get("failed", [])
    if failed[PRINTED:]:
        stats["failed"] = failed[:PRINTED]
    try:
        return (yield)
    finally:
        if failed[PRINTED:]:
            stats["failed"] = failed
            terminalreporter.write_line(
                f"{len(failed) - PRINTED} more tests failed; the faults below are those of all of them"
            )


def pytest_unconfigure(config: pytest.Config) -> None:
    """The last lines of a run, after pytest's own."""
    out = config.stash.get(REPORT, None)
    if out is not None and out.claims and "exit_status" in out.header:
        sys.stdout.write("\n" + "\n".join(out.lines(out.header["exit_status"])) + "\n")
        sys.stdout.flush()
