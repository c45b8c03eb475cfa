"""A checkpoint's tokenizer.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glm_dsa.errors import printable


def tokenizer_of(folders: Sequence[Path]) -> Any:
    """The first of these that has one; None without. It neither cuts nor pads, as in HF's loader. Raises ValueError for one
    that cannot be read, in one line."""
    from tokenizers import Tokenizer

    for folder in folders:
        file = folder / "tokenizer.json"
        if file.is_file():
            try:
                found = Tokenizer.from_file(str(file))
            except Exception as error:  # tokenizers raises nothing more precise
                reason = " ".join(str(error).split())
                raise ValueError(f"{printable(str(file))}: no tokenizer: {printable(reason)}") from None
            found.no_truncation()
            found.no_padding()
            return found
    return None
