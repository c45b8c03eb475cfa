"""The shards of a checkpoint folder, and the index that lists them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..config_reader import LARGEST_JSON, read_json
from ..errors import CheckpointError, ConfigError
from .safetensors import Stored, read_header

INDEX = "model.safetensors.index.json"
STALE = "stale index"


def stored_headers(folder: Path) -> dict[str, Stored]:
    """{tensor: Stored} of all shards of a checkpoint folder, under the names that they have there. Raises `CheckpointError`."""
    return indexed_headers(folder)[0]


def indexed_headers(folder: Path) -> tuple[dict[str, Stored], bool]:
    """And whether there is an index that is of another build."""
    files, index, is_stale = _shards(folder)
    stored = merged(files)
    if index is not None:
        for name, shard in index.items():
            if name not in stored or stored[name].file.name != shard:
                raise CheckpointError(
                    f"{folder / shard}: {name} is not in it, though {INDEX} says so; download the shard again"
                )
        for name, tensor in stored.items():
            if name not in index:
                raise CheckpointError(
                    f"{tensor.file}: {name} is not listed in {INDEX}; do index and shards belong together?"
                )
        unlisted = sorted({f.name for f in folder.glob("model*.safetensors")} - set(index.values()))
        if unlisted:
            raise CheckpointError(
                f"{folder / unlisted[0]}: not listed in {INDEX}, though mlx-lm would load it; list it or remove it"
            )
    return stored, is_stale


def merged(files: list[Path]) -> dict[str, Stored]:
    stored: dict[str, Stored] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in stored:
                raise CheckpointError(
                    f"{file}: {name} is in {stored[name].file.name} too; each tensor belongs in one shard"
                )
            stored[name] = tensor
    return stored


def _shards(folder: Path) -> tuple[list[Path], dict[str, str] | None, bool]:
    """(files, the index that they are held to, whether there is one of another build)."""
    if not (folder / INDEX).is_symlink() and not (folder / INDEX).exists():
        files = sorted(folder.glob("model*.safetensors"))
        if not files:
            raise CheckpointError(
                f"{folder}: no model*.safetensors and no {INDEX}; safetensors is the only format read"
            )
        return files, None, False
    try:
        index = read_json(folder / INDEX, LARGEST_JSON).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(index, dict) or not all(isinstance(f, str) for f in index.values()):
        raise CheckpointError(f"{folder / INDEX}: weight_map must map tensor names to file names")
    files = []
    if _is_stale(folder, index):
        return sorted(folder.glob("model*.safetensors")), None, True
    for file in sorted(set(index.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / INDEX}: {file!r} is not the name of a .safetensors file inside the folder"
            )
        if not (folder / file).is_file():
            tensor = next(n for n, f in index.items() if f == file)
            raise CheckpointError(f"{folder / file}: missing, though {INDEX} puts {tensor} there; download the shard")
        files.append(folder / file)
    return files, index, False


def _is_stale(folder: Path, index: Mapping[str, str]) -> bool:
    """Whether an index is of what a build was made from: none of its files is there, others are, which mlx-lm reads."""
    names = set(index.values())
    if any(Path(name).name != name or (folder / name).is_symlink() or (folder / name).exists() for name in names):
        return False
    return any(folder.glob("model*.safetensors"))
