"""Options of the gate, its fixtures, and the hooks that turn a pytest run into a verdict."""

from __future__ import annotations

import re
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import torch

from glm_dsa.errors import GlmDsaError

from . import cases, report, theirs
from .implementation import Implementation
from .judge import Judge
from .on_trial import OnTrial
from .release import headers_of

REPORT = pytest.StashKey[report.Report]()
REAL_SHAPE = "one layer at GLM-5.2's true widths"
RELEASE = "test_release.py"
IMPLEMENTATION = "test_implementation"  # how the files are named that judge somebody's code


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("glm-dsa gate")
    group.addoption(
        "--checkpoint",
        metavar="DIR_OR_REPO",
        help="judge this release, of any size: HF's layout or mlx-lm's, packed or not",
    )
    group.addoption(
        "--implementation",
        metavar="MODULE[:CLASS]",
        help="judge this MLX code in the place of glm_dsa: a module, or a .py file, that exports ModelArgs and Model "
        "(or CLASS) as mlx-lm's do; on the gate's own checkpoints, or on --checkpoint",
    )
    group.addoption(
        "--index-topk", metavar="K", type=int, help="with --checkpoint: lower index_topk, so that short prompts pass it"
    )
    group.addoption(
        "--tokens", metavar="N", type=int, help="with --checkpoint: the prompt's length (default: 4 index_topk)"
    )
    group.addoption("--seed", type=int, default=0, help="of weights and prompts (default 0)")
    group.addoption("--layers", metavar="LIST", help="judge only these layers' stages, e.g. 0-3,6")
    group.addoption("--report", metavar="DIR", help="write report.jsonl there: header, one record a comparison, footer")
    group.addoption("--real-shape", action="store_true", help=f"also judge {REAL_SHAPE} (minutes, 9 GiB)")


def pytest_configure(config: pytest.Config) -> None:
    try:
        layers = _layers(config.getoption("--layers"))
        implementation = _implementation(config.getoption("--implementation"))
        specs, release, why = _on_trial(config, layers)
        target = config.getoption("--report")
        out = report.Report(Path(target) if target else None)
        out.clear()
    except (ValueError, OSError) as error:  # GlmDsaError too
        pytest.exit(str(error), returncode=1)
    out.header = {
        "versions": report.versions(), "seed": config.getoption("--seed"), "dtype": "float32", "device": "cpu",
        "command": "pytest " + shlex.join(config.invocation_params.args),
        "cases": [s.name for s in specs] or [release.name] if release else [s.name for s in specs],
    }  # fmt: skip
    mx.set_default_device(mx.cpu)  # on a Mac the default would be Metal
    out.not_verified["16 bit, and Metal or CUDA"] = "the verdict is given in float32 on the CPU"
    for spec in specs:
        for convention in spec.args.conventions:
            if implementation is not None and convention.name.startswith("mtp"):
                continue  # nobody's draft is judged
            out.conventions.setdefault(str(convention), []).append(spec.name)
        if spec.claims and implementation is None:
            out.not_verified[f"{spec.name}, other claims"] = f"left out for time; judged in: {', '.join(spec.claims)}"
        if spec.args.num_nextn_predict_layers and not spec.has_mtp and implementation is None:
            out.not_verified[f"MTP of {spec.name}"] = (
                "config.json names an MTP layer, but the checkpoint has no tensors for it"
            )
    if release is not None:
        if release.args.has_indexer:
            out.not_verified["that the indexers were trained under this RoPE layout"] = (
                "HF runs them under the same one; reference.layout.captured_mass tells it from text and weights"
            )
        for convention in () if specs else release.args.conventions:
            out.conventions.setdefault(str(convention), []).append(release.name)
    out.header["conventions"] = out.conventions
    config.stash[REPORT] = out
    config.glm_layers, config.glm_specs = layers, specs  # type: ignore[attr-defined]
    config.glm_release, config.glm_only_release = release, why  # type: ignore[attr-defined]
    config.glm_implementation = implementation  # type: ignore[attr-defined]
    if implementation is not None:
        out.header["implementation"] = implementation.text
        out.not_verified |= theirs.NOT_VERIFIED
        torch.set_num_threads(1)  # on tiny tensors two threads wait for each other more than they work


