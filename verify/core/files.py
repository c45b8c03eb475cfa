"""Files that are written as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Another name to write to: under its own the file is there as a whole, or as it was. Raises OSError."""
    file = file.resolve()  # a link stays one
    if file.exists() and not file.is_file():
        raise FileExistsError(f"{file}: is there, and no file that could be replaced")
    part = file.with_name(f".{file.stem}.{os.getpid()}.part{file.suffix}")  # numpy adds what is missing of a suffix
    try:
        yield part
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
