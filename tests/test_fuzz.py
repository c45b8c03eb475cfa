"""Files from anywhere: whatever is damaged or hostile in them is one line, within bounds of time and memory; nothing is
written outside of where it was asked for; and what means another model never passes for this one."""

import contextlib
import importlib
import io
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import fields
from hashlib import sha256
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from mlx_lm.models.cache import save_prompt_cache

import glm_dsa
import glm_dsa.__main__
import verify.__main__
from glm_dsa import ModelArgs, checkpoint, weights
from glm_dsa.config_reader import BYTES_A_PART, LARGEST_CONFIG, LARGEST_JSON
from glm_dsa.errors import LONGEST, GlmDsaError
from glm_dsa.model import parameters_of
from reference import checkpoints, kept
from reference.stored import read_tensors
from verify.audit import audit
from verify.core.exits import NotJudged
from verify.core.report import Comparison, Report
from verify.engines.headers import headers_of
from verify.gate.options import Asked
from verify.release.request import OnTrial
from verify.release.resume import Saved

ROOT = Path(__file__).parents[1]
CONFIG, INDEX = "config.json", checkpoints.INDEX
SECONDS, BYTES = 10, 1 << 30
TINY = checkpoints.glm_5_2(
    num_hidden_layers=3, first_k_dense_replace=1, index_skip_topk_offset=2, n_routed_experts=4, num_experts_per_tok=2,
    vocab_size=300, index_n_heads=4,
)  # fmt: skip
STRUCTURED = {"config": 50, "index": 30, "header": 85, "folder": 25, "state": 80, "prompt cache": 45, "saved": 40}
RAW = {"folder": 50, "prompt cache": 15, "saved": 20, "kept": 15, "tokenizer": 25}


def test_there_are_enough_of_them():
    assert sum(STRUCTURED.values()) >= 300


def each(strategy, count, check):
    """`check` on so many draws, and no fewer."""
    seen = 0

    @settings(max_examples=count)
    @drawn(strategy)
    def run(corruption):
        nonlocal seen
        seen += 1
        check(corruption)

    run()
    assert seen >= count


# -- what must hold


class Hang(BaseException):
    """Caught by nobody on the way."""


@contextlib.contextmanager
def bounded(sandbox):
    """Fails where it takes too long, holds too much memory at once, or changes anything in `sandbox`."""

    def ring(*_):
        raise Hang(f"over {SECONDS} s")

    before, held, begun, earlier = (
        listing(sandbox),
        forget_peak(),
        time.monotonic(),
        signal.signal(signal.SIGALRM, ring),
    )
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
    assert time.monotonic() - begun < SECONDS
    assert peak() - held < BYTES
    assert listing(sandbox) == before


def listing(folder):
    """{path: what a write would change}."""
    there = (Path(at) / name for at, folders, files in os.walk(folder) for name in (*folders, *files))
    return {path: (s.st_mode, s.st_size, s.st_mtime_ns, s.st_ino) for path in there for s in (path.lstat(),)}


def peak():
    """The most memory that this process has held, since `forget_peak` where the system can forget."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak():
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak()


def one_line(text):
    assert text.strip()
    assert text.isprintable(), text
    assert len(text) < LONGEST + 200
    assert "Traceback" not in text


def outcome(read, errors=(GlmDsaError,)):
    """(what was read, None), or (None, the line that refuses it)."""
    try:
        return read(), None
    except errors as error:
        one_line(str(error))
        return None, str(error)


def said(main, *arguments):
    """(exit status, what was printed, the line on the error stream) of a command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([*map(str, arguments)])
    if err.getvalue():
        one_line(err.getvalue().removesuffix("\n"))
        assert (status, out.getvalue()) == (10, "")
    return status, out.getvalue(), err.getvalue()


def meaning(model):
    """{what a model computes by: value}: everything of its config, and the bits of its parameters."""
    found = {f.name: getattr(model.args, f.name) for f in fields(ModelArgs) if f.name != "conventions"}
    found |= {c.name: c.value for c in model.args.conventions}
    for name, value in parameters_of(model).items():
        found[name] = value.dtype, value.shape, sha256(bytes(memoryview(value.view(mx.uint8)))).hexdigest()
    return found


