"""What the gate keeps, and what it is handed."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st

from reference import checkpoints, kept
from verify.core.report import Comparison, Report
from verify.engines.headers import headers_of
from verify.release.request import OnTrial
from verify.release.resume import Saved

from .bounds import RAW, STRUCTURED, TINY, bounded, each, outcome
from .files import bad_header, edited, joined, lay, parted, written

ROOT = Path(__file__).parents[2]


def test_saved_states(tmp_path):
    """An interrupted run goes on from what it wrote, or begins anew."""
    arrays, facts = (
        {"hf": np.arange(12.0, dtype=np.float32), "own": np.ones((2, 3))},
        {"finished": [0, 1], "said": {"a": 1}},
    )
    saved = Saved(tmp_path, "identity")
    saved.save(arrays, facts)
    raw = saved.file.read_bytes()

    def check(changed):
        saved.file.write_bytes(changed)
        with bounded(tmp_path):
            found = saved.load()
        if found is not None:
            assert found[1] == facts
            assert {n: (a.dtype, a.tolist()) for n, a in found[0].items()} == {
                n: (a.dtype, a.tolist()) for n, a in arrays.items()
            }

    @st.composite
    def flipped(draw):
        changed = bytearray(raw)
        changed[draw(st.integers(8, len(raw) - 1))] ^= 1 << draw(st.integers(0, 7))
        return bytes(changed)

    header, data = parted(raw)
    facts_changed = edited(facts).map(
        lambda text: joined(written(header | {"__metadata__": header["__metadata__"] | {"facts": text.decode()}}), data)
    )
    each(bad_header(raw) | facts_changed, STRUCTURED["saved"], check)
    each(flipped() | st.binary(max_size=100), RAW["saved"], check)
    saved.file.unlink()
    saved.file.mkdir()
    assert saved.load() is None


@pytest.mark.parametrize("there", ["garbage", "link", "dangling", "hard link", "fifo", "folder", "folder is a file"])
def test_report_folders(tmp_path, there):
    """Nothing is written outside of it, and an earlier report is not this one's."""
    (tmp_path / "outside").mkdir()
    precious = tmp_path / "outside" / "precious"
    precious.write_text("precious")
    folder = tmp_path / "report"
    file = folder / "report.jsonl"
    if there == "folder is a file":
        folder.write_text("")
    else:
        folder.mkdir()
    if there == "garbage":
        file.write_bytes(b"\xff{]" * 1000)
    elif there == "link":
        file.symlink_to(precious)
    elif there == "dangling":
        file.symlink_to(tmp_path / "outside" / "new")
    elif there == "hard link":
        os.link(precious, file)
    elif there == "fifo":
        os.mkfifo(file)
    elif there == "folder":
        file.mkdir()
    report = Report(folder)

    def write():
        report.clear()
        report.open()
        report.add(Comparison("claim", "case", "stage", "agrees"))
        report.close(0)

    with bounded(tmp_path / "outside"):
        _, refusal = outcome(write, (ValueError, OSError))
    assert (refusal is not None) == (there in ("folder", "folder is a file"))
    if refusal is None:
        assert [json.loads(line)["type"] for line in file.read_text().splitlines()] == [
            "header",
            "comparison",
            "footer",
        ]


def test_kept_checkpoints(tmp_path, monkeypatch):
    folder = Path(shutil.copytree(kept.TRAINED / "interleaved", tmp_path / "interleaved"))
    measured = json.loads((folder / "measured.json").read_text())
    monkeypatch.setattr(kept, "TRAINED", tmp_path)
    texts = json.loads((ROOT / "reference" / "trained" / "probes.json").read_text())

    def check(changed):
        (folder / "measured.json").write_bytes(changed)
        kept.check_kept.cache_clear()
        with bounded(tmp_path):
            _, refusal = outcome(lambda: kept.check_kept(folder), ValueError)
        if refusal is None:
            assert json.loads(changed)["sha256"] == measured["sha256"]
        else:
            assert str(folder) in refusal

    def check_probes(changed):
        (tmp_path / "probes.json").write_bytes(changed)
        kept.probes.cache_clear()
        with bounded(tmp_path):
            found, refusal = outcome(kept.probes, ValueError)
        if refusal is None:
            assert found["texts"]
            assert all(isinstance(text, str) and text for text in found["texts"])
            assert all(isinstance(text, str) and text for needle in found["needles"] for text in needle.values())
        else:
            assert "probes.json" in refusal

    only = {"sha256": measured["sha256"]}
    each(st.binary(max_size=50) | edited(only) | edited(measured), RAW["kept"], check)
    few = {"texts": texts["texts"][:2], "needles": texts["needles"][:2]}
    each(st.binary(max_size=50) | edited(few), RAW["kept"], check_probes)
    kept.check_kept.cache_clear()
    kept.probes.cache_clear()


def test_prompts_and_tokenizers(layouts, tmp_path, given):
    folder = lay(tmp_path / "s" / "ck", layouts["hf"][0])
    checkpoints.write_tokenizer(folder)
    tokenizer, prompt = folder / "tokenizer.json", tmp_path / "s" / "text"
    sound = json.loads(tokenizer.read_text())
    headers = headers_of(str(folder))

    def ask():
        with bounded(tmp_path / "s"):
            return outcome(lambda: OnTrial.of(headers, prompt=prompt, layers={0}), (ValueError, OSError))

    def check(changed):
        tokenizer.write_bytes(changed)
        found, refusal = ask()
        assert refusal is not None or (found.tokens.shape[1] >= 2 and found.tokens.max() < TINY["vocab_size"])

    prompt.write_text("The gate judges what it is shown." * 3)
    each(st.binary(max_size=50) | edited(sound), RAW["tokenizer"], check)
    tokenizer.write_text(json.dumps(sound))
    for write in (
        lambda: prompt.write_bytes(b"\xff\xfe"), lambda: prompt.write_text(""), lambda: prompt.mkdir(),
        lambda: prompt.symlink_to("/dev/zero"), lambda: os.mkfifo(prompt), lambda: prompt.symlink_to("nowhere"),
    ):  # fmt: skip
        prompt.rmdir() if prompt.is_dir() else prompt.unlink(missing_ok=True)
        write()
        assert "--prompt-file" in ask()[1]