def _layers(text: str | None) -> set[int] | None:
    if text is None:
        return None
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", part.strip())
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"--layers {text}: numbers and ranges such as 0-3,6 are due")
        chosen |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return chosen


def _implementation(text: str | None) -> Implementation | None:
    return None if text is None else Implementation.of(text)


def _on_trial(config: pytest.Config, layers: set[int] | None) -> tuple[list[cases.Spec], OnTrial | None, str]:
    """(checkpoints that all claims are held to, the release that is judged layer by layer, why only so)."""
    checkpoint, topk, tokens = (config.getoption(o) for o in ("--checkpoint", "--index-topk", "--tokens"))
    if checkpoint is None:
        for option, value in (("--index-topk", topk), ("--tokens", tokens)):
            if value is not None:
                raise ValueError(f"{option} belongs to --checkpoint")
        return cases.default_specs() if config.getoption("--implementation") is None else theirs.specs(), None, ""
    if config.getoption("--implementation") is not None:
        if tokens is not None:
            raise ValueError("--tokens belongs to --checkpoint without --implementation")
        return [theirs.check(cases.spec_of(Path(checkpoint), topk))], None, ""
    headers = headers_of(checkpoint)
    release = OnTrial.of(headers, topk, tokens, layers)
    try:
        return [cases.spec_of(release.folder, topk)], release, ""
    except GlmDsaError:
        raise
    except ValueError as error:
        return [], release, str(error).removeprefix(f"--checkpoint {release.folder}: ")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """What judges a release has nothing to say without one; somebody's code is judged by its own files alone."""
    if collection_path.parent != Path(__file__).parent or not collection_path.name.startswith("test_"):
        return None
    is_judged_here = collection_path.name.startswith(IMPLEMENTATION)
    if config.getoption("--implementation") is not None:
        return None if is_judged_here else True
    if is_judged_here:
        return True
    return True if collection_path.name == RELEASE and config.getoption("--checkpoint") is None else None


# -- fixtures


@pytest.fixture(scope="session")
def gate(request: pytest.FixtureRequest) -> report.Report:
    return request.config.stash[REPORT]


_built: dict[str, cases.Case] = {}
_theirs: dict[str, theirs.Theirs] = {}


@pytest.fixture(name=theirs.FIXTURE)
def on_trial(request: pytest.FixtureRequest, case: cases.Case) -> theirs.Theirs:
    """The implementation on a case; what one test finds wrong with it, the next ones know."""
    implementation = request.config.glm_implementation  # type: ignore[attr-defined]
    return _theirs.setdefault(case.name, theirs.Theirs(implementation, case))


@pytest.fixture
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> cases.Case:
    spec: cases.Spec = request.param
    if spec.name not in _built:
        scratch = tmp_path_factory.getbasetemp() / "checkpoints"
        _built[spec.name] = cases.Case(spec, scratch, request.config.getoption("--seed"))
    return _built[spec.name]


