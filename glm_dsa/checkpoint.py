"""Checkpoint folders: headers read and checked before any data, then tensors into a `Model`.

safetensors only: 8 bytes of header length, a JSON header, then the data. Nothing is executed, nothing is written.
"""

from __future__ import annotations

import io
import logging
import math
import re
import stat
import struct
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from . import foreign, layouts, memory, weights
from .config import ModelArgs
from .errors import CheckpointError, ConfigError, WeightsError, printable
from .keys import LARGEST_JSON, parse_json, read_json
from .layouts import Part
from .linear import SwitchLinear
from .model import Model, parameters_of
from .mtp import MtpLayer

INDEX = "model.safetensors.index.json"
STALE = "stale index"
HEADS = "mtp*.safetensors"  # an MTP head beside a build, which mlx-lm's own loader does not see
DTYPES = {  # what tensors may be stored in, as mlx knows it; F64 is read as float32
    "U32": mx.uint32, "U8": mx.uint8, "F8_E4M3": mx.uint8, "BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32,
    "F64": mx.float64,
}  # fmt: skip
UNREADABLE = {  # what else a header may name, and its bytes
    "BOOL": 1, "I8": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "I32": 4, "I64": 8, "U64": 8, "C64": 8,
}  # fmt: skip
ITEM_BYTES = {name: dtype.size for name, dtype in DTYPES.items()} | UNREADABLE

log = logging.getLogger("glm_dsa")


class Described(NamedTuple):
    """What `weights.packing_of` asks of an array."""

    shape: tuple[int, ...]
    dtype: Any

    @property
    def ndim(self) -> int:
        return len(self.shape)