def check_folder(folder, sound, given, another=()):
    """No reader of checkpoints fails in any other way than by a line, and none lets pass what does not mean `sound`.

    another: what the folder's config.json says otherwise, in so many words."""
    with bounded(folder.parent):
        model, refusal = outcome(lambda: glm_dsa.load(folder))
    with bounded(folder.parent):
        statuses = [said(glm_dsa.__main__.main, "inventory", folder, "--values", "--json")[0]]
    with bounded(folder.parent):
        statuses.append(said(verify.__main__.main, "audit", folder)[0])
    with bounded(folder.parent):
        passes = gate_passes(folder, given)
    if refusal is not None:
        assert str(folder) in refusal
        assert statuses[0] == 10
        assert statuses[1] in (1, 10), "the audit: a FAULT, or what cannot be read"
        assert not passes
    else:
        assert statuses[0] == 0
        found = meaning(model)
        told = {c.name for c in model.args.conventions if c.source == "default"}
        assert {k for k in found | sound if found.get(k) != sound.get(k)} <= told | set(another)
    return refusal


def gate_passes(folder, given):
    """Whether `pytest verify/ --checkpoint` would come to judge weights; if so, its oracles read what is there."""
    asked, refusal = outcome(lambda: Asked.of(given({"--checkpoint": str(folder)})), (ValueError, OSError, NotJudged))
    if refusal is not None or asked.release.refused:
        return False
    if any(f.severity == audit.FAULT for f in audit.audit(asked.release.headers).findings):
        return False
    asked.conventions(), asked.not_verified(given({}))
    read = read_tensors(folder)
    assert {name: file.name for name, file in read.names.items()} == {
        name: tensor.file.name for name, tensor in asked.release.headers.tensors.items()
    }
    return True


# -- folders, as bytes


LAYOUTS = ("hf", "fp8", "mlx", "early")


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """{layout: (its files, what it means)}: HF's in shards, FP8 in one file, mlx-lm's packed, HF's names packed as early
    builds for mlx were."""
    base = tmp_path_factory.mktemp("sound")
    checkpoints.write(base / "hf", TINY, shard_size="100KB")
    checkpoints.write_fp8(base / "hf", base / "fp8", base / "plain")
    model = glm_dsa.load(base / "hf")
    nn.quantize(model, 32, 8, class_predicate=lambda path, m: path.endswith(("q_a_proj", "down_proj", "unembed_out")))
    (base / "mlx").mkdir()
    mx.save_safetensors(str(base / "mlx" / "model.safetensors"), parameters_of(model), {"format": "mlx"})
    tensors = {name: mx.load(str(file))[name] for name, file in read_tensors(base / "hf").names.items()}
    for path in [n.removesuffix(".weight") for n in tensors if "kv_b_proj" in n or "experts." in n]:
        packed = mx.quantize(tensors[f"{path}.weight"], 32, 8)
        tensors |= {f"{path}.{part}": t for part, t in zip(weights.PACKED, packed, strict=True)}
    (base / "early").mkdir()
    mx.save_safetensors(str(base / "early" / "model.safetensors"), tensors)
    for packed in ("mlx", "early"):
        shutil.copy(base / "hf" / CONFIG, base / packed)
    return {
        name: ({f.name: f.read_bytes() for f in (base / name).iterdir()}, meaning(glm_dsa.load(base / name)))
        for name in LAYOUTS
    }


class Link(str):
    """In the place of a file's bytes: where a symbolic link leads."""


FOLDER, FIFO = object(), object()


def lay(folder, files):
    """Writes {name: bytes, or what is there instead} into a folder of its own, beside another one."""
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder.parent / "outside").mkdir()
    (folder.parent / "outside" / "model.safetensors").write_bytes(b"not ours")
    for name, content in files.items():
        file = folder / name
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif isinstance(content, Link):
            file.symlink_to(content)
        elif content is FIFO:
            os.mkfifo(file)
        else:
            file.mkdir()
    return folder