@pytest.fixture
def judge(request: pytest.FixtureRequest, gate: report.Report) -> Judge:
    seed = request.config.getoption("--seed")
    again = ["pytest", request.node.nodeid] + (["--seed", str(seed)] if seed else [])
    for option in ("--implementation", "--checkpoint", "--index-topk", "--tokens"):
        value = request.config.getoption(option)
        again += [] if value is None else [option, str(value)]
    again += ["--real-shape"] if request.config.getoption("--real-shape") else []
    return Judge(gate, request.module.CLAIM, shlex.join(again), seed, request.config.glm_layers)  # type: ignore[attr-defined]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`case` runs over all checkpoints that have what the test needs: `needs("indexer")`, "shared" (layers), "mtp"; over one
    of each family where layouts make no difference (`any_layout`)."""
    if "layer" in metafunc.fixturenames and metafunc.module.__name__.endswith("test_release"):
        metafunc.parametrize("layer", metafunc.config.glm_release.layers)  # type: ignore[attr-defined]
    if "case" not in metafunc.fixturenames:  # "theirs" brings it
        return
    needs = {what for mark in metafunc.definition.iter_markers("needs") for what in mark.args}
    claim = getattr(metafunc.module, "CLAIM", None)
    every = metafunc.config.glm_specs  # type: ignore[attr-defined]
    specs = [s for s in every if needs <= s.has and (not s.claims or claim in s.claims)]
    if any(metafunc.definition.iter_markers("any_layout")):
        specs = list({s.family: s for s in reversed(specs)}.values())[::-1]
    if not specs:
        why = f"no checkpoint of this run has what it needs: {', '.join(sorted(needs))}"
        metafunc.parametrize("case", [pytest.param(None, marks=pytest.mark.skip(reason=why))])
        return
    metafunc.parametrize("case", specs, ids=[s.name for s in specs], indirect=True)


# -- from outcomes to a verdict


def all_claims(of_implementations: bool = False) -> list[str]:
    """Every claim of the gate, whether its file was collected or not; or those on somebody's implementation."""
    files = [file for file in sorted(Path(__file__).parent.glob("test_*.py")) if file.name != RELEASE]
    files = [file for file in files if file.name.startswith(IMPLEMENTATION) == of_implementations]
    texts = (file.read_text(encoding="utf-8") for file in files)
    return [match[1] for text in texts if (match := re.search(r'^CLAIM = "(.*)"$', text, re.MULTILINE))]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    out = config.stash[REPORT]
    if why := config.glm_only_release:  # type: ignore[attr-defined]
        others = [item for item in items if item.path.name != RELEASE]
        items[:] = [item for item in items if item.path.name == RELEASE]
        for item in others:
            if hasattr(getattr(item, "module", None), "CLAIM"):
                out.leave_out(item.module.CLAIM, 1, f"not of this release: {why}")  # type: ignore[attr-defined]
    # The references judge first: nothing else counts until they agree.
    items.sort(key=lambda item: getattr(getattr(item, "module", None), "ORDER", 1))
    ours = [item for item in items if hasattr(getattr(item, "module", None), "CLAIM")]
    for item in ours:
        out.claims.setdefault(item.module.CLAIM, Counter())  # type: ignore[attr-defined]
    if any("::" in str(argument) for argument in config.args):
        for claim in list(out.claims):
            out.leave_out(claim, 1, "others of its tests: the command line names single ones")
    for claim in all_claims(config.glm_implementation is not None) if ours else ():  # type: ignore[attr-defined]
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
    session.config.stash[REPORT].planned.update(claim for claim in claims if claim is not None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Any:
    result = yield
    claim = getattr(getattr(item, "module", None), "CLAIM", None)
    if claim is not None and (result.when == "call" or result.outcome != "passed"):
        out = item.config.stash[REPORT]
        outcome = "failed" if result.outcome == "failed" else result.outcome
        out.claims.setdefault(claim, Counter())[outcome] += 1
        if outcome == "skipped":
            reason = result.longrepr[2] if isinstance(result.longrepr, tuple) else str(result.longrepr)
            reason = reason.removeprefix("Skipped: ")
            if theirs.FIXTURE in getattr(item, "fixturenames", ()):  # a line for each reason, not for each test
                name = item.callspec.params["case"].name  # type: ignore[attr-defined]
                theirs.add_name(out.not_verified, f"{claim}: {reason}", name)
            else:
                out.not_verified[f"{claim}: {item.name}"] = reason
    return result


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    out = session.config.stash.get(REPORT, None)
    if out is None or not out.claims:
        return
    out.finish()
    empty = [c for c in out.claims if out.claims[c]["passed"] and out.verdict_of(c) == report.NOT_VERIFIED]
    if empty and session.exitstatus == 0:
        session.exitstatus = 1  # a claim whose tests passed without comparing anything is no pass
    if session.config.glm_layers is not None:  # type: ignore[attr-defined]
        out.not_verified["stages of other layers"] = f"--layers {session.config.getoption('--layers')}"
    out.header["exit_status"] = int(session.exitstatus)
    out.close(int(session.exitstatus))


def pytest_unconfigure(config: pytest.Config) -> None:
    """The last lines of a run, after pytest's own."""
    out = config.stash.get(REPORT, None)
    if out is not None and out.claims and "exit_status" in out.header:
        sys.stdout.write("\n" + "\n".join(out.lines(out.header["exit_status"])) + "\n")
        sys.stdout.flush()
