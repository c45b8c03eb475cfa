"""How tensors are stored: headers read and checked before any data, rows and pieces read alone. safetensors only."""

from .folder import INDEX, STALE, indexed_headers, merged, stored_headers
from .safetensors import (
    DTYPES,
    ITEM_BYTES,
    UNREADABLE,
    Described,
    Stored,
    is_text,
    read_bytes,
    read_file,
    read_header,
    read_piece,
    read_tensors,
    stored_as,
)

__all__ = [
    "DTYPES",
    "INDEX",
    "ITEM_BYTES",
    "STALE",
    "UNREADABLE",
    "Described",
    "Stored",
    "indexed_headers",
    "is_text",
    "merged",
    "read_bytes",
    "read_file",
    "read_header",
    "read_piece",
    "read_tensors",
    "stored_as",
    "stored_headers",
]