class Stored(NamedTuple):
    """A tensor as a file's header describes it, or a view of one. `begin`, `end`: its bytes, counted from the end of the
    header. part: what it is of a tensor in the file, where it is not the one of its name. stride: bytes from one entry of
    the first axis to the next, where other tensors' rows lie between them."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int = 0
    end: int = 0
    part: Part | None = None
    stride: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def view(self, part: Part) -> Stored:
        """One expert of this tensor, or rows, or rows of one."""
        item, inner = ITEM_BYTES[self.dtype], self.shape if part.expert is None else self.shape[1:]
        first = 0 if part.rows is None else part.rows[0]
        begin = self.begin + ((part.expert or 0) * math.prod(inner) + first * inner[-1]) * item
        stride = math.prod(inner[1:]) * item if part.rows is not None and len(inner) > 2 else 0
        view = Stored(self.file, self.dtype, part.shape(self.shape), begin, self.end, part, stride)
        return view if stride else view._replace(end=begin + view.nbytes)

    @property
    def described(self) -> Described:
        return Described(
            self.shape, DTYPES.get(self.dtype, mx.bool_)
        )  # which is nothing that packed weights are made of


class Headers(dict[str, Stored]):
    """{tensor: Stored}, under the names that are known here. notes: lines for people. kinds: see `layouts.Plan`."""

    notes: tuple[str, ...] = ()
    kinds: frozenset[str] = frozenset()


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
def assemble(path: str | Path, dtype: mx.Dtype | None = None, **overrides: Any) -> tuple[Model, Headers]:
    """As `load`, but lazy: headers are read and every name and shape is checked, no tensor is."""
    path = Path(path)
    try:
        if not path.is_dir():
            raise CheckpointError(f"{path}: not a folder; that of a checkpoint (config.json, *.safetensors) is due")
        args = ModelArgs.from_file(path, **overrides)
        stored = read_headers(path, args)
        if weights.is_hf_layout(stored):
            weights.check_names(args, {name: s.shape for name, s in stored.items()})
        elif beyond := [n for n in stored if weights.is_mtp(args, n) and not args.num_nextn_predict_layers]:
            raise WeightsError(
                f"{beyond[0]}: expected no layer beyond num_hidden_layers = {args.num_hidden_layers} but an MTP layer, which has "
                "an eh_proj; does config.json belong to these weights?"
            )
        model = Model(args)
        tensors = model.sanitize(read_tensors(stored), dtype)
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
    for note in stored.notes:
        log.info("%s", note)
    if dtype is not None:
        tensors = {n: _cast(n, t, tensors, dtype) for n, t in tensors.items()}
    model.load_weights(list(tensors.items()), strict=True)
    model.eval()
    return model, stored


def read_headers(folder: Path, args: ModelArgs | None = None) -> Headers:
    """Of all files of a checkpoint folder, in whatever layout. `args`: config.json's, if it was read already.

    Raises `CheckpointError`.
    """
    if args is None:
        try:
            args = ModelArgs.from_file(folder)
        except (ConfigError, OSError):  # whoever needs it will say so
            args = None
    try:
        stored, is_stale = _stored(folder)
        beside, notes = _head_beside(folder, args, stored)
    except OSError as error:
        raise CheckpointError(f"{folder}: {error.strerror or error}") from None
    headers = known(folder, stored | beside, args)
    headers.notes += tuple(notes)
    if beside:
        headers.kinds |= {layouts.HEAD}
    if is_stale:
        headers.kinds |= {STALE}
        headers.notes += (
            f"{INDEX} names files that are not there, of another build: read without it, as mlx-lm does; HF does not load this, "
            "remove the index or write it anew",
        )
    return headers


def known(origin: str | Path, stored: Mapping[str, Stored], args: ModelArgs | None) -> Headers:
    """Headers as they are stored -> under the names that are known here. `origin`: for messages. Raises `CheckpointError`."""
    if stored and args is not None and all(layouts.is_of_mtp(args, name) for name in stored):
        raise CheckpointError(
            f"{origin}: an MTP head alone, {len(stored):,} tensors: expected a model; put the head beside the model's files, as "
            "mtp.safetensors"
        )
    for name, tensor in stored.items():
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"{tensor.file}: {name} is {tensor.dtype}: expected one of {', '.join(DTYPES)}")
    try:
        found = layouts.plan({name: tensor.shape for name, tensor in stored.items()}, args)
    except WeightsError as error:
        raise CheckpointError(f"{origin}: {error}") from None
    headers = Headers(
        (name, stored[name] if part == (name, None, None) else stored[part.source].view(part))
        for name, part in found.parts.items()
    )
    headers.notes, headers.kinds = tuple(map(printable, found.notes)), frozenset(found.kinds)
    return headers


def _head_beside(
    folder: Path, args: ModelArgs | None, stored: Mapping[str, Stored]
) -> tuple[dict[str, Stored], list[str]]:
    """An MTP head in a file of its own that no index lists, and what is to be said of such files."""
    listed = {tensor.file.name for tensor in stored.values()}
    files = [file for file in sorted(folder.glob(HEADS)) if file.name not in listed]
    if args is None or not files:
        return {}, []
    beside = _merged(files)
    names = ", ".join(file.name for file in files)
    if foreign := next((name for name in beside if not layouts.is_of_mtp(args, name)), None):
        reason = f"{foreign} in it is no tensor of this model's MTP layer, in any form that is known here"
    elif any(layouts.is_of_mtp(args, name) for name in stored):
        reason = "the model's own files hold its MTP layer"
    else:
        return beside, [printable(f"MTP head in {names}, beside the model: taken as its MTP layer")]
    return {}, [printable(f"{names}: unread; {reason}")]


def stored_headers(folder: Path) -> dict[str, Stored]:
    """{tensor: Stored} of all shards of a checkpoint folder, under the names that they have there. Raises `CheckpointError`."""
    return _stored(folder)[0]


def _stored(folder: Path) -> tuple[dict[str, Stored], bool]:
    """And whether there is an index that is of another build."""
    files, index, is_stale = _shards(folder)
    stored = _merged(files)
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


def _merged(files: list[Path]) -> dict[str, Stored]:
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


def read_header(file: Path) -> dict[str, Stored]:
    """The header of one safetensors file, checked against the file's size. Raises `CheckpointError`."""
    try:
        status = file.stat()
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{file}: no regular file")
        with file.open("rb") as stream:
            first = stream.read(8)
            if first == b"version ":
                raise CheckpointError(
                    f"{file}: a Git LFS pointer, not the file itself; run git lfs pull, or download it again"
                )
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
        raise CheckpointError(f"{file}: {name} has dtype {dtype!r}; known are {', '.join(DTYPES)}")
    whole = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 63 for n in (*shape, begin, end))
    if not whole or len(shape) > 8 or end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise CheckpointError(
            f"{file}: {name}, {dtype} {list(shape[:8])}, does not fill bytes {begin} to {end}; the header is damaged"
        )
    return Stored(file, dtype, shape, begin, end)


def is_text(value: Any) -> bool:
    """A string that UTF-8 can hold: no lone surrogate, which JSON's escapes can write."""
    return isinstance(value, str) and value == value.encode(errors="replace").decode()


def read_tensors(stored: Mapping[str, Stored]) -> dict[str, mx.array]:
    """Tensors by name, lazy. Raises `CheckpointError`."""
    files = {file: read_file(file) for file in sorted({s.file for s in stored.values()})}
    return {name: (s.part or Part(name)).of(files[s.file][(s.part or Part(name)).source]) for name, s in stored.items()}


def read_file(file: Path) -> dict[str, mx.array]:
    """One file's tensors under the names that they have there, lazy; FP8 as bytes, F64 as float32. Raises `CheckpointError`."""
    try:
        return mx.load(str(file))  # type: ignore[return-value]
    except (RuntimeError, ValueError) as error:
        doubles = {name for name, tensor in read_header(file).items() if tensor.dtype == "F64"}
        if doubles:
            return _with_doubles(file, doubles)
        raise CheckpointError(f"{file}: mlx cannot read it: {str(error).splitlines()[0]}") from None


