"""The gate on trial: its own tests, on its own cases, while one fault after another is seeded in the definition.

A pytest plugin (`pytest verify/ -p verify.selftest.judging --judge-out FILE`). References are built in a first pass, without a
fault; after it only MLX runs again. That pass also notes which functions of the definition each test runs: a fault can change the
outcome of those tests alone that run what it changes, so only they are repeated, up to the first that fails.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from _pytest.runner import runtestprotocol

from .. import faults
from ..cases import Case
from ..core import exits, stages
from ..core.report import FAULT, Report
from ..faults import Fault
from ..faults.coverage import recorded


def is_named(fault: Fault, claim: str, stage: str) -> bool:
    """Caught by the claim, and at the stage, that were declared; what follows the stage's name tells the circumstances."""
    begins = re.escape(fault.stage) + r"($|[ ,.(])"
    return claim == fault.claim and re.match(begins, stages.kind(stage.removeprefix("model."))) is not None


class Court:
    """Runs the collected tests again and again: once as they are, then with the definition changed."""

    def __init__(self, config: pytest.Config) -> None:
        from ..gate import plugin

        self.config, self.gate = config, plugin
        self.seconds: dict[pytest.Item, float] = {}

    @property
    def built(self) -> dict[str, Case]:
        return self.config.stash[self.gate.BUILT].cases

    def say(self, line: str) -> None:
        writer = self.config.get_terminal_writer()
        writer.line(line)
        writer.flush()

    def as_it_is(self, items: list[pytest.Item]) -> Mapping[pytest.Item, set[str]]:
        """What each test runs of the definition. Stops where one fails: then there is nothing to judge by."""
        hypothesis.settings.register_profile(
            "no shrinking", hypothesis.settings(), phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate]
        )
        hypothesis.settings.load_profile("no shrinking")
        reached: dict[pytest.Item, set[str]] = {}
        built: dict[str, set[str]] = {}  # by case: what building its model runs, which any of its tests may rely on
        with recorded() as ran:
            for item in items:
                ran.clear()
                started = time.time()
                if any(report.failed for report in self.run(item)):
                    pytest.exit(f"{item.nodeid} fails without a change: mend that first", returncode=exits.NOT_JUDGED)
                reached[item], self.seconds[item] = set(ran), time.time() - started
                case = self.built.get(self.gate.name_of(item))
                if case is not None:
                    reached[item] |= built.get(case.name) or built.setdefault(case.name, self.building(case, ran))
        return reached

    @staticmethod
    def building(case: Case, ran: set[str]) -> set[str]:
        case.__dict__.pop("ours", None)
        ran.clear()
        assert case.ours
        return set(ran)

    def run(self, item: pytest.Item) -> list[pytest.TestReport]:
        return runtestprotocol(item, nextitem=None, log=False)

    def fresh_report(self) -> Report:
        self.config.stash[self.gate.REPORT] = report = Report()
        return report

    def forget_models(self) -> None:
        """A model that was built before keeps what its constructor did."""
        for case in self.built.values():
            case.__dict__.pop("ours", None)


class Judging(Court):
    """Seeds each of `names`. The claim that is to notice it is asked first, the others after it; or all in the gate's order."""

    def __init__(self, config: pytest.Config, names: list[str], out: Path, in_order: bool) -> None:
        super().__init__(config)
        self.names, self.out, self.in_order = names, out, in_order

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        started = time.time()
        reached = self.as_it_is(session.items)
        comparisons, clean = self.config.stash[self.gate.REPORT].judged, time.time() - started
        self.say(f"without a fault: {len(reached)} tests, {comparisons} comparisons, {clean:.0f} s")
        found = {}
        for name in self.names:
            found[name] = self.under(name, reached)
            self.say(f"{name}: {found[name].get('stage', 'not caught')}  [{found[name].get('claim', '-')}]")
        kept = {
            "faults": found, "tests": len(reached), "comparisons": comparisons,
            "seconds": {"without a fault": round(clean), "faults": round(time.time() - started - clean)},
        }  # fmt: skip
        self.out.write_text(json.dumps(kept, indent=1) + "\n")
        self.fresh_report()  # this run gives no verdict on the definition
        return True

    def under(self, name: str, reached: Mapping[pytest.Item, set[str]]) -> dict[str, Any]:
        """The first comparison that fails under a fault, with the figures around it; few where none does."""
        fault = faults.named(name)
        changed = {edit.where for edit in fault.edits}
        report = self.fresh_report()
        self.config.option.fault = [name]
        self.forget_models()
        started = time.time()
        affected = [item for item, ran in reached.items() if ran & changed]
        if not self.in_order:
            affected.sort(key=lambda item: fault.claim != item.module.CLAIM)  # type: ignore[attr-defined]
        for number, item in enumerate(affected):
            self.run(item)
            first = next((c for c in report.comparisons if c.verdict == FAULT), None)
            if first is not None:
                return {
                    "claim": first.claim, "stage": first.stage, "case": first.case, "note": first.note,
                    "bounds": first.share if first.bound else None, "edits": faults.digest(fault),
                    "tests_before": number, "seconds": round(time.time() - started, 1),
                }  # fmt: skip
        return {"tests": len(affected), "edits": faults.digest(fault)}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("glm-dsa judge")
    group.addoption("--judge-out", metavar="FILE", help="where to write what was caught")
    group.addoption("--judge-faults", metavar="NAMES", help="of these faults only, separated by commas")
    group.addoption(
        "--judge-in-order", action="store_true", help="all tests in the gate's order: which claim meets it first?"
    )


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--judge-out"):
        pytest.exit("--judge-out FILE is due: where to write what was caught", returncode=exits.UNREADABLE)
    try:
        names = faults.chosen(config.getoption("--judge-faults"))
    except LookupError as error:
        pytest.exit(str(error), returncode=exits.UNREADABLE)
    out, in_order = Path(config.getoption("--judge-out")), config.getoption("--judge-in-order")
    config.pluginmanager.register(Judging(config, names, out, in_order))