# -- JSON that means something else, or nothing

LITERALS = {  # what json.dumps does not write
    "@deep": "[" * 900 + "]" * 900,
    "@deeper": '{"a":' * 20000 + "1" + "}" * 20000,
    "@digits": "9" * 4300,
    "@more digits": "9" * 5000,
    "@float": "1e999",
}
ODD = [
    True, -1, -(2**63), 2**53 + 1, 10**15, 10**30, 0.5, 1e300, float("nan"), float("inf"), -1e-300, "", "text", "4", "\ud800",
    "\n\x1b[2J", "x" * 5000, [], {}, [[]], [None], ["full"], {"__float__": "Infinity"}, {"__float__": "NaN"}, *LITERALS,
]  # fmt: skip
ODD_VALUES = st.one_of(st.sampled_from(ODD), st.text(max_size=5), st.lists(st.integers(-3, 3), max_size=3))


def written(tree, twice=()):
    """JSON, with the literals above; twice: (key, value) that the key "@twice" stands for."""
    text = json.dumps(tree)
    for name, literal in LITERALS.items():
        text = text.replace(f'"{name}"', literal)
    return (text.replace('"@twice"', json.dumps(twice[0])) if twice else text).encode()


def places(tree):
    """(container, key) of every value in a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield tree, key
        yield from places(value)


def is_odd(value, due):
    """Whether no config could say `value` where this one says `due`."""
    if type(value) is not type(due):
        return not (isinstance(due, float) and type(value) is int and 0 < value < 100)
    if isinstance(due, bool):
        return False
    return value != due and (not isinstance(due, (int, float)) or not 0 <= value < 2**53)


@st.composite
def edited(draw, tree):
    """One thing wrong in it: a value, a key lost, renamed, invented or there twice."""
    tree = deepcopy(tree)
    parent, key = draw(st.sampled_from(list(places(tree))))
    kinds = ["replace"] * 3 + ["remove"] + (["rename", "add", "twice"] if isinstance(parent, dict) else ["append"])
    kind, value = draw(st.sampled_from(kinds)), draw(ODD_VALUES)
    if kind == "replace":
        parent[key] = value
    elif kind in ("remove", "rename"):
        taken = parent.pop(key)
        if kind == "rename":
            parent[draw(st.sampled_from([key + "_", key.upper(), "\ud800", "", "weight.scales", "a.#.b", "a.5.b"]))] = (
                taken
            )
    elif kind == "append":
        parent.insert(key, value)
    else:
        parent["@twice" if kind == "twice" else draw(st.sampled_from(["more", "", "\x00", "x" * 3000]))] = value
    return written(tree, (key, value) if kind == "twice" else ())


def test_configs(layouts, tmp_path, given):
    def of(layout):
        return st.tuples(st.just(layout), edited(json.loads(layouts[layout][0][CONFIG])))

    def check(corruption):
        layout, config = corruption
        files, sound = layouts[layout]
        folder = lay(tmp_path / "s" / "ck", files | {CONFIG: config})
        check_folder(folder, sound, given)
        args, refusal = outcome(lambda: ModelArgs.from_file(folder))
        with bounded(folder if refusal else folder.parent / "outside"):
            assert said(glm_dsa.__main__.main, "attach", folder)[0] == (10 if refusal else 0)
        assert refusal or ModelArgs.from_file(folder) == args

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


# -- headers


def parted(raw):
    """(header, data) of a safetensors file."""
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def joined(header, data, length=None):
    return struct.pack("<Q", len(header) if length is None else length) + header + data


NUMBERS = st.sampled_from([0, 1, -1, -(2**31), 2**31, 2**32, 2**63, 2**64, 10**15, 10**30, 7, 64, 128])
DTYPES = [
    "BF16",
    "F16",
    "F32",
    "F64",
    "F8_E4M3",
    "F8_E5M2",
    "U8",
    "U16",
    "U32",
    "I64",
    "BOOL",
    "C64",
    "F4",
    "bf16",
    "F6_E3M2",
]


@st.composite
def bad_header(draw, raw):
    """A safetensors file with one thing wrong in its header, or in what the header says of the rest."""
    header, data = parted(raw)
    name = draw(st.sampled_from(sorted(n for n in header if n != "__metadata__")))
    entry = header[name]
    kind = draw(st.sampled_from([
        "edited", "edited", "length", "dtype", "dtype", "shape", "offset", "offsets", "both", "moved", "renamed", "missing",
        "surplus", "cut", "grown", "encoding", "metadata", "field",
    ]))  # fmt: skip
    length = None
    if kind == "edited":
        return joined(draw(edited(header)), data)
    if kind == "dtype":
        # one 16 bit dtype for the other is another model in so many words: recipes do mix the two
        own = ("BF16", "F16") if entry["dtype"] in ("BF16", "F16") else (entry["dtype"],)
        entry["dtype"] = draw(st.sampled_from([d for d in DTYPES if d not in own]))
        if draw(st.booleans()):  # and a shape that fills the same bytes by it
            size = {"F64": 8, "F32": 4, "U32": 4}.get(entry["dtype"], 2)
            entry["shape"] = [(entry["data_offsets"][1] - entry["data_offsets"][0]) // size]
    elif kind == "shape":
        entry["shape"] = draw(st.lists(NUMBERS, max_size=9) | st.just([*entry["shape"][::-1], 1]))
    elif kind == "offset":
        entry["data_offsets"][draw(st.integers(0, 1))] += draw(NUMBERS.filter(bool))
    elif kind == "offsets":
        entry["data_offsets"] = draw(st.lists(NUMBERS, max_size=3))
    elif kind == "both":
        number = draw(st.sampled_from([10**4299, 10**4300 - 1, 2**63, 10**15]))
        entry |= {"dtype": "U8", "shape": [number], "data_offsets": [0, number]}
    elif kind == "moved":
        entry["data_offsets"] = [
            n + draw(NUMBERS) for n in header[draw(st.sampled_from(sorted(header)[1:]))]["data_offsets"]
        ]
    elif kind == "renamed":
        new = draw(
            st.sampled_from(["", "x", "__metadata__", name.upper(), name + ".scales", name.replace(".", "..", 1)])
        )
        header = {new if n == name else n: e for n, e in header.items()}
    elif kind == "missing":
        del header[name]
    elif kind == "surplus":
        odd = [
            "model.layers.0.#.x",
            "model.layers.0.7.x",
            "a." + "9" * 5000 + ".b",
            "\x1b[2J",
            "model.layers.9.scales",
            "x" * 3000,
        ]
        for new in draw(st.lists(st.sampled_from(odd), min_size=1, max_size=3)):
            header[new] = {"dtype": "F32", "shape": [draw(st.sampled_from([0, 10**15])), 0], "data_offsets": [0, 0]}
    elif kind == "metadata":
        header["__metadata__"] = draw(ODD_VALUES)
    elif kind == "field":
        entry["more"] = draw(ODD_VALUES)
    text = written(header)
    if kind == "length":
        length = draw(
            st.sampled_from(
                [0, 1, 2, len(text) - 1, len(text) + 1, len(text) + 8, 1 << 24, (100 << 20) + 1, 2**63, 2**64 - 1]
            )
        )
    elif kind == "cut":
        whole = joined(text, data)
        return whole[: draw(st.integers(0, len(whole) - 1))]
    elif kind == "grown":
        data += b"\0" * draw(st.integers(1, 9))
    elif kind == "encoding":
        text = draw(
            st.sampled_from([b"\xef\xbb\xbf" + text, text.decode().encode("utf-16"), b" \n" + text, text + b" " * 7])
        )
    return joined(text, data, length)


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


# -- what lies in the folder


@st.composite
def disturbed(draw, files):
    """Files cut, lost, exchanged, or something else in their place."""
    files = dict(files)
    name = draw(st.sampled_from(sorted(files)))
    other = draw(st.sampled_from(sorted(files)))
    kind = draw(st.sampled_from(["cut", "lost", "other", "exchanged", "renamed", "copied", "link", "folder", "fifo"]))
    if kind == "cut":
        files[name] = files[name][: draw(st.integers(0, len(files[name]) - 1))]
    elif kind == "lost":
        del files[name]
    elif kind == "other":
        files[name] = files[other]
    elif kind == "exchanged":
        files[name], files[other] = files[other], files[name]
    elif kind == "renamed":
        files[draw(st.sampled_from(["model-x.safetensors", "MODEL.safetensors", "weights.safetensors", INDEX]))] = (
            files.pop(name)
        )
    elif kind == "copied":
        new = [
            "model-x.safetensors",
            "adapters.safetensors",
            "zzz.safetensors",
            "model.safetensors",
            INDEX,
            "config.json.bak",
        ]
        files[draw(st.sampled_from(new))] = draw(st.sampled_from([files[name], b"no tensors", FOLDER, FIFO]))
    else:
        targets = ["/dev/zero", "../outside/model.safetensors", name, "nowhere", "/", "."]
        files[name] = {"folder": FOLDER, "fifo": FIFO}.get(kind) or Link(draw(st.sampled_from(targets)))
    return files


def test_folders(layouts, tmp_path, given):
    def of(layout):
        return st.tuples(st.just(layout), disturbed(layouts[layout][0]))

    def check(corruption):
        layout, files = corruption
        check_folder(lay(tmp_path / "s" / "ck", files), layouts[layout][1], given)

    each(st.sampled_from(LAYOUTS).flatmap(of), STRUCTURED["folder"], check)


def otherwise(config, raw):
    """The keys of a config that say something else than `raw`'s, of the same kind."""
    try:
        found, due = json.loads(config), json.loads(raw)
        return [k for k in due if type(found[k]) is type(due[k])] if found.keys() == due.keys() else []
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def test_raw_bytes(layouts, tmp_path, given):
    """A few bytes of JSON changed, or any bytes at all in the place of a file."""

    @st.composite
    def scribbled(draw, files):
        name = draw(st.sampled_from(sorted(files)))
        raw = bytearray(files[name])
        if draw(st.booleans()):
            return files | {name: draw(st.binary(max_size=300))}
        end = 8 + struct.unpack("<Q", raw[:8])[0] if name.endswith(".safetensors") else len(raw)
        for _ in range(draw(st.integers(1, 4))):
            raw[draw(st.integers(0, end - 1))] = draw(st.integers(0, 255))
        return files | {name: bytes(raw)}

    def of(layout):
        return st.tuples(st.just(layout), scribbled(layouts[layout][0]))

    def check(corruption):
        layout, files = corruption
        another = otherwise(files[CONFIG], layouts[layout][0][CONFIG])
        check_folder(lay(tmp_path / "s" / "ck", files), layouts[layout][1], given, another)

    each(st.sampled_from(LAYOUTS).flatmap(of), RAW["folder"], check)


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


