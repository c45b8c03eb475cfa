"""Runs the gate as often as it is asked, in one process beside the tests: torch and transformers are brought in once.

Arguments come as JSON, one list a line; the exit code and the text go back likewise.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def gate(*arguments: object) -> tuple[int, str]:
    """`python -m pytest ARGUMENTS` -> (exit status, what was printed)."""
    keeper = _keeper()
    assert keeper.stdin is not None
    assert keeper.stdout is not None
    keeper.stdin.write(json.dumps(list(map(str, arguments))) + "\n")
    keeper.stdin.flush()
    said = json.loads(keeper.stdout.readline())
    return said["code"], said["text"]


@cache
def _keeper() -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.gatekeeper"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def close() -> None:
    if _keeper.cache_info().currsize:
        _keeper().communicate(timeout=30)  # which closes what it listens to, and so ends it
        _keeper.cache_clear()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        out = io.StringIO()
        with redirect_stdout(out), redirect_stderr(out):
            code = int(pytest.main([*json.loads(line), "-p", "no:cacheprovider"]))
        answers.write(json.dumps({"code": code, "text": out.getvalue()}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
