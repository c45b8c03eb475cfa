"""Folders that are damaged as downloads and merges damage them; each is a maker."""

from __future__ import annotations

import json
from pathlib import Path

from glm_dsa.storage import INDEX, read_header

from .makers import Bench, tiny

WHOLE = "model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 5368709120\n"


def cut_short(bench: Bench, folder: Path) -> Path:
    file = tiny()(bench, folder) / WHOLE
    file.write_bytes(file.read_bytes()[:-1000])
    return folder


def lfs_pointer(bench: Bench, folder: Path) -> Path:
    (tiny()(bench, folder) / WHOLE).write_text(POINTER)
    return folder


def no_weights(bench: Bench, folder: Path) -> Path:
    (tiny()(bench, folder) / WHOLE).unlink()
    return folder


def gguf_alone(bench: Bench, folder: Path) -> Path:
    (tiny()(bench, folder) / WHOLE).rename(folder / "GLM-5.2-Q4_K_M.gguf")
    return folder


def shard_left_over(bench: Bench, folder: Path) -> Path:
    """An index that lists one file, and a shard of an older conversion beside it."""
    file = tiny()(bench, folder) / WHOLE
    _write_index(folder, dict.fromkeys(read_header(file), WHOLE))
    (folder / "model-00001-of-00002.safetensors").write_bytes(file.read_bytes())
    return folder


def shard_missing(bench: Bench, folder: Path) -> Path:
    """An index that puts one tensor into a shard that was not downloaded."""
    file = tiny()(bench, folder) / WHOLE
    _write_index(
        folder, dict.fromkeys(read_header(file), WHOLE) | {"lm_head.weight": "model-00002-of-00002.safetensors"}
    )
    return folder


def stale_index(bench: Bench, folder: Path) -> Path:
    """The index of what a build was made from: none of its files is there."""
    file = tiny()(bench, folder) / WHOLE
    _write_index(folder, dict.fromkeys(read_header(file), "model-00001-of-00003.safetensors"))
    return folder


def index_outside(bench: Bench, folder: Path) -> Path:
    """An index that names a file of another folder."""
    file = tiny()(bench, folder) / WHOLE
    _write_index(folder, dict.fromkeys(read_header(file), "../model.safetensors"))
    return folder


def _write_index(folder: Path, files: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
