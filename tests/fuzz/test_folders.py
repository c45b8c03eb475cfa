"""What lies in a folder, and raw bytes of it."""

import json
import struct

from hypothesis import strategies as st

from .bounds import CONFIG, INDEX, RAW, STRUCTURED, check_folder, each
from .files import FIFO, FOLDER, LAYOUTS, Link, lay


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
