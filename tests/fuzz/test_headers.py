"""Headers of safetensors files."""

import json

import pytest
from hypothesis import strategies as st

from .bounds import STRUCTURED, check_folder, each
from .files import LAYOUTS, bad_header, joined, lay, parted


def test_headers(layouts, tmp_path, given):
    def of(layout):
        shards = sorted(n for n in layouts[layout][0] if n.endswith(".safetensors"))
        return st.sampled_from(shards).flatmap(
            lambda n: st.tuples(st.just((layout, n)), bad_header(layouts[layout][0][n]))
        )

    def check(corruption):
        (layout, shard), changed = corruption
        files, sound = layouts[layout]
        check_folder(lay(tmp_path / "s" / "ck", files | {shard: changed}), sound, given)

    each(st.sampled_from(LAYOUTS).flatmap(of), STRUCTURED["header"], check)


def with_tensors(raw, more):
    header, data = parted(raw)
    return joined(json.dumps(header | more).encode(), data)


EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
FOUND = {  # once, by these tests
    "digits": lambda raw: with_tensors(raw, {"x." + "9" * 5000 + ".y": EMPTY}),
    "pattern": lambda raw: with_tensors(raw, {"x.#.y": EMPTY, "x.5.y": EMPTY}),
    "end": lambda raw: with_tensors(
        raw, {"x": {"dtype": "U8", "shape": [10**4300 - 1], "data_offsets": [0, 10**4300 - 1]}}
    ),
    "byte order mark": lambda raw: joined(b"\xef\xbb\xbf" + json.dumps(parted(raw)[0]).encode(), parted(raw)[1]),
    "metadata": lambda raw: with_tensors(raw, {"__metadata__": {"format": 1}}),
    "field": lambda raw: with_tensors(raw, {"x": EMPTY | {"more": float("nan")}}),
}


@pytest.mark.parametrize("fault", FOUND)
def test_headers_that_were_let_pass(layouts, tmp_path, given, fault):
    files, sound = layouts["hf"]
    name = "model-00001-of-00006.safetensors"
    changed = FOUND[fault](files[name])
    assert check_folder(lay(tmp_path / "s" / "ck", files | {name: changed}), sound, given) is not None


def test_packed_parts_that_were_let_pass(layouts, tmp_path, given):
    """Parts of other kinds: experts of several shapes, scales of no floats."""
    files, sound = layouts["early"]
    header, data = parted(files["model.safetensors"])
    scales = "model.layers.1.mlp.experts.2.up_proj.scales"
    for change in ({"shape": [1, *header[scales]["shape"]]}, {"dtype": "U32", "shape": [16, 2]}):
        changed = joined(json.dumps(header | {scales: header[scales] | change}).encode(), data)
        folder = lay(tmp_path / "s" / "ck", files | {"model.safetensors": changed})
        assert check_folder(folder, sound, given) is not None
