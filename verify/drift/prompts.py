"""What a comparison runs on: token ids, and the words that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from glm_dsa import ModelArgs
from glm_dsa.errors import printable
from reference.kept import TRAINED, check_kept, probes

from ..engines.lengths import default_length
from ..engines.spec import Side
from ..engines.tokenizer import tokenizer_of

Array = np.ndarray


@dataclass(frozen=True)
class Prompt:
    """tokens int [1, S]; every: all ids of the text, of which these are the first; word: an id as text."""

    tokens: Array
    source: str
    every: Array
    word: Callable[[Any], str] = field(default=lambda token: f"#{int(token)}")
    note: str = ""

    @classmethod
    def of(cls, ids: Array, source: str, folders: Sequence[Path], vocabulary: int, note: str = "") -> Prompt:
        if ids.ndim != 1 or len(ids) < 2:
            raise ValueError(f"{source}: expected at least 2 token ids in a row")
        if ids.min() < 0 or ids.max() >= vocabulary:
            raise ValueError(f"{source}: token {int(ids.max())} is beyond the vocabulary of {vocabulary}")
        return cls(ids[None].astype(np.int64), source, ids, words_of(folders), note)


def prompt_of(
    sides: Iterable[Side],
    file: Path | None,
    text: str | None,
    tokens: Sequence[int] | None,
    length: int | None,
    seed: int,
) -> Prompt:
    """From a file, a text, token ids, or (without any) the texts of the kept checkpoints, or random tokens. Raises
    ValueError in one line."""
    given = [name for name, of in (("prompt_file", file), ("text", text), ("tokens", tokens)) if of is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)}: expected one prompt")
    if seed < 0:
        raise ValueError(f"--seed {seed}: expected 0 or more")
    candidate, reference = sides
    args = reference.args
    if length is not None and not 2 <= length <= 1 << 20:
        raise ValueError(f"--tokens {length}: expected at least 2" + (", at most 2^20" if length > 2 else ""))
    folders = [s.folder for s in (reference, candidate)]
    if tokens is not None:
        ids = np.asarray(tokens, dtype=np.int64)[:length]
        return Prompt.of(ids, "token ids", folders, args.vocab_size)
    if file is not None or text is not None:
        return encoded(file, text, length, folders, args)
    wanted = length or default_length(args, 1)
    if any(f.resolve().parent == TRAINED.resolve() for f in folders):
        check_kept(folders[0] if folders[0].resolve().parent == TRAINED.resolve() else folders[1])
        return encoded(None, "\n".join(probes()["texts"]), wanted, folders, args, "the kept texts")
    ids = np.random.default_rng(seed).integers(3, args.vocab_size, wanted)
    note = "the prompt is of random tokens: --prompt-file gives figures that mean something"
    return Prompt.of(ids, f"random tokens, seed {seed}", folders, args.vocab_size, note)


def encoded(
    file: Path | None,
    text: str | None,
    length: int | None,
    folders: Sequence[Path],
    args: ModelArgs,
    source: str = "a text",
) -> Prompt:
    """A text by the tokenizer of one of these checkpoints. Raises ValueError in one line."""
    if file is not None:
        source = printable(str(file))
        if not file.is_file():
            raise ValueError(f"--prompt-file {source}: no such file")
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"--prompt-file {source}: expected UTF-8") from None
        except OSError as error:
            raise ValueError(f"--prompt-file {source}: {error.strerror}") from None
    tokenizer = tokenizer_of(folders)
    if tokenizer is None:
        raise ValueError(f"{source}: expected a tokenizer.json beside one of the checkpoints, to encode it with")
    assert text is not None
    ids = np.array(tokenizer.encode(text).ids, dtype=np.int64)
    wanted = min(len(ids), length or max(default_length(args, 1), 0))
    if length is not None and len(ids) < length:
        raise ValueError(f"{source}: {len(ids)} tokens, {length} are asked for")
    found = Prompt.of(ids[:wanted], source, folders, args.vocab_size)
    return Prompt(found.tokens, source, ids, found.word, found.note)


def words_of(folders: Sequence[Path]) -> Callable[[Any], str]:
    tokenizer = tokenizer_of(folders)

    @cache
    def word(token: int) -> str:
        if tokenizer is None:
            return f"#{token}"
        text = tokenizer.decode([token], skip_special_tokens=False)
        return text if text and "\ufffd" not in text else str(tokenizer.id_to_token(token) or f"#{token}")

    return lambda token: word(int(token))
