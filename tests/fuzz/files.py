"""Folders as bytes, JSON that means something else or nothing, headers with one thing wrong."""

import json
import os
import shutil
import struct
from copy import deepcopy

from hypothesis import strategies as st

LAYOUTS = ("hf", "fp8", "mlx", "early")


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