# -- caches


# wide enough for groups of 32
WIDE = TINY | {"qk_rope_head_dim": 32, "qk_head_dim": 44, "index_head_dim": 40}


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """(a model, its caches after a few tokens: in float, packed, packed in part)."""
    model = glm_dsa.load(checkpoints.write(tmp_path_factory.mktemp("cached") / "ck", WIDE))
    caches = []
    for options in (
        {},
        {"kv_bits": 8, "kv_group_size": 32},
        {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 3},
    ):
        caches.append(model.make_cache(**options))
        mx.eval(model(mx.array([[5, 6, 7, 8, 9]]), caches[-1]))
    return model, caches


def kinds_of(state):
    """What a state is, but for values: nobody can tell those from others."""
    return [(p.dtype, p.shape) if isinstance(p, mx.array) else p for p in state]


ODD_PARTS = st.one_of(
    st.sampled_from(
        ["text", "", 1.5, -1, 10**30, True, float("nan"), [], {}, (), [[]], ["a"], [1.5], [-1], [10**30], object()]
    ),
    st.sampled_from([(0,), (1,), (1, 5), (1, 5, 0), (0, 5, 64), (2, 5, 64), (1, 4, 64), (1, 5, 64, 1), (1, 5, 40)]).map(
        mx.zeros
    ),
    st.tuples(st.sampled_from([64, 40, 16, 8, 2]), st.sampled_from([mx.uint32, mx.int32, mx.float32, mx.bfloat16])).map(
        lambda of: mx.zeros((1, 5, of[0]), of[1])
    ),
)


