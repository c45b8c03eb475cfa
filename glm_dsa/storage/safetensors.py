"""One safetensors file: 8 bytes of header length, a JSON header, then the data. Nothing is executed, nothing is written."""

from __future__ import annotations

import io
import math
import re
import stat
import struct
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from ..config_reader import LARGEST_JSON, parse_json
from ..errors import CheckpointError
from ..layouts import Part

DTYPES = {  # what tensors may be stored in, as mlx knows it; F64 is read as float32
    "U32": mx.uint32, "U8": mx.uint8, "F8_E4M3": mx.uint8, "BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32,
    "F64": mx.float64,
}  # fmt: skip
UNREADABLE = {  # what else a header may name, and its bytes
    "BOOL": 1, "I8": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "I32": 4, "I64": 8, "U64": 8, "C64": 8,
}  # fmt: skip
ITEM_BYTES = {name: dtype.size for name, dtype in DTYPES.items()} | UNREADABLE


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
            raise CheckpointError(f"{file}: expected {name} at data byte {end}, got {begin}; the header is damaged")
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
