"""What a release is run on: a file's text, the kept texts where its tokenizer can encode them, or else random tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glm_dsa.errors import CheckpointError, printable

from ..engines.layout_evidence import kept_texts
from ..engines.tokenizer import tokenizer_of

Array = np.ndarray


@dataclass(frozen=True)
class Prompt:
    """tokens int [1, S]; source: of what; why_random: why it is no text, empty where it is one."""

    tokens: Array
    source: str
    why_random: str = ""

    def __str__(self) -> str:
        return f"{self.source}, {self.tokens.shape[1]} tokens"

    @property
    def is_text(self) -> bool:
        return not self.why_random


def of_file(folder: Path, file: Path, tokens: int | None, vocabulary: int) -> Prompt:
    """A user's text, its first `tokens`. Raises ValueError and CheckpointError in one line."""
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"--prompt-file {file}: expected {folder / 'tokenizer.json'}, to encode it with")
    if file.exists() and not file.is_file():
        raise ValueError(f"--prompt-file {file}: no regular file")
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--prompt-file {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"--prompt-file {file}: expected UTF-8") from None
    try:
        ids = tokenizer_of([folder]).encode(text).ids
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if len(ids) < (tokens or 2):
        raise ValueError(f"--prompt-file {file}: expected {len(ids)} tokens, at least {tokens or 2}")
    if max(ids) >= vocabulary:
        where = folder / "tokenizer.json"
        raise ValueError(f"--prompt-file {file}: token {max(ids)} of {where} is beyond the vocabulary of {vocabulary}")
    return Prompt(np.array([ids[:tokens]]), printable(file.name))


def of_kept_texts(folders: Sequence[Path], length: int, vocabulary: int, seed: int) -> Prompt:
    """A stretch of the kept texts; random tokens, and why, where they are not to be had. The seed says which stretch, or which
    tokens. This project's code comes first: a large model knows the classics by heart, and then nothing shows."""
    ids, why = _kept(folders, length, vocabulary)
    if why:
        drawn = np.random.default_rng(seed).integers(3, vocabulary, (1, length))
        return Prompt(drawn, f"random tokens, seed {seed}", why)
    start = seed * length % (len(ids) - length + 1)
    return Prompt(ids[None, start : start + length], f"the kept texts, from token {start}")


def _kept(folders: Sequence[Path], length: int, vocabulary: int) -> tuple[Array, str]:
    """(ids, why there are none)."""
    none = np.array([], dtype=int)
    try:
        tokenizer = tokenizer_of(folders)
    except ValueError as error:
        return none, str(error)
    if tokenizer is None:
        return none, "no tokenizer.json beside the weights"
    ids = np.array(tokenizer.encode("\n\n".join(reversed([*kept_texts().values()]))).ids, dtype=int)
    if len(ids) < length:
        return none, f"the kept texts have {len(ids)} tokens by tokenizer.json, expected {length}: add --prompt-file"
    if ids.max() >= vocabulary:
        return none, f"tokenizer.json: token {ids.max()} is beyond the vocabulary of {vocabulary}"
    return ids, ""
