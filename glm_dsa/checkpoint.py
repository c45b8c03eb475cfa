"""Checkpoint folders: headers read and checked before any data, then tensors into a `Model`.

safetensors only: 8 bytes of header length, a JSON header, then the data. Nothing is executed, nothing is written.
"""

from __future__ import annotations

import math
import stat
import struct
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from . import foreign, memory, weights
from .config import ModelArgs
from .errors import CheckpointError, ConfigError, WeightsError
from .keys import LARGEST_JSON, parse_json, read_json
from .linear import SwitchLinear
from .model import Model, parameters_of

INDEX = "model.safetensors.index.json"
DTYPES = {  # as mlx reads them
    "U32": mx.uint32, "U8": mx.uint8, "F8_E4M3": mx.uint8, "BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32,
    "F64": mx.float64,
}  # fmt: skip
ITEM_BYTES = {  # of all that safetensors has by whole bytes: what is not read is refused by name, not by a header's entry
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U64": 8, "I64": 8, "U32": 4, "I32": 4,
    "U16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1,
}  # fmt: skip


class Described(NamedTuple):
    """What `weights.packing_of` asks of an array."""

    shape: tuple[int, ...]
    dtype: Any

    @property
    def ndim(self) -> int:
        return len(self.shape)


class Stored(NamedTuple):
    """A tensor as a file's header describes it. `begin`, `end`: its bytes, counted from the end of the header."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int = 0
    end: int = 0

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def described(self) -> Described:
        return Described(
            self.shape, DTYPES.get(self.dtype, mx.bool_)
        )  # which is nothing that packed weights are made of


def load(path: str | Path, dtype: mx.Dtype | None = None, check_finite: bool = True, **overrides: Any) -> Model:
    """A checkpoint folder -> a `Model` with its weights evaluated.

    HF layout (bf16, fp16, fp32, FP8 blocks, one file or shards) or mlx-lm's (quantized or not, bits per module).
    `dtype` casts the floating-point tensors that are not quantized (the correction bias stays float32).
    `check_finite` reads everything once more, to refuse NaN. `overrides` are conventions, as in `ModelArgs.from_dict`.
    What the weights take is logged ("glm_dsa", INFO) before they are read. Raises `CheckpointError`, for weights that this
    machine's memory cannot hold too.
    """
    model, stored = assemble(path, dtype, **overrides)
    memory.check_model(str(path), model)
    if check_finite:
        check_values(stored)
    for parameter in parameters_of(model).values():
        mx.eval(parameter)  # one by one: what a parameter is made of is freed before the next is made
    return model


@foreign.explained
def assemble(path: str | Path, dtype: mx.Dtype | None = None, **overrides: Any) -> tuple[Model, dict[str, Stored]]:
    """As `load`, but lazy: headers are read and every name and shape is checked, no tensor is."""
    path = Path(path)
    try:
        if not path.is_dir():
            raise CheckpointError(f"{path}: not a folder; that of a checkpoint (config.json, *.safetensors) is due")
        args = ModelArgs.from_file(path, **overrides)
        stored = read_headers(path)
        if weights.is_hf_layout(stored):
            weights.check_names(args, {name: s.shape for name, s in stored.items()})
        elif unasked := [n for n in stored if weights.is_mtp(args, n) and not args.num_nextn_predict_layers]:
            raise WeightsError(f"{unasked[0]}: an MTP layer's, and config.json names none (num_nextn_predict_layers)")
        model = Model(args)
        tensors = model.sanitize(read_tensors(stored))
        weights.check_dtypes(tensors)
        quantize_as_stored(model, tensors)
        weights.report_differences(
            {name: value.shape for name, value in parameters_of(model).items()},
            {n: t.shape for n, t in tensors.items()},
        )
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    except WeightsError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    if dtype is not None:
        tensors = {n: _cast(n, t, tensors, dtype) for n, t in tensors.items()}
    model.load_weights(list(tensors.items()), strict=True)
    model.eval()
    return model, stored


def read_headers(folder: Path) -> dict[str, Stored]:
    """{tensor: Stored} of all shards of a checkpoint folder. Raises `CheckpointError`."""
    try:
        files, index = _shards(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: {error.strerror or error}") from None
    stored: dict[str, Stored] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in stored:
                raise CheckpointError(
                    f"{file}: {name} is in {stored[name].file.name} too; each tensor belongs in one shard"
                )
            stored[name] = tensor
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
    return stored


def _shards(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    if not (folder / INDEX).is_symlink() and not (folder / INDEX).exists():
        files = sorted(folder.glob("model*.safetensors"))
        if not files:
            raise CheckpointError(
                f"{folder}: no model*.safetensors and no {INDEX}; safetensors is the only format read"
            )
        return files, None
    try:
        index = read_json(folder / INDEX, LARGEST_JSON).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(index, dict) or not all(isinstance(f, str) for f in index.values()):
        raise CheckpointError(f"{folder / INDEX}: weight_map must map tensor names to file names")
    files = []
    for file in sorted(set(index.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / INDEX}: {file!r} is not the name of a .safetensors file inside the folder"
            )
        if not (folder / file).is_file():
            tensor = next(n for n, f in index.items() if f == file)
            raise CheckpointError(f"{folder / file}: missing, though {INDEX} puts {tensor} there; download the shard")
        files.append(folder / file)
    return files, index


def read_header(file: Path) -> dict[str, Stored]:
    """The header of one safetensors file, checked against the file's size. Raises `CheckpointError`."""
    try:
        status = file.stat()
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{file}: no regular file")
        with file.open("rb") as stream:
            first = stream.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
            if not 2 <= length <= min(LARGEST_JSON, size - 8):
                raise CheckpointError(
                    f"{file}: not a safetensors file, or cut short in its header ({size} bytes; a header has up to "
                    f"{LARGEST_JSON:,})"
                )
            text = stream.read(length)
            header = parse_json(text, LARGEST_JSON)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror or error}") from None
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: the header is not valid JSON ({error}); not a safetensors file?") from None
    if not isinstance(header, dict) or not text.startswith(b"{"):
        raise CheckpointError(f"{file}: the header is no JSON object; not a safetensors file?")
    about = header.pop("__metadata__", None)
    about = {} if about is None else about  # mlx writes null
    if not isinstance(about, dict) or not all(map(is_text, (*about, *about.values()))):
        raise CheckpointError(f"{file}: __metadata__ maps texts to texts, and does not here; the header is damaged")
    stored: dict[str, Stored] = {}
    spans = []
    for name, entry in header.items():
        stored[name] = tensor = stored_as(file, name, entry)
        if 8 + length + tensor.end > size:
            raise CheckpointError(
                f"{file}: cut short: {name} ends at byte {8 + length + tensor.end}, the file at {size}; download it again"
            )
        spans.append((tensor.begin, tensor.end, name))
    end = 0
    for begin, stop, name in sorted(spans):
        if begin != end:
            raise CheckpointError(f"{file}: {name} begins at data byte {begin}, {end} is due; the header is damaged")
        end = stop
    if 8 + length + end != size:
        raise CheckpointError(f"{file}: {size - 8 - length - end} bytes after the last tensor; the header is damaged")
    return stored


