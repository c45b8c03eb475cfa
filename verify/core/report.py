"""What a run says: a record for each comparison, a table of claims, what was not verified, versions and conventions."""

from __future__ import annotations

import json
import platform
import re
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from glm_dsa.text import table

from . import exits, sizes, stages
from .plain import plain

PACKAGES = ("mlx", "mlx-lm", "torch", "transformers", "numpy", "safetensors", "pytest", "hypothesis")
AGREES, FAULT, NOT_VERIFIED = "agrees", "FAULT", "not verified"
NOT_JUDGED = "not judged"  # of a claim or a comparison: what should judge it failed
RAISES = "raises"  # the stage of a test that ended in an error of its own, not in a comparison
NO_VERDICT = "NO VERDICT"
REFERENCES = "the references agree"  # the claim that comes before all others
FIGURES = re.compile(r"\d[\d.,]*(e[-+]?\d+)?")
MEASURED = "measured"  # a figure that is reported, and judged by nothing


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


@dataclass(frozen=True)
class Comparison:
    """One stage of one case held against its reference."""

    claim: str
    case: str
    stage: str
    verdict: str
    error: float = 0.0
    bound: float = 0.0
    ties: int = 0
    note: str = ""
    exact_ties: int = 0  # queries of the reference's whose boundary is between equal scores

    @property
    def is_judged(self) -> bool:
        """Whether it could have failed."""
        return self.verdict not in (MEASURED, NOT_JUDGED)

    @property
    def share(self) -> float:
        """Error over bound; exact checks count as 0 or, failed, as infinite."""
        if self.bound:
            return self.error / self.bound
        return 0.0 if self.verdict != FAULT else float("inf")


