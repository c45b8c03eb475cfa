"""`python -m verify judge`: every fault against this gate and against the rules of others, and the gate against sound models."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .. import ROOT, faults
from ..core import report
from ..core.exits import NotJudged
from . import changed, keys
from .scorecard import Judged, undeclared


class Failed(NotJudged):
    """A part of the judging ended without a result."""


GATE = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]


def judge(names: list[str], random: int, in_order: bool, tell: Callable[[str], None]) -> Judged:
    """Three processes, two at a time: on this gate's time most of the work is MLX on one thread."""
    only, core = ",".join(names), keys.core()
    with TemporaryDirectory(prefix="glm-dsa-judge-") as scratch, ThreadPoolExecutor(2) as pool:
        folder = Path(scratch)
        parts = {
            "faults": [*GATE, "verify/", *judging(folder, only)],
            "rules": [sys.executable, "-m", "verify.selftest.baselines", str(folder / "rules"), "--faults", only,
                      "--random", str(random)],
            "random": [*GATE, "verify/", "--random", str(random), "--report", str(folder / "random")],
        }  # fmt: skip
        parts["faults"] += ["--judge-in-order"] if in_order else []
        printed = together(pool, parts, tell)
        gate, rules = (result(folder, name, printed) for name in ("faults", "rules"))
        record = {"full": core, "versions": report.versions(), "random": sound(folder / "random", random), **gate}
    return Judged({**record, "cases": rules.pop("cases"), "rules": rules})


def judge_changed(keep: bool, processes: int, tell: Callable[[str], None]) -> tuple[Judged, list[str]]:
    """(the kept record, with the rows that are new if they are to be kept; what is not as it was declared or kept)."""
    kept = Judged.read()
    due = changed.due(kept.record, keep)
    tell(str(due))
    claims = sorted({str(file) for name in due.names for file in keys.claim_files(faults.named(name))})
    only = ",".join(due.names)
    with TemporaryDirectory(prefix="glm-dsa-judge-") as scratch, ThreadPoolExecutor(processes) as pool:
        folder = Path(scratch)
        parts = {"random": [*GATE, "verify/", "--random", str(changed.RANDOM), "--report", str(folder / "random")]}
        if due.names:
            parts["faults"] = [*GATE, *claims, *judging(folder, only), "--judge-lazily"]
        if due.stale and keep:  # a row of the record has the rules' signs too
            parts["rules"] = [sys.executable, "-m", "verify.selftest.baselines", str(folder / "rules"), "--faults",
                              ",".join(due.stale), "--random", "0"]  # fmt: skip
        printed = together(pool, parts, tell)
        found = {name: result(folder, name, printed) for name in ("faults", "rules") if name in parts}
        alarms = sound(folder / "random", changed.RANDOM)["false_alarms"]
    rows = found["faults"]["faults"] if due.names else {}
    lines = [*changed.differences(kept.record, rows), *undeclared(rows), *(f"false alarm: {line}" for line in alarms)]
    if "rules" in found:
        kept = Judged(changed.renewed(kept.record, {"faults": rows, "rules": found["rules"]}))
    return kept, list(dict.fromkeys(lines))


def judging(folder: Path, only: str) -> list[str]:
    return ["-p", "verify.selftest.judging", "--judge-out", str(folder / "faults"), "--judge-faults", only]


def together(pool: ThreadPoolExecutor, parts: Mapping[str, list[str]], tell: Callable[[str], None]) -> dict[str, str]:
    """{part: its last lines}."""
    runs = {name: pool.submit(run, name, command, tell) for name, command in parts.items()}
    try:
        return {name: run.result() for name, run in runs.items()}
    except KeyboardInterrupt:
        pool.shutdown(cancel_futures=True)
        raise


def result(folder: Path, name: str, printed: Mapping[str, str]) -> dict[str, Any]:
    """What a part wrote. Raises Failed where it wrote nothing."""
    if not (folder / name).exists():
        raise Failed(f"{name}: no result; its last lines:\n{printed[name]}")
    return json.loads((folder / name).read_text())


def run(name: str, command: list[str], tell: Callable[[str], None]) -> str:
    """The last lines that a part printed; each line is told as it comes."""
    last: list[str] = []
    ends: list[str] = []  # that say why it ended
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:  # noqa: S603
        assert process.stdout is not None
        for line in process.stdout:
            last = [*last[-9:], line]
            ends += [line] if "Exit: " in line or line.startswith("verdict: ") else []
            tell(f"[{name}] {line.rstrip()}")
    return "".join([*(line for line in ends if line not in last), *last])


def sound(folder: Path, count: int) -> dict[str, Any]:
    """What the gate said of random sound checkpoints. Raises Failed where that run has no end, or no verdict."""
    lines = (folder / "report.jsonl").read_text().splitlines() if (folder / "report.jsonl").exists() else []
    records = [json.loads(line) for line in lines]
    if not records or records[-1]["type"] != "footer":
        raise Failed("random: the gate's run on random checkpoints did not end")
    alarms = [r for r in records if r["type"] == "comparison" and r["verdict"] == report.FAULT]
    last = records[-1]
    if not last["verdict"].startswith((report.AGREES, report.FAULT)):  # no alarm, and no silence either
        raise Failed(f"random: the gate's run on random checkpoints gave no verdict: {last['verdict']}")
    return {
        "cases": count, "comparisons": last["comparisons"], "verdict": last["verdict"],
        "false_alarms": [f"{r['case']}, {r['stage']}: {r['note']}" for r in alarms],
    }  # fmt: skip
