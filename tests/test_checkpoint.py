"""Damaged, missing and hostile checkpoint files: one line that names file and tensor, exit code 10, nothing written."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import glm_dsa
from glm_dsa import storage
from glm_dsa.__main__ import main
from glm_dsa.errors import printable
from glm_dsa.model import parameters_of
from reference import checkpoints
from reference.stored import read_tensors

INDEX = checkpoints.INDEX
ROOT = Path(__file__).parents[1]
CONFIG = checkpoints.glm_5_2(num_hidden_layers=4)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("sound") / "ck", CONFIG)


@pytest.fixture
def folder(sound, tmp_path):
    return Path(shutil.copytree(sound, tmp_path / "ck"))


def shard_of(folder, tensor):
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def edit_header(file, edit, data=None):
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    packed = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(packed)) + packed + (raw[8 + length :] if data is None else data))


def edit_index(folder, edit):
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


WQ = "model.layers.0.self_attn.q_a_proj.weight"
NORM = "model.norm.weight"


def truncated(folder):
    file = shard_of(folder, NORM)
    file.write_bytes(file.read_bytes()[:-100])
    return file.name, "cut short"


def no_safetensors(folder):
    file = shard_of(folder, NORM)
    file.write_bytes(b"\x80\x04pickled nonsense, not tensors")
    return file.name, "not a safetensors file"


def empty_file(folder):
    file = shard_of(folder, NORM)
    file.write_bytes(b"")
    return file.name, "not a safetensors file"


def missing_shard(folder):
    file = shard_of(folder, NORM)
    file.unlink()
    first = next(n for n, f in json.loads((folder / INDEX).read_text())["weight_map"].items() if f == file.name)
    return file.name, f"missing, though {INDEX} puts {first} there"


def missing_folder(folder):
    shutil.rmtree(folder)
    return str(folder), ""


def no_weights(folder):
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    return "no model*.safetensors", ""


def no_config(folder):
    (folder / "config.json").unlink()
    return "config.json", "No such file"


def config_no_json(folder):
    (folder / "config.json").write_text("{")
    return "config.json", "not valid JSON"


def unknown_key(folder):
    edit_json(folder / "config.json", rotary_flavour="lemon")
    return "rotary_flavour", "neither handled"


def wrong_shape(folder):
    edit_json(folder / "config.json", q_lora_rank=40)
    return WQ, "expected [40, 64]"


def unknown_dtype(folder):
    edit_header(shard_of(folder, NORM), lambda h: h[NORM].update(dtype="F6_E3M2"))
    return NORM, "dtype 'F6_E3M2'"


def overlapping(folder):
    def edit(header):
        header[NORM]["data_offsets"] = [0, 128]

    edit_header(shard_of(folder, NORM), edit)
    return shard_of(folder, NORM).name, "header is damaged"


def absurd_shape(folder):
    edit_header(shard_of(folder, NORM), lambda h: h[NORM].update(shape=[2**40, 2**40]))
    return NORM, "does not fill"


def index_points_outside(folder):
    edit_index(folder, lambda shards: shards.update({NORM: "../../etc/model.safetensors"}))
    return "'../../etc/model.safetensors'", "inside the folder"


def index_names_pickle(folder):
    edit_index(folder, lambda shards: shards.update({NORM: "pytorch_model.bin"}))
    return "'pytorch_model.bin'", ".safetensors"


def index_lies(folder):
    edit_index(folder, lambda shards: shards.update({"model.layers.0.ghost": shard_of(folder, NORM).name}))
    return "model.layers.0.ghost", "is not in it"


def index_no_json(folder):
    (folder / INDEX).write_text("[1, 2")
    return INDEX, "not valid JSON"


def index_no_map(folder):
    (folder / INDEX).write_text('{"weight_map": [1]}')
    return INDEX, "weight_map must map"


def missing_tensor(folder):
    name = "model.layers.3.mlp.experts.5.up_proj.weight"
    file, index = shard_of(folder, name), json.loads((folder / INDEX).read_text())
    read = read_tensors(folder)
    save_file({n: read(n, torch.bfloat16) for n, f in read.names.items() if f == file and n != name}, file)
    del index["weight_map"][name]
    (folder / INDEX).write_text(json.dumps(index))
    return name, "1 missing"


def extra_tensor(folder):
    checkpoints.add_shard(folder, "model-extra.safetensors", {"model.layers.1.self_attn.q_norm.weight": torch.ones(4)})
    return "model.layers.1.self_attn.q_norm.weight", "1 not expected"


def nan(folder):
    file = shard_of(folder, NORM)
    read = read_tensors(folder)
    tensors = {n: read(n, torch.bfloat16) for n, f in read.names.items() if f == file}
    tensors[NORM][3] = float("nan")
    save_file(tensors, file)
    return NORM, "NaN"


def infinity(folder):
    file = shard_of(folder, NORM)
    read = read_tensors(folder)
    save_file({n: read(n, torch.bfloat16) / (n != NORM) for n, f in read.names.items() if f == file}, file)
    return NORM, "NaN or infinity"


def nan_in_fp8(folder):
    source = folder.rename(folder.parent / "bf16")
    checkpoints.write_fp8(source, folder, folder.parent / "plain")
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, "pt") as shard:
        tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    tensors[WQ].view(torch.uint8)[3, 5] = 0x7F  # e4m3 has no infinity, and this for NaN
    save_file(tensors, file)
    return WQ, "NaN or infinity"


def unlisted_shard(folder):
    save_file({"model.layers.9.extra": torch.ones(4)}, folder / "model-99999.safetensors")
    return "model-99999.safetensors", "not listed"


def layers_without_number(folder):
    edit_json(folder / "config.json", num_hidden_layers=10**9)
    return "num_hidden_layers = 1000000000", "at most 256"


def control_characters(folder):
    edit_json(folder / "config.json", **{"\x1b[2Jrotary\nflavour": "lemon"})
    return "\\x1b[2Jrotary\\nflavour", "neither handled"


def fifo(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    return "config.json", "no regular file"


def endless_shard(folder):
    file = shard_of(folder, NORM)
    file.unlink()
    file.symlink_to("/dev/zero")
    return file.name, "missing, though"


def huge_integer(folder):
    edit_json(folder / "config.json", routed_scaling_factor=10**400)
    return "routed_scaling_factor = 1000", "a finite number"


def key_twice(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("{", '{"hidden_size": 128,', 1))
    return "config.json", "'hidden_size' comes twice"


def tensor_twice(folder):
    file = shard_of(folder, NORM)
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = raw[8 : 8 + length].replace(
        b"{", b'{"model.norm.weight":{"dtype":"BF16","shape":[64],"data_offsets":[0,128]},', 1
    )
    file.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])
    return file.name, "'model.norm.weight' comes twice"


def dtype_no_string(folder):
    edit_header(shard_of(folder, NORM), lambda h: h[NORM].update(dtype=["BF16"]))
    return NORM, "has dtype ['BF16']"


def many_dimensions(folder):
    edit_header(shard_of(folder, NORM), lambda h: h[NORM].update(shape=[2**60] * 200_000))
    return NORM, "does not fill"


def integers_for_weights(folder):
    edit_header(shard_of(folder, WQ), lambda h: h[WQ].update(dtype="U32", shape=[48, 32]))
    return WQ, "expected [48, 64]"


def long_shard_name(folder):
    edit_index(folder, lambda shards: shards.update({NORM: "x" * 5000 + ".safetensors"}))
    return str(folder), "File name too long"


def dangling_index(folder):
    (folder / INDEX).unlink()
    (folder / INDEX).symlink_to("nowhere")
    return INDEX, "No such file"


def index_names_another_shard(folder):
    own = shard_of(folder, NORM).name
    edit_index(folder, lambda shards: shards.update({NORM: next(s for s in shards.values() if s != own)}))
    return NORM, "is not in it"


def index_forgets(folder):
    edit_index(folder, lambda shards: shards.pop(NORM))
    return NORM, "is not listed in"


def in_two_shards(folder):
    other = next(f for f in sorted(folder.glob("*.safetensors")) if f != shard_of(folder, NORM))
    read = read_tensors(folder)
    save_file({n: read(n, torch.bfloat16) for n in (NORM, *(n for n, f in read.names.items() if f == other))}, other)
    return NORM, "each tensor belongs in one shard"


def bytes_behind(folder):
    file = shard_of(folder, NORM)
    file.write_bytes(file.read_bytes() + b"\0" * 4)
    return file.name, "4 bytes after the last tensor"


def a_gap(folder):
    file = shard_of(folder, NORM)
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]

    def edit(header):
        for name, entry in header.items():
            if name != "__metadata__":
                entry["data_offsets"] = [n + 1 for n in entry["data_offsets"]]

    edit_header(file, edit, b"\0" + raw[8 + length :])
    return file.name, "at data byte 0, got 1"


def more_than_a_tensor_has(folder):
    edit_header(shard_of(folder, NORM), lambda h: h[NORM].update(strides=[1]))
    return NORM, "more than dtype, shape and data_offsets"


def less_than_a_tensor_has(folder):
    edit_header(shard_of(folder, NORM), lambda h: h[NORM].pop("shape"))
    return NORM, "has no dtype, shape and data_offsets"


def negative_shape(folder):
    edit_header(shard_of(folder, NORM), lambda h: h[NORM].update(shape=[-8, -8]))
    return NORM, "does not fill"


def a_shape_of_truths(folder):
    edit_header(shard_of(folder, NORM), lambda h: h[NORM].update(shape=[True, 64]))
    return NORM, "does not fill"


def nine_dimensions(folder):
    edit_header(shard_of(folder, NORM), lambda h: h[NORM].update(shape=[64, *[1] * 8]))
    return NORM, "does not fill"


def metadata_of_numbers(folder):
    edit_header(shard_of(folder, NORM), lambda h: h.update(__metadata__={"format": 1}))
    return shard_of(folder, NORM).name, "__metadata__ maps texts to texts"


def metadata_no_object(folder):
    edit_header(shard_of(folder, NORM), lambda h: h.update(__metadata__=["pt"]))
    return shard_of(folder, NORM).name, "__metadata__ maps texts to texts"


def header_no_object(folder):
    shard_of(folder, NORM).write_bytes(struct.pack("<Q", 2) + b"[]")
    return shard_of(folder, NORM).name, "the header is no JSON object"


FAULTS = [
    truncated, no_safetensors, empty_file, missing_shard, missing_folder, no_weights, no_config, config_no_json, unknown_key,
    wrong_shape, unknown_dtype, overlapping, absurd_shape, index_points_outside, index_names_pickle, index_lies, index_no_json,
    index_no_map, missing_tensor, extra_tensor, nan, infinity, nan_in_fp8, unlisted_shard, layers_without_number,
    control_characters, fifo,
    endless_shard, huge_integer, key_twice, tensor_twice, dtype_no_string, many_dimensions, integers_for_weights,
    long_shard_name, dangling_index, index_names_another_shard, index_forgets, in_two_shards, bytes_behind, a_gap,
    more_than_a_tensor_has, less_than_a_tensor_has, negative_shape, a_shape_of_truths, nine_dimensions, metadata_of_numbers,
    metadata_no_object, header_no_object,
]  # fmt: skip


def snapshot(folder):
    return {f: f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file()} if folder.exists() else {}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_bad_input_is_one_clear_line(folder, fault, capsys):
    named, said = fault(folder)
    before = snapshot(folder.parent)
    assert main(["inventory", str(folder), "--values"]) == 10
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.count("\n") == 1
    assert named in out.err
    assert said in out.err
    with pytest.raises(glm_dsa.CheckpointError) as error:
        glm_dsa.load(folder)
    assert named in str(error.value)
    assert said in str(error.value)
    assert snapshot(folder.parent) == before


@pytest.fixture(scope="module")
def packed(sound, tmp_path_factory):
    """The same checkpoint in MLX layout, 8 bits in groups of 32."""
    model = glm_dsa.load(sound)
    nn.quantize(model, 32, 8, class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % 32 == 0)
    folder = tmp_path_factory.mktemp("packed") / "ck"
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), parameters_of(model))
    shutil.copy(sound / "config.json", folder)
    return folder


Q = "model.layers.0.self_attn.q_a_proj"
EARLY = "model.layers.0.self_attn.kv_b_proj"
U32, BYTES = mx.uint32, mx.uint8
PACKING_FAULTS = {
    "group size 0": {f"{Q}.scales": mx.zeros((48, 65)), f"{Q}.biases": mx.zeros((48, 65))},
    "no groups": {f"{Q}.scales": mx.zeros((48, 0))},
    "scalar scales": {f"{Q}.scales": mx.array(1.0)},
    "scalar weight": {f"{Q}.weight": mx.array(1, dtype=U32)},
    "no weight": {f"{Q}.weight": None},
    "no biases": {f"{Q}.biases": None},
    "7 bits": {f"{Q}.weight": mx.zeros((48, 14), U32)},
    "unknown mode": {f"{Q}.scales": mx.zeros((48, 4), BYTES), f"{Q}.biases": None},
    "missing": {"model.norm.weight": None},
    "not expected": {"model.norm.bias": mx.zeros((64,))},
    "of another shape": {"model.norm.weight": mx.zeros((63,))},
    "integers unpacked": {"model.norm.weight": mx.zeros((64,), U32)},
    "early build, no biases": {f"{EARLY}.weight": mx.zeros((128, 8), U32), f"{EARLY}.scales": mx.zeros((128, 1))},
    "early build, one row": {
        f"{EARLY}.weight": mx.zeros((8,), U32), f"{EARLY}.scales": mx.zeros((1,)), f"{EARLY}.biases": mx.zeros((1,))
    },
    "fp8 in three dimensions": {
        f"{Q}.weight": mx.zeros((2, 4, 4), BYTES), f"{Q}.weight_scale_inv": mx.zeros((1, 1)), f"{Q}.scales": None,
        f"{Q}.biases": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("fault", PACKING_FAULTS)
def test_bad_packing_is_one_clear_line(packed, tmp_path, fault, capsys):
    folder = Path(shutil.copytree(packed, tmp_path / "ck"))
    tensors = mx.load(str(folder / "model.safetensors")) | PACKING_FAULTS[fault]
    mx.eval([t for t in tensors.values() if t is not None])
    mx.save_safetensors(str(folder / "model.safetensors"), {n: t for n, t in tensors.items() if t is not None})
    assert main(["inventory", str(folder)]) == 10
    out = capsys.readouterr()
    assert out.err.count("\n") == 1
    named = next(iter(PACKING_FAULTS[fault])).rpartition(".")[0]
    assert named in out.err
    with pytest.raises(glm_dsa.CheckpointError, match=re.escape(named)):
        glm_dsa.load(folder)


def test_a_sound_packed_folder(packed, capsys):
    assert main(["inventory", str(packed), "--values"]) == 0
    assert "layout: MLX" in capsys.readouterr().out


def test_values_are_not_looked_at_where_nobody_asks(folder):
    nan(folder)
    assert mx.isnan(glm_dsa.load(folder, check_finite=False).model.norm.weight).any()


def test_what_is_packed_keeps_its_dtype(packed):
    plain, cast = (parameters_of(glm_dsa.load(packed, dtype)) for dtype in (None, mx.float16))
    assert {p.dtype for n, p in plain.items() if n.endswith((".scales", ".biases"))} == {mx.bfloat16}
    for name, parameter in cast.items():
        is_kept = name.rsplit(".", 1)[0] + ".scales" in cast or name.endswith("e_score_correction_bias")
        assert parameter.dtype == (plain[name].dtype if is_kept else mx.float16), name


def framed(file, text, length=None):
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text)
    return file


def test_the_smallest_header(tmp_path):
    assert storage.read_header(framed(tmp_path / "x", b"{}")) == {}
    for text, length, said in (
        (b"{}", 3, "cut short in its header"), (b"{}", 1, "cut short in its header"), (b"{}", 0, "cut short in its header"),
        (b" {}", None, "no JSON object"), (b"[]", None, "no JSON object"), (b"{}x", 2, "1 bytes after the last"),
    ):  # fmt: skip
        with pytest.raises(glm_dsa.CheckpointError, match=said):
            storage.read_header(framed(tmp_path / "x", text, length))
    (tmp_path / "x").write_bytes(b"\2")
    with pytest.raises(glm_dsa.CheckpointError, match=r"cut short in its header .1 bytes"):
        storage.read_header(tmp_path / "x")


@pytest.mark.parametrize(
    ("shape", "offsets", "fits"),
    [
        ([0, (1 << 63) - 1], [7, 7], True), ([0, 1 << 63], [7, 7], False), ([1] * 8, [0, 2], True), ([1] * 9, [0, 2], False),
        ([], [3, 5], True), ([2], [0, 3], False), ([2], [4, 0], False), ([2, True], [0, 4], False), ([2.0], [0, 4], False),
        ([2], [0, 4.0], False), ([2], [False, 4], False), (["2"], [0, 4], False), ([2], [0], False), (2, [0, 4], False),
    ],
)  # fmt: skip
def test_where_entries_end(shape, offsets, fits):
    entry = {"dtype": "BF16", "shape": shape, "data_offsets": offsets}
    if fits:
        stored = storage.stored_as(Path("x"), "t", entry)
        assert stored == storage.Stored(Path("x"), "BF16", tuple(shape), *offsets)
        assert stored.nbytes == offsets[1] - offsets[0]
    else:
        with pytest.raises(glm_dsa.CheckpointError, match=r"x: t.* the header is damaged"):
            storage.stored_as(Path("x"), "t", entry)


def test_a_line_is_bounded():
    assert printable("x" * 2000) == "x" * 2000
    assert printable("x" * 2001) == "x" * 2000 + " ..."
    assert printable("a\n\x1b\ud800é") == "a\\n\\x1b\\ud800é"


def test_a_text_is_what_utf_8_holds():
    assert storage.is_text("größe")
    assert not storage.is_text("\ud800")
    assert not storage.is_text(3)


def test_as_a_process(folder):
    """No traceback reaches the user, and the exit status is 10. (The gate as a process: tests/fuzz/test_bounds.py.)"""
    truncated(folder)
    command = [sys.executable, "-m", "glm_dsa", "inventory", str(folder)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 10
    assert "cut short" in run.stderr
    assert "Traceback" not in run.stdout + run.stderr


def test_a_sound_folder(sound, capsys):
    assert main(["inventory", str(sound), "--values", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["stored"]["values"] == "finite"
    assert found["stored"]["mtp"] == "present"
    assert found["tensors"] == found["stored"]["tensors"]
    assert main(["inventory", str(sound)]) == 0
    assert "names and shapes: as they should be" in capsys.readouterr().out


@settings(max_examples=40)
@given(st.data())
def test_damaged_bytes_never_end_in_a_traceback(sound, tmp_path_factory, data):
    """Any few bytes of header, index or config changed: an error of ours, or (where the change is harmless) a success."""
    name = data.draw(st.sampled_from(["config.json", INDEX, "model-mtp.safetensors"]))
    raw = bytearray((sound / name).read_bytes())
    limit = min(len(raw), 1200)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, limit - 1))] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("fuzz") / "ck"
    folder.mkdir()
    for file in sound.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / name).unlink()
    (folder / name).write_bytes(bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw))
    assert main(["inventory", str(folder)]) in (0, 10)