def test_states_of_caches(cached, tmp_path):
    """A part lost, exchanged, doubled, or of another kind. What is taken is what was given, or no model goes on from it."""
    model, caches = cached
    sound = [[layer.state for layer in cache] for cache in caches]

    @st.composite
    def states(draw):
        kind, layer = draw(st.integers(0, 2)), draw(st.integers(0, 2))
        parts = list(sound[kind][layer])
        at, other = draw(st.integers(0, len(parts) - 1)), draw(st.integers(0, len(parts) - 1))
        how = draw(st.sampled_from(["odd", "odd", "lost", "more", "swapped", "none", "whole", "layer", "kind"]))
        if how == "odd":
            parts[at] = draw(ODD_PARTS)
        elif how == "lost":
            del parts[at]
        elif how == "more":
            parts.insert(at, draw(ODD_PARTS))
        elif how == "swapped":
            parts[at], parts[other] = parts[other], parts[at]
        elif how == "none":
            parts[at] = None
        elif how == "layer":
            parts[at] = sound[kind][(layer + 1) % 3][at]
        elif how == "kind":
            parts[at] = sound[(kind + 1) % 3][layer][at]
        return kind, layer, draw(ODD_PARTS) if how == "whole" else tuple(parts)

    def check(corruption):
        kind, layer, state = corruption
        with bounded(tmp_path):
            cache, refusal = outcome(lambda: glm_dsa.LayerCache.from_state(state))
            if refusal is None:
                caches = [glm_dsa.LayerCache.from_state(s) for s in sound[kind]]
                caches[layer] = cache
                _, refusal = outcome(lambda: mx.eval(model(mx.array([[3]]), caches)))
        if refusal is None:
            assert kinds_of(glm_dsa.LayerCache.from_state(state).state) == kinds_of(sound[kind][layer])

    each(states(), STRUCTURED["state"], check)