def stored_as(file: Path, name: str, entry: Any) -> Stored:
    """A tensor's entry in a header, checked. Raises `CheckpointError`."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{file}: {name} has no dtype, shape and data_offsets; the header is damaged") from None
    if len(entry) > 3:
        raise CheckpointError(f"{file}: {name} has more than dtype, shape and data_offsets; the header is damaged")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(f"{file}: {name} has dtype {dtype!r}; known are {', '.join(ITEM_BYTES)}")
    whole = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 63 for n in (*shape, begin, end))
    if not whole or len(shape) > 8 or end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise CheckpointError(
            f"{file}: {name}, {dtype} {list(shape[:8])}, does not fill bytes {begin} to {end}; the header is damaged"
        )
    return Stored(file, dtype, shape, begin, end)


def is_text(value: Any) -> bool:
    """A string that UTF-8 can hold: no lone surrogate, which JSON's escapes can write."""
    return isinstance(value, str) and value == value.encode(errors="replace").decode()


def read_tensors(stored: dict[str, Stored]) -> dict[str, mx.array]:
    """Tensors by name, lazy. Raises `CheckpointError`."""
    tensors: dict[str, mx.array] = {}
    for file in sorted({s.file for s in stored.values()}):
        tensors |= read_file(file)
    return tensors


def read_file(file: Path) -> dict[str, mx.array]:
    """One shard's tensors, lazy; FP8 as bytes. Raises `CheckpointError`."""
    try:
        return mx.load(str(file))  # type: ignore[return-value]
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{file}: mlx cannot read it: {str(error).splitlines()[0]}") from None


def check_values(stored: dict[str, Stored]) -> None:
    """Reads every tensor, one at a time. Raises `CheckpointError` on NaN or infinity."""
    for file in sorted({s.file for s in stored.values()}):
        tensors = read_file(file)
        for name in list(tensors):
            tensor = tensors.pop(name)
            if stored[name].dtype == "F8_E4M3":
                tensor = mx.from_fp8(tensor, dtype=mx.float32)
            if mx.issubdtype(tensor.dtype, mx.floating) and not mx.isfinite(tensor).all().item():
                raise CheckpointError(f"{file}: {name} holds NaN or infinity; the checkpoint is damaged")


def quantize_as_stored(model: Model, tensors: dict[str, mx.array]) -> None:
    """Turns the modules whose weights are stored packed into quantized ones, each with the bits that its shapes show."""

    def packing(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if f"{path}.scales" not in tensors or not hasattr(module, "to_quantized"):
            return False
        packing = weights.packing_of(path, tensors, module.weight.shape[-1])
        if f"{path}.global_scale" not in tensors:
            return packing
        if packing["mode"] != "nvfp4" or not isinstance(module, SwitchLinear):
            raise WeightsError(f"{path}.global_scale: mlx keeps one for experts in nvfp4 only")
        return packing | {"global_scale": True}

    if any(name.endswith(".scales") for name in tensors):
        nn.quantize(model, class_predicate=packing)


def _cast(name: str, tensor: mx.array, tensors: dict[str, mx.array], dtype: mx.Dtype) -> mx.array:
    packed = name.rsplit(".", 1)[0] + ".scales" in tensors
    if packed or not mx.issubdtype(tensor.dtype, mx.floating) or name.endswith("e_score_correction_bias"):
        return tensor
    return tensor.astype(dtype)
