"""Runs the gate as often as it is asked: arguments as JSON, one list a line; the exit code and the text come back likewise."""

from __future__ import annotations

import io
import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest


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