@dataclass
class Report:
    """Collects as the run goes. With a folder, writes report.jsonl: header, comparisons, footer.

    A file without its footer is of a run that did not end: reject it.
    """

    folder: Path | None = None
    header: dict[str, Any] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)
    claims: dict[str, Counter] = field(default_factory=dict)  # claim -> outcomes of its tests
    planned: Counter = field(default_factory=Counter)  # claim -> tests that were collected and not deselected
    not_verified: dict[str, str] = field(default_factory=dict)  # what -> why
    unjudged: dict[tuple[str, str], list[str]] = field(default_factory=dict)  # (claim, why) -> tests without a verdict
    warned: Counter = field(default_factory=Counter)  # what the oracles warned of -> how often
    untried: str = ""  # of which version an oracle is, where it was never tried
    conventions: dict[str, list[str]] = field(default_factory=dict)  # line -> cases
    told: set[str] = field(default_factory=set)  # claims whose figures are printed too
    sizes: dict[str, set[int]] = field(default_factory=dict)  # axis (sizes.py) -> the sizes that were really run
    sizes_are_due: bool = False  # whether every test of the claim about sizes is to run
    started: float = field(default_factory=time.time)
    judged_so_far: int = 0  # comparisons of the tests that have ended

    def clear(self) -> None:
        """An earlier run's report must not be taken for this one's. Raises ValueError or OSError."""
        if self.folder is None:
            return
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"--report {self.folder}: a file is there; expected the name of a folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "report.jsonl").unlink(missing_ok=True)  # and whatever a link of this name leads to stays
        (self.folder / "report.jsonl").write_text("")

    def open(self) -> None:
        self._write({"type": "header", **self.header})

    def leave_out(self, claim: str, tests: int, why: str) -> None:
        """Tests of a claim that this run was told not to run."""
        outcomes = self.claims.setdefault(claim, Counter())
        outcomes["left out"] += tests
        self.not_verified[f"{claim}: left out"] = why

    def ran(self, **found: int) -> None:
        """What a test has just run, by the axes of sizes.py."""
        for axis, size in found.items():
            assert axis in sizes.AXES, axis
            self.sizes.setdefault(axis, set()).add(size)

    def add(self, comparison: Comparison) -> None:
        self.comparisons.append(comparison)
        self._write({"type": "comparison", **asdict(comparison)})

    def saw_fault(self, claim: str) -> bool:
        """Whether the test that runs has recorded a fault."""
        return any(c.verdict == FAULT and c.claim == claim for c in self.comparisons[self.judged_so_far :])

    def _write(self, record: dict[str, Any]) -> None:
        if self.folder is not None:
            with (self.folder / "report.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(plain(record), allow_nan=False) + "\n")

    def verdict_of(self, claim: str) -> str:
        outcomes = self.claims[claim]
        if outcomes["failed"]:
            return FAULT
        if outcomes[NOT_JUDGED]:
            return NOT_JUDGED
        if not outcomes["passed"] or not any(c.claim == claim and c.is_judged for c in self.comparisons):
            return NOT_VERIFIED
        in_part = set(outcomes) > {"passed"} or claim in self.unfinished()
        return "agrees in part" if in_part else AGREES

    def finish(self) -> None:
        """Turns what did not run into lines of its own."""
        if self.sizes_are_due and set(self.claims[sizes.CLAIM]) == {"passed"}:
            for what in sizes.missing(self.sizes):
                self.claims[sizes.CLAIM][NOT_JUDGED] += 1
                self.unjudged.setdefault((sizes.CLAIM, "a size in use that no case ran"), []).append(what)
        for (claim, why), tests in self.unjudged.items():
            more = f" and {len(tests) - 1} more" if tests[1:] else ""
            self.not_verified[f"{claim}: {tests[0]}{more}"] = f"{NOT_JUDGED}: {why}"
        for claim in self.unfinished():
            self.not_verified[f"{claim}: not run"] = "the run ended before"
        for claim, outcomes in self.claims.items():
            if self.verdict_of(claim) == NOT_VERIFIED and not any(w.startswith(claim) for w in self.not_verified):
                why = "its tests ran, but compared nothing" if outcomes["passed"] else "none of its tests ran"
                self.not_verified[claim] = why

    def unfinished(self) -> list[str]:
        """Claims of which a planned test did not run."""
        ran = {c: sum(self.claims[c][o] for o in ("passed", "failed", "skipped", NOT_JUDGED)) for c in self.planned}
        return [claim for claim, tests in self.planned.items() if ran[claim] < tests]

    @property
    def judged(self) -> int:
        """Comparisons that could have failed."""
        return sum(c.is_judged for c in self.comparisons)

    def _are(self, verdict: str) -> list[str]:
        return [claim for claim in self.claims if self.verdict_of(claim) == verdict]

    def _empty(self) -> list[str]:
        """Claims whose tests passed without comparing anything: that is no pass."""
        return [claim for claim in self._are(NOT_VERIFIED) if self.claims[claim]["passed"]]

    def exit_status(self, ended: int, failed: int = 0) -> int:
        """What the run exits with. `ended`: pytest's own status, of which 2 to 5 stay; `failed`: its failed tests."""
        if ended not in (exits.AGREES, exits.FAULT, exits.NOT_JUDGED):
            return ended
        ours = sum(outcomes["failed"] + outcomes[NOT_JUDGED] for outcomes in self.claims.values())
        is_fault = self._are(FAULT) or failed > ours  # or tests of no claim, that were run along
        has_none = ended == exits.NOT_JUDGED or self._are(NOT_JUDGED) or self._empty() or not self.judged
        return exits.worst([exits.FAULT] * bool(is_fault) + [exits.NOT_JUDGED] * bool(has_none or self.unfinished()))

    def footer(self, exit_status: int) -> dict[str, Any]:
        verdicts = {claim: self.verdict_of(claim) for claim in self.claims}
        return {
            "type": "footer", "claims": verdicts, "comparisons": self.judged,
            "ties": sum(c.ties for c in self.comparisons),
            "exact_ties": sum(c.exact_ties for c in self.comparisons),
            "not_verified": self.not_verified, "verdict": self.verdict(exit_status),
            "sizes": {axis: sorted(found) for axis, found in self.sizes.items()},
            "oracle warnings": dict(self.warned), "untried": self.of_untried(),
            "exit_status": exit_status, "seconds": round(time.time() - self.started, 1),
        }  # fmt: skip

    def close(self, exit_status: int) -> None:
        self._write(self.footer(exit_status))

    def verdict(self, exit_status: int) -> str:
        """The final line. It never reads as a pass where something was not looked at."""
        faults, unjudged = self._are(FAULT), self._are(NOT_JUDGED)
        if faults:
            also = f"; {len(unjudged)} not judged: {'; '.join(map(repr, unjudged))}" if unjudged else ""
            return f"FAULT in {len(faults)} of {len(self.claims)} claims: {'; '.join(map(repr, faults))}{also}"
        if exit_status not in (exits.AGREES, exits.NOT_JUDGED):
            return f"{NO_VERDICT}: the run did not end as it should (exit status {exit_status})"
        if unjudged:
            why = next((why for claim, why in self.unjudged if claim in unjudged), "what should judge failed")
            names = "; ".join(map(repr, unjudged))
            return f"NOT JUDGED: {len(unjudged)} of {len(self.claims)} claims, {names}: {why}"
        if not self.judged or (exit_status and (empty := self._empty())):
            return f"NOT JUDGED: nothing was compared{f' in {empty[0]!r}' if self.judged else ''}"
        if exit_status or self.unfinished():
            return f"{NO_VERDICT}: the run did not end as it should (exit status {exit_status})"
        agreeing = sum(self.verdict_of(c) == AGREES for c in self.claims)
        line = f"agrees with HF and the equations in {agreeing} of {len(self.claims)} claims, {self.judged} comparisons"
        return line + (f"; {len(self.open_lines())} not verified, listed above" if self.not_verified else "")

    def open_lines(self) -> list[str]:
        """What was not verified, and why: tests of one claim that were left out for one reason in one line, and whole claims."""
        groups: dict[tuple[str, str], list[str]] = {}
        for what, why in self.not_verified.items():
            claim, _, test = what.partition(": ")
            of_test = claim in self.claims and test.startswith("test_")
            of_claim = what in self.claims or test == "not run"
            groups.setdefault((claim if of_test else "" if of_claim else what, why), []).append(what)
        lines = []
        for (group, why), whats in groups.items():
            many = f"{group}: {len(whats)} tests" if group else f"{len(whats)} claims"
            lines.append(f"{whats[0] if len(whats) == 1 else many}: {why}")
        return lines

    def of_untried(self) -> str:
        """What is said of an oracle's version that was never tried; the references' own claim decides on it."""
        if not self.untried:
            return ""
        said = {AGREES: "the references agree", NOT_VERIFIED: "whether the references agree was not asked"}
        verdict = self.verdict_of(REFERENCES) if REFERENCES in self.claims else NOT_VERIFIED
        return f"{self.untried}; {said.get(verdict, f'that the references agree: {verdict}')}"

    def _cases(self, names: list[str]) -> str:
        everywhere = {name for cases in self.conventions.values() for name in cases}
        return "all cases" if set(names) == everywhere else ", ".join(names)

    def faults(self) -> list[str]:
        """Each fault in one line, with the layers and the cases that have it; its figures are those of the worst."""
        groups: dict[tuple[str, str], list[Comparison]] = {}
        for c in self.comparisons:
            if c.verdict == FAULT:
                what = FIGURES.sub("#", c.note) if c.bound else c.note  # a bound's figures are each layer's own
                groups.setdefault((stages.kind(c.stage), what), []).append(c)
        out = []
        for (kind, _), group in groups.items():
            note = max(group, key=lambda c: c.share).note
            layers, cases = stages.layers_of(c.stage for c in group), dict.fromkeys(c.case for c in group)
            out.append(f"  {f'{layers}, {kind}' if layers else kind}: {note}  [{', '.join(cases)}]")
        return out

    def lines(self, exit_status: int) -> list[str]:
        rows = [("claim", "compared", "worst error / bound, and where", "ties", "exact ties", "verdict")]
        for claim in self.claims:
            mine = [c for c in self.comparisons if c.claim == claim and c.is_judged]
            bounded = [c for c in mine if c.bound]
            worst = max(bounded, key=lambda c: c.share, default=None)
            where = f"{worst.share:.2f}  {worst.stage} [{worst.case}]" if worst else ("exact" if mine else "-")
            ties, exact = (str(sum(getattr(c, kind) for c in mine)) for kind in ("ties", "exact_ties"))
            rows.append((claim, str(len(mine)), where, ties, exact, self.verdict_of(claim)))
        out = table(rows, ruled=True)
        faults = self.faults()
        out += ["", "faults", *faults] if faults else []
        out += ["", "not verified"] + [f"  {line}" for line in self.open_lines()] if self.not_verified else []
        figures = [c for c in self.comparisons if c.claim in self.told and c.verdict == MEASURED]
        out += ["", "measured"] + [f"  {c.stage}: {c.note}" for c in figures] if figures else []
        out += ["", "conventions in force"] + [f"  {line}  [{self._cases(c)}]" for line, c in self.conventions.items()]
        out += ["", "sizes that were run", *(f"  {line}" for line in sizes.lines(self.sizes))] if self.sizes else []
        out += ["", "oracle warnings"] + [f"  {n} x {text}" for text, n in self.warned.items()] if self.warned else []
        out += ["", "  ".join(f"{k} {v}" for k, v in self.header.get("versions", {}).items())]
        out += [self.of_untried()] if self.untried else []
        out += [self.header.get("command", ""), "", f"verdict: {self.verdict(exit_status)}"]
        return out