def test_prompt_caches(registered, cached, tmp_path):
    """mlx-lm's files of them: headers, metadata, raw bytes."""
    load = importlib.import_module("mlx_lm.generate").load_prompt_cache
    model, caches = cached
    file = tmp_path / "cache.safetensors"
    raws = []
    for cache in caches:
        save_prompt_cache(str(file), cache, {"model": "x"})
        raws.append(file.read_bytes())
    sound = [[kinds_of(layer.state) for layer in cache] for cache in caches]

    @st.composite
    def damaged(draw):
        kind = draw(st.integers(0, 2))
        header, data = parted(raws[kind])
        if draw(st.booleans()):
            return kind, draw(bad_header(raws[kind]))
        return kind, joined(
            draw(edited({"__metadata__": header["__metadata__"]}))[:-1]
            + b","
            + json.dumps({n: e for n, e in header.items() if n != "__metadata__"}).encode()[1:],
            data,
        )

    def check(corruption):
        kind, raw = corruption
        file.write_bytes(raw)
        with bounded(tmp_path):
            found, refusal = outcome(lambda: load(str(file)))
            if refusal is None:
                held = [kinds_of(layer.state) if isinstance(layer, glm_dsa.LayerCache) else layer for layer in found]
                _, refusal = outcome(lambda: mx.eval(model(mx.array([[3]]), found)))
        if refusal is None:
            assert held == sound[kind]

    each(damaged(), STRUCTURED["prompt cache"], check)
    each(st.tuples(st.just(0), st.binary(max_size=200)), RAW["prompt cache"], check)


# -- what the gate keeps, and what it is handed


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


# -- the gate as a process; and that these tests can fail


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
    monkeypatch.setattr("glm_dsa.checkpoint.check_values", lambda _: b"x" * (BYTES * 2))


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
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 2)
    monkeypatch.setattr(sys.modules[__name__], "BYTES", 1 << 28)
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
