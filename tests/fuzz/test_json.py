"""config.json and indexes."""

import json
from copy import deepcopy

import pytest
from hypothesis import strategies as st

import glm_dsa
import glm_dsa.__main__
from glm_dsa import ModelArgs
from glm_dsa.checkpoint import assemble
from glm_dsa.config_reader import BYTES_A_PART, LARGEST_CONFIG, LARGEST_JSON

from .bounds import CONFIG, INDEX, STRUCTURED, bounded, check_folder, each, gate_passes, outcome, said
from .files import LAYOUTS, edited, joined, lay, parted, written


def test_there_are_enough_of_them():
    assert sum(STRUCTURED.values()) >= 300


def test_configs(layouts, tmp_path, given):
    def of(layout):
        return st.tuples(st.just(layout), edited(json.loads(layouts[layout][0][CONFIG])))

    def check(corruption):
        layout, config = corruption
        files, sound = layouts[layout]
        folder = lay(tmp_path / "s" / "ck", files | {CONFIG: config})
        check_folder(folder, sound, given)
        made, refusal = outcome(lambda: assemble(folder))
        with bounded(folder if refusal else folder.parent / "outside"):
            assert said(glm_dsa.__main__.main, "attach", folder)[0] == (10 if refusal else 0)
        assert refusal or ModelArgs.from_file(folder) == made[0].args

    each(st.sampled_from(LAYOUTS).flatmap(of), STRUCTURED["config"], check)


def test_indexes(layouts, tmp_path, given):
    files, sound = layouts["hf"]
    index = json.loads(files[INDEX])
    shards = sorted(set(index["weight_map"].values()))

    @st.composite
    def misdirected(draw):
        """Tensors where they are not, or nowhere: outside of the folder above all."""
        changed = deepcopy(index)
        name = draw(st.sampled_from(sorted(index["weight_map"])))
        changed["weight_map"][name] = draw(st.sampled_from([
            *shards, "model-9.safetensors", "/dev/zero", "../outside/model.safetensors", "./" + shards[0],
            str(tmp_path / "s" / "outside" / "model.safetensors"), "..", ".safetensors", "a\x00.safetensors",
            "\ud800.safetensors", "x" * 300 + ".safetensors", "\n.safetensors", CONFIG, "sub/" + shards[0],
        ]))  # fmt: skip
        return written(changed)

    def check(changed):
        check_folder(lay(tmp_path / "s" / "ck", files | {INDEX: changed}), sound, given)

    each(misdirected() | edited(index) | edited({"weight_map": index["weight_map"]}), STRUCTURED["index"], check)


@pytest.mark.parametrize(
    ("where", "bomb", "size"),
    [
        (CONFIG, b'"\xc4\x80",', LARGEST_CONFIG),
        (CONFIG, b"[[[[]]]],", LARGEST_CONFIG // BYTES_A_PART * 2),
        (CONFIG, b"[[[[]]]],", 64 << 20),
        (INDEX, b'"\xc4\x80",', LARGEST_JSON),
        (INDEX, b'{"":{"":{"":{}}}},', LARGEST_JSON),
        ("header", b'{"":{"":{"":{}}}},', LARGEST_JSON // BYTES_A_PART * 4),
        ("header", b'"\xc4\x80",', 100 << 20),
    ],
)
def test_much_to_read(layouts, tmp_path, given, where, bomb, size):
    """JSON that is small on a disk, and large in memory: as much as is read at all, or more."""
    files, _ = layouts["hf"]
    shard, key = "model-mtp.safetensors", {CONFIG: "auto_map", INDEX: "metadata", "header": "__metadata__"}[where]
    header, data = parted(files[shard])
    tree = header if where == "header" else json.loads(files[where])
    rest = json.dumps(tree | {key: "@"}).encode()
    many = b"[" + bomb * ((size - len(rest) - 2) // len(bomb)) + b"0]"
    text = rest.replace(b'"@"', many)
    changed = {shard: joined(text, data)} if where == "header" else {where: text}
    folder = lay(tmp_path / "s" / "ck", files | changed)
    with bounded(tmp_path):
        outcome(lambda: glm_dsa.load(folder, check_finite=False))
    if where == CONFIG:  # HF copies it, again and again
        with bounded(tmp_path):
            gate_passes(folder, given)
