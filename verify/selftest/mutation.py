"""The mutation test of the definition: each operator, constant and comparison changed in turn (mutants.py); the gate must
notice.

A pytest plugin (`make mutate`). The tests that run what is changed are repeated until one fails, those first that noticed most
for their time; of a test that runs over the gate's cases, the two quickest. Survivors are what nobody would notice: a check is
missing, or the change is equivalent.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from .. import ROOT
from ..faults.coverage import functions
from .judging import Court
from .mutants import Mutant, applied, mutants, reason

BEGUN, SURVIVED = "begun", "survived"
PATIENCE = 60  # seconds for one test; a mutant that hangs is noticed too
BUDGET = 60  # seconds for one mutant, by what its tests took last


class Mutation(Court):
    """Tries the mutants whose number is `share[0]` modulo `share[1]`; goes on where an earlier run of the same file ended.
    every: asks all tests that run what is changed; again: those that survived before, and should not have, are tried once more;
    sizes: mutants of sizes alone."""

    def __init__(
        self,
        config: pytest.Config,
        out: Path,
        only: str,
        share: tuple[int, int],
        every: bool,
        again: bool,
        sizes: bool,
    ) -> None:
        super().__init__(config)
        self.out, self.only, self.share, self.every, self.again, self.sizes = out, only, share, every, again, sizes
        self.noticed: Counter[tuple[str, pytest.Item]] = Counter()  # by function ("" for any) and test

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.without_shrinking()
        self.as_it_was(session.items)
        self.say(f"{len(self.reached)} tests, {sum(self.seconds.values()):.0f} s")
        done = self.done()
        wanted = [m for m in mutants() if m.where.startswith(self.only) and (m.of_size or not self.sizes)]
        chosen = [m for i, m in enumerate(wanted) if i % self.share[1] == self.share[0]]
        with self.out.open("a", encoding="utf-8") as stream:
            for mutant in chosen:
                if mutant.name in done:
                    continue
                record = {"mutant": mutant.name, "line": mutant.line, "change": mutant.change}
                # A mutant that takes the process with it is found begun and not ended.
                for outcome in (BEGUN, None):
                    outcome = outcome or self.fate(mutant)
                    stream.write(json.dumps({**record, "fate": outcome}) + "\n")
                    stream.flush()
        self.fresh_report()
        return True

    def as_it_was(self, items: list[pytest.Item]) -> None:
        """`as_it_is`, once for all processes that follow one another (see `run`)."""
        kept, ids = clean(self.out), {item.nodeid: item for item in items}
        if not kept.exists():
            reached = self.as_it_is(items)
            found = {item.nodeid: (sorted(ran), self.seconds[item]) for item, ran in reached.items()}
            kept.write_text(json.dumps(found), encoding="utf-8")
            return
        for name, (ran, seconds) in json.loads(kept.read_text(encoding="utf-8")).items():
            self.reached[ids[name]], self.seconds[ids[name]] = set(ran), seconds

    def done(self) -> set[str]:
        """What has an end. What was begun twice in a row and never ended is noticed: the process ends with it."""
        ended: set[str] = set()
        begun: Counter[str] = Counter()
        lines = self.out.read_text(encoding="utf-8").splitlines() if self.out.exists() else []
        with self.out.open("a", encoding="utf-8") as stream:
            for record in map(json.loads, lines):
                name, fate = record["mutant"], record["fate"]
                begun[name] = begun[name] + 1 if fate == BEGUN else 0
                if begun[name] > 1:
                    fate = "noticed: the process ends with it"
                    stream.write(json.dumps({**record, "fate": fate}) + "\n")
                once_more = self.again and fate.startswith(SURVIVED) and not reason(record)
                (ended.discard if fate == BEGUN or once_more else ended.add)(name)
        return ended

    def fate(self, mutant: Mutant) -> str:
        """The test that noticed, or "survived" and how many did not."""
        self.fresh_report()
        self.forget_models()
        affected = self.affected(mutant.where, every=self.every or mutant.of_size)
        try:
            with applied(mutant), alarm():
                for item in affected:
                    signal.alarm(PATIENCE + int(20 * self.seconds[item]))  # slow is not hung, on a busy machine
                    started = time.time()
                    reports = self.run(item)
                    self.seconds[item] = time.time() - started  # without the references that the first pass built
                    if any(report.failed for report in reports):
                        self.noticed.update([(mutant.where, item), ("", item)])
                        return f"noticed by {item.nodeid}"
        except LookupError as error:
            return f"cannot be made: {error}"
        except TimeoutError:
            return "noticed: it hangs"
        return f"{SURVIVED} {len(affected)} tests"

    def worth(self, where: str, item: pytest.Item) -> float:
        """What a test noticed of earlier mutants, those of the same function above all, for its time."""
        return (1 + self.noticed["", item] + 20 * self.noticed[where, item]) / self.seconds[item]

    def affected(self, where: str, every: bool) -> list[pytest.Item]:
        """The tests that run a function, as many as a minute holds, those first that are worth most; of one that runs over
        cases, on the two that are quickest: they seldom differ here. Or `every` one."""
        is_constant = where not in functions()
        kinds: dict[Any, list[pytest.Item]] = {}
        for item in sorted(self.reached, key=self.seconds.__getitem__):
            if is_constant or where in self.reached[item]:
                others = getattr(item, "callspec", None) and {**item.callspec.params, "case": None}  # type: ignore[attr-defined]
                kinds.setdefault((item.function, repr(others)), []).append(item)  # type: ignore[attr-defined]
        chosen = [item for kind in kinds.values() for item in (kind if every else kind[:2])]
        chosen.sort(key=lambda item: self.worth(where, item), reverse=True)
        spent = itertools.accumulate(self.seconds[item] for item in chosen)
        return [item for item, until in zip(chosen, spent, strict=True) if until <= BUDGET or every]


@contextmanager
def alarm() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise TimeoutError(f"over {PATIENCE} s")

    before = signal.signal(signal.SIGALRM, ring)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("glm-dsa mutation")
    group.addoption(
        "--mutation-out", metavar="FILE", help="where to note each mutant's fate; an earlier run goes on there"
    )
    group.addoption("--mutate", metavar="WHERE", default="", help="what begins so, e.g. indexer.Indexer.score")
    group.addoption("--mutation-every", action="store_true", help="ask every test that runs what is changed")
    group.addoption(
        "--mutation-again", action="store_true", help="try once more what survived before, equivalent changes aside"
    )
    group.addoption("--mutation-sizes", action="store_true", help="mutants of sizes alone")
    group.addoption("--mutation-share", metavar="I/N", default="0/1", help="every N-th mutant, from the I-th on")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    part, of = map(int, config.getoption("--mutation-share").split("/"))
    out, only = Path(config.getoption("--mutation-out")), config.getoption("--mutate")
    every, again = config.getoption("--mutation-every"), config.getoption("--mutation-again")
    sizes = config.getoption("--mutation-sizes")
    config.pluginmanager.register(Mutation(config, out, only, (part, of), every, again, sizes))


# What takes part: the gate on one case of each family, and the tests of the definition's own files.
OTHERS = "trained or behaviour or glm-5.2-half-split or glm-5.1- or grouped-half-split or (glm-4.7 and not mtp)"
OWN = (
    "bench cache cache_batches cache_copies checkpoint compare config foreign layouts linear memory model plan recipe trace"
    " weights"
)
TESTS = ("verify/", *(f"tests/test_{part}.py" for part in OWN.split()))
PROCESSES = 2


def clean(out: Path) -> Path:
    """Where the first pass, without a mutant, is kept for the processes that follow."""
    return out.with_suffix(".clean.json")


def run(out: Path, only: str, share: str, flags: list[str]) -> None:
    """One share of the mutants. A process that a mutant took with it is followed by another, which goes on after it."""
    clean(out).unlink(missing_ok=True)  # of other code
    command = [sys.executable, "-m", "pytest", *TESTS, "-q", "-p", "no:cacheprovider", "-p", "verify.selftest.mutation"]
    command += ["--mutation-out", str(out), "--mutate", only, "--mutation-share", share]
    command += ["-k", f"not ({OTHERS})"]
    command += [f"--mutation-{flag}" for flag in flags]
    size = -1
    while size < (size := out.stat().st_size if out.exists() else 0):
        if subprocess.run(command, cwd=ROOT).returncode == 0:  # noqa: S603
            return
    print(f"share {share}: ended before its time; its own lines say why", file=sys.stderr)


def noted(files: list[Path]) -> dict[str, dict[str, Any]]:
    """The last that was noted of each mutant."""
    texts = [file.read_text(encoding="utf-8") for file in files if file.exists()]
    return {record["mutant"]: record for text in texts for record in map(json.loads, text.splitlines())}


def score(fates: Mapping[str, dict[str, Any]]) -> str:
    """How many mutants were noticed, and which were not."""
    tried = [f for f in fates.values() if not f["fate"].startswith(("cannot", BEGUN))]
    survivors = [f for f in tried if f["fate"].startswith(SURVIVED)]
    alike = [f for f in survivors if reason(f)]
    counted = len(tried) - len(alike)
    noticed = len(tried) - len(survivors)
    lines = [f"{len(tried)} mutants, {len(alike)} of them equivalent; of the others {noticed} of {counted} noticed "
             f"({noticed / max(counted, 1):.1%})"]  # fmt: skip
    lines += [f"  {f['mutant']} (line {f['line']}): {f['change']}" for f in survivors if not reason(f)]
    return "\n".join([*lines, "equivalent", *(f"  {f['mutant']}: {f['change']}: {reason(f)}" for f in alike)])


def main() -> None:
    """`python -m verify.selftest.mutation`: all mutants, in two processes; goes on where an earlier run in that folder ended."""
    parser = argparse.ArgumentParser(prog="python -m verify.selftest.mutation", description=main.__doc__)
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=Path("mutation"), help="where each mutant's fate is noted"
    )
    parser.add_argument("--only", metavar="WHERE", default="", help="what begins so, e.g. indexer.Indexer.score")
    parser.add_argument("--every", action="store_true", help="ask every test, on all cases, however long it takes")
    parser.add_argument(
        "--again", action="store_true", help="try once more what survived an earlier run in that folder"
    )
    parser.add_argument(
        "--sizes", action="store_true", help="only mutants of sizes: a parameter that is wrong from some size on"
    )
    parser.add_argument("--score", action="store_true", help="run nothing: the score of what was noted")
    asked = parser.parse_args()
    try:
        asked.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {asked.out}: {error.strerror or error}; expected a folder")
    files = [asked.out / f"{i}.jsonl" for i in range(PROCESSES)]
    if not asked.score:
        with ThreadPoolExecutor(PROCESSES) as pool:
            flags = [flag for flag in ("every", "again", "sizes") if getattr(asked, flag)]
            list(pool.map(lambda i: run(files[i], asked.only, f"{i}/{PROCESSES}", flags), range(PROCESSES)))
    print(score(noted(files)))


if __name__ == "__main__":
    main()