def _with_doubles(file: Path, doubles: Container[str]) -> dict[str, mx.array]:
    """mlx refuses a file with F64 in it: it is shown a header that calls them I64, and has their bits cast."""
    try:
        tensors: Any = mx.load(_AsIntegers(file), format="safetensors")
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{file}: mlx cannot read it: {str(error).splitlines()[0]}") from None
    return {name: _to_float32(t) if name in doubles else t for name, t in tensors.items()}


def _to_float32(bits: mx.array) -> mx.array:
    """mlx has float64 on the CPU only. One rounding."""
    return bits.view(mx.float64, stream=mx.cpu).astype(mx.float32, stream=mx.cpu)


class _AsIntegers(io.FileIO):
    def __init__(self, file: Path) -> None:
        super().__init__(file)
        length = super().read(8)
        header = super().read(int.from_bytes(length, "little"))
        self.header = length + re.sub(rb'("dtype"\s*:\s*")F64"', rb'\1I64"', header)  # a name's quotes are escaped
        self.seek(0)

    def __del__(self) -> None:  # mlx lets it go with the last of its arrays, open
        self.close()

    def readinto(self, buffer: Any) -> int:
        at, count = self.tell(), super().readinto(buffer) or 0
        own = self.header[at : at + count]
        memoryview(buffer)[: len(own)] = own
        return count


def read_piece(stored: Stored, rows: slice | None = None) -> mx.array:
    """A tensor, or rows of it, by offset: `mx.load` would read all of it, and keep it."""
    shape, each = stored.shape, 0
    begin, end = 0, stored.nbytes
    if rows is not None:
        each = stored.nbytes // shape[0]
        begin, end, shape = rows.start * each, rows.stop * each, (rows.stop - rows.start, *shape[1:])
    raw = read_bytes(stored, begin, end)
    bits = mx.array(memoryview(raw)) if raw else mx.zeros((0,), mx.uint8)  # type: ignore[arg-type]
    if stored.dtype == "F64":
        return _to_float32(bits).reshape(shape)
    return bits.view(DTYPES[stored.dtype]).reshape(shape)


def read_bytes(stored: Stored, begin: int, end: int) -> bytes:
    """Bytes of a tensor; of a view, its own, one after another. Fewer where the file ends."""
    block = stored.nbytes // stored.shape[0] if stored.stride else max(stored.nbytes, 1)
    out = []
    with stored.file.open("rb") as stream:
        header = 8 + int.from_bytes(stream.read(8), "little")
        while begin < end:
            entry, offset = divmod(begin, block)
            count = min(end - begin, block - offset)
            stream.seek(header + stored.begin + entry * stored.stride + offset)
            out.append(stream.read(count))
            begin += count
    return b"".join(out)


def check_values(stored: Mapping[str, Stored]) -> None:
    """Reads every tensor, one at a time. Raises `CheckpointError` on NaN or infinity."""
    dtypes = {(s.file, name if s.part is None else s.part.source): s.dtype for name, s in stored.items()}
    for file in sorted({s.file for s in stored.values()}):
        tensors = read_file(file)
        for name in list(tensors):
            tensor, dtype = tensors.pop(name), dtypes.get((file, name))
            if dtype is None:  # unread
                continue
            if dtype == "F8_E4M3":
                tensor = mx.from_fp8(tensor, dtype=mx.float32)
            if mx.issubdtype(tensor.dtype, mx.floating) and not mx.isfinite(tensor).all().item():
                raise CheckpointError(f"{file}: {name} holds NaN or infinity; the checkpoint is damaged")


def add_mtp(model: Model, folder: Path) -> bool:
    """Reads an MTP head in a file of its own into a model that was loaded without it. Returns whether there is one.

    Raises `CheckpointError`.
    """
    args = model.args
    if model.mtp is not None or not args.num_nextn_predict_layers or not any(folder.glob(HEADS)):
        return False
    own = {n: s for n, s in read_headers(folder, args).items() if weights.is_mtp(args, n)}
    if not own:
        return False
    try:
        tensors = weights.to_modules(args, read_tensors(own))
        weights.check_dtypes(tensors)
        model.model.layers = [*model.layers, MtpLayer(args, args.num_hidden_layers)]
        quantize_as_stored(model, tensors)
        due = {n: v.shape for n, v in parameters_of(model).items() if weights.is_mtp(args, n)}
        weights.report_differences(due, {n: t.shape for n, t in tensors.items()})
    except WeightsError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    model.load_weights(list(tensors.items()), strict=False)
    model.eval()
    return True


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
