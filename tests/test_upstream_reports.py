"""docs/upstream/: the reports that can be run say what they say still. When one fails, upstream was mended: take it out."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPORTS = Path(__file__).parents[1] / "docs" / "upstream"
RUNNING = sorted(REPORTS.glob("*.py"))


@pytest.mark.slow("docs/upstream", "constraints.txt")
@pytest.mark.parametrize("report", RUNNING, ids=lambda file: file.stem)
def test_the_bug_is_there_still(report, tmp_path):
    """As a process of its own: other tests put this definition in mlx-lm's place."""
    done = subprocess.run([sys.executable, str(report)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert done.stdout.count("\n") == 1
    assert "mended" not in done.stdout


def test_the_index_lists_every_report():
    listed = set(re.findall(r"^\| ([\w.]+\.(?:py|md)) \|", (REPORTS / "README.md").read_text(), re.MULTILINE))
    assert listed == {
        file.name for file in REPORTS.iterdir() if file.name != "README.md" and file.suffix in (".py", ".md")
    }
