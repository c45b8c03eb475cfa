"""`python -m verify judge`: every fault against this gate and against the rules of others, and the gate against sound models."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .. import ROOT
from ..core import report
from ..core.exits import NotJudged
from .scorecard import Judged


class Failed(NotJudged):
    """A part of the judging ended without a result."""


def judge(names: list[str], random: int, in_order: bool, tell: Callable[[str], None]) -> Judged:
    """Three processes, two at a time: on this gate's time most of the work is MLX on one thread."""
    only, started = ",".join(names), time.time()
    with TemporaryDirectory(prefix="glm-dsa-judge-") as scratch, ThreadPoolExecutor(2) as pool:
        folder = Path(scratch)
        gate = [sys.executable, "-m", "pytest", "verify/", "-q", "-p", "no:cacheprovider"]
        parts = {
            "faults": [*gate, "-p", "verify.selftest.judging", "--judge-out", str(folder / "faults"), "--judge-faults", only],
            "rules": [sys.executable, "-m", "verify.selftest.baselines", str(folder / "rules"), "--faults", only,
                      "--random", str(random)],
            "random": [*gate, "--random", str(random), "--report", str(folder / "random")],
        }  # fmt: skip
        parts["faults"] += ["--judge-in-order"] if in_order else []
        runs = {name: pool.submit(run, name, command, tell) for name, command in parts.items()}
        try:
            printed = {name: run.result() for name, run in runs.items()}
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
        record: dict[str, Any] = {"versions": report.versions(), "random": sound(folder / "random", random)}
        for name in ("faults", "rules"):
            if not (folder / name).exists():
                raise Failed(f"{name}: no result; its last lines:\n{printed[name]}")
            record[name] = json.loads((folder / name).read_text())
    record["seconds"] = round(time.time() - started)
    return Judged(record)


def run(name: str, command: list[str], tell: Callable[[str], None]) -> str:
    """The last lines that a part printed; each line is told as it comes."""
    last: list[str] = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:  # noqa: S603
        assert process.stdout is not None
        for line in process.stdout:
            last = [*last[-9:], line]
            tell(f"[{name}] {line.rstrip()}")
    return "".join(last)


def sound(folder: Path, count: int) -> dict[str, Any]:
    """What the gate said of random sound checkpoints. Raises Failed where that run has no end, or no verdict."""
    lines = (folder / "report.jsonl").read_text().splitlines() if (folder / "report.jsonl").exists() else []
    records = [json.loads(line) for line in lines]
    if not records or records[-1]["type"] != "footer":
        raise Failed("random: the gate's run on random checkpoints did not end")
    faults = [r for r in records if r["type"] == "comparison" and r["verdict"] == report.FAULT]
    last = records[-1]
    if not last["verdict"].startswith((report.AGREES, report.FAULT)):  # no alarm, and no silence either
        raise Failed(f"random: the gate's run on random checkpoints gave no verdict: {last['verdict']}")
    return {
        "cases": count, "comparisons": last["comparisons"], "seconds": last["seconds"], "verdict": last["verdict"],
        "false_alarms": [f"{r['case']}, {r['stage']}: {r['note']}" for r in faults],
    }  # fmt: skip
