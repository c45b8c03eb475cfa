"""The gate on trial: its own tests, on its own cases, while one fault after another is seeded in the definition.

A pytest plugin (`pytest verify/ -p verify.selftest.judging --judge-out FILE`). References are built in a first pass, without a
fault; after it only MLX runs again. That pass also notes which functions of the definition each test runs: a fault can change the
outcome of those tests alone that run what it changes, so only they are repeated, up to the first that fails. Of a few faults, with
--judge-lazily, the tests of their claims alone are asked, each without a fault when it is first needed.
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
from . import keys


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
        self.reached: dict[pytest.Item, set[str]] = {}  # what each test runs of the definition, without a fault
        self.built_by: dict[
            str, set[str]
        ] = {}  # by case: what building its model runs, which any of its tests may rely on

    @property
    def built(self) -> dict[str, Case]:
        return self.config.stash[self.gate.BUILT].cases

    def say(self, line: str) -> None:
        writer = self.config.get_terminal_writer()
        writer.line(line)
        writer.flush()

    def as_it_is(self, items: list[pytest.Item]) -> Mapping[pytest.Item, set[str]]:
        """What each test runs of the definition."""
        for item in items:
            self.run_clean(item)
        return self.reached

    def run_clean(self, item: pytest.Item) -> None:
        """Notes what a test runs. Stops where it fails: then there is nothing to judge by."""
        with recorded() as ran:
            started = time.time()
            if any(report.failed for report in self.run(item)):
                pytest.exit(f"{item.nodeid} fails without a change: mend that first", returncode=exits.NOT_JUDGED)
            self.reached[item], self.seconds[item] = set(ran), time.time() - started
            case = self.built.get(self.gate.name_of(item))
            if case is not None and case.name not in self.built_by:
                self.built_by[case.name] = self.building(case, ran)
            self.reached[item] |= self.built_by[case.name] if case is not None else set()

    @staticmethod
    def without_shrinking() -> None:
        """Hypothesis: that an example fails is all that is asked."""
        hypothesis.settings.register_profile(
            "no shrinking", hypothesis.settings(), phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate]
        )
        hypothesis.settings.load_profile("no shrinking")

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

    def __init__(self, config: pytest.Config, names: list[str], out: Path, in_order: bool, lazily: bool) -> None:
        super().__init__(config)
        self.names, self.out, self.in_order, self.lazily = names, out, in_order, lazily
        self.keys = {name: keys.key(faults.named(name)) for name in names}  # of what this process has loaded

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.without_shrinking()
        started = time.time()
        if not self.lazily:
            self.as_it_is(session.items)
        comparisons, clean = self.config.stash[self.gate.REPORT].judged, time.time() - started
        self.say(f"without a fault: {len(self.reached)} tests, {comparisons} comparisons, {clean:.0f} s")
        found = {}
        for name in self.names:
            found[name] = self.under(name, session.items)
            self.say(f"{name}: {found[name].get('stage', 'not caught')}  [{found[name].get('claim', '-')}]")
        self.say(f"{len(found)} faults on {len(self.reached)} tests, {time.time() - started:.0f} s")
        kept = {"faults": found, "tests": len(self.reached), "comparisons": comparisons}
        self.out.write_text(json.dumps(kept, indent=1) + "\n")
        self.fresh_report()  # this run gives no verdict on the definition
        return True

    def under(self, name: str, items: list[pytest.Item]) -> dict[str, Any]:
        """The first comparison that fails under a fault, with the figures around it; few where none does."""
        fault, asked = faults.named(name), 0
        changed = {edit.where for edit in fault.edits}
        report = self.fresh_report()
        self.forget_models()
        for item in self.in_turn(fault, items):
            if item not in self.reached:
                self.run_clean(item)
                self.forget_models()  # those that it built have no fault in them
            if not self.reached[item] & changed:
                continue
            self.config.option.fault, asked = [name], asked + 1
            try:
                self.run(item)
            finally:
                self.config.option.fault = []
            first = next((c for c in report.comparisons if c.verdict == FAULT), None)
            if first is not None:
                return {
                    "claim": first.claim, "stage": first.stage, "case": first.case, "note": first.note,
                    "bounds": first.share if first.bound else None, "key": self.keys[name],
                }  # fmt: skip
        return {"tests": asked, "key": self.keys[name]}

    def in_turn(self, fault: Fault, items: list[pytest.Item]) -> list[pytest.Item]:
        """The tests to ask, those of the claim that is to notice first; lazily, no others."""
        if self.lazily:
            files = keys.claim_files(fault)
            items = [item for item in items if item.path in files]
        if self.in_order:
            return items
        return sorted(items, key=lambda item: fault.claim != item.module.CLAIM)  # type: ignore[attr-defined]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("glm-dsa judge")
    group.addoption("--judge-out", metavar="FILE", help="where to write what was caught")
    group.addoption("--judge-faults", metavar="NAMES", help="of these faults only, separated by commas")
    group.addoption(
        "--judge-in-order", action="store_true", help="all tests in the gate's order: which claim meets it first?"
    )
    group.addoption(
        "--judge-lazily",
        action="store_true",
        help="of each fault the tests of its claim alone, and no pass before them",
    )


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--judge-out"):
        pytest.exit("expected --judge-out FILE: where to write what was caught", returncode=exits.UNREADABLE)
    try:
        names = faults.chosen(config.getoption("--judge-faults"))
    except LookupError as error:
        pytest.exit(str(error), returncode=exits.UNREADABLE)
    out, how = Path(config.getoption("--judge-out")), ("--judge-in-order", "--judge-lazily")
    config.pluginmanager.register(Judging(config, names, out, *map(config.getoption, how)))
