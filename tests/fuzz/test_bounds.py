"""The gate as a process; and that these tests can fail."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glm_dsa import checkpoint
from glm_dsa.errors import GlmDsaError

from . import bounds
from .bounds import CONFIG, Hang, check_folder, listing
from .files import lay

ROOT = Path(__file__).parents[2]


@pytest.mark.slow("verify/gate", "verify/core/exits", "glm_dsa/storage", "glm_dsa/config")
def test_the_gate_as_a_process(layouts, tmp_path):
    """What only a verdict refuses: in a line, and no pass; and an earlier report leads nowhere."""
    changes, line = {"q_lora_rank": 40}, "expected [40, 64]"
    files, _ = layouts["hf"]
    folder = lay(tmp_path / "s" / "ck", files | {CONFIG: json.dumps(json.loads(files[CONFIG]) | changes).encode()})
    report, outside = folder.parent / "report", folder.parent / "outside"
    report.mkdir()
    (report / "report.jsonl").symlink_to(outside / "model.safetensors")
    command = [sys.executable, "-m", "pytest", "verify/", "-q", "-p", "no:cacheprovider"]
    before = listing(folder), listing(outside)
    run = subprocess.run(
        [*command, "--checkpoint", folder, "--report", report], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 1  # its headers are wrong for its config: a fault of the release
    assert line in run.stdout + run.stderr
    assert "Traceback" not in run.stdout + run.stderr
    assert "verdict: agrees" not in run.stdout
    assert (listing(folder), listing(outside)) == before


def broken_pass(monkeypatch):
    """A reader that takes anything for true or false."""
    monkeypatch.setattr("glm_dsa.config.Reader.flag", lambda self, key, default: bool(self.raw(key, default)))


def broken_traceback(monkeypatch):
    monkeypatch.setattr("glm_dsa.config.Reader.count", lambda self, key, *_, **__: int(self.params[key]))


def broken_hang(monkeypatch):
    monkeypatch.setattr("glm_dsa.checkpoint.check_values", lambda _: time.sleep(60))


def broken_memory(monkeypatch):
    monkeypatch.setattr("glm_dsa.checkpoint.check_values", lambda _: b"x" * (bounds.BYTES * 2))


def broken_write(monkeypatch):
    check = checkpoint.check_values

    def write(stored):
        check(stored)
        (next(iter(stored.values())).file.parent.parent / "outside" / "new").write_text("")

    monkeypatch.setattr("glm_dsa.checkpoint.check_values", write)


def broken_line(monkeypatch):
    monkeypatch.setattr("glm_dsa.errors.printable", lambda text: f"{text}\n")


@pytest.mark.parametrize(
    "breaks", [broken_pass, broken_traceback, broken_hang, broken_memory, broken_write, broken_line]
)
def test_these_tests_can_fail(layouts, tmp_path, given, monkeypatch, breaks):
    breaks(monkeypatch)
    monkeypatch.setattr(bounds, "SECONDS", 2)
    monkeypatch.setattr(bounds, "BYTES", 1 << 28)
    files, sound = layouts["hf"]
    config = json.loads(files[CONFIG])
    changes = {
        broken_pass: {"norm_topk_prob": 0},
        broken_traceback: {"vocab_size": "text"},
        broken_line: {"vocab_size": -1},
    }
    folder = lay(tmp_path / "s" / "ck", files | {CONFIG: json.dumps(config | changes.get(breaks, {})).encode()})
    with pytest.raises((AssertionError, ValueError, Hang)) as failure:
        check_folder(folder, sound, given)
    assert not isinstance(failure.value, GlmDsaError)
