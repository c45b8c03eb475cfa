"""A text cut into windows: each is run by itself, and each token is scored where it has the most context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import pre_tokenizers

from glm_dsa.errors import printable
from reference.kept import TRAINED, check_kept, probes

from ..drift.prompts import tokenizer_of
from ..engines.spec import Side

Array = np.ndarray
CONTEXT, STRIDE = 2048, 1024


@dataclass(frozen=True)
class Window:
    """Tokens begin .. end of the text. Of what it predicts (begin + 1 .. end), what lies from `scored` on is scored here."""

    begin: int
    end: int
    scored: int

    @property
    def length(self) -> int:
        return self.end - self.begin

    @property
    def fresh(self) -> slice:
        """Of its positions but the last, those whose next token is scored here."""
        return slice(self.scored - self.begin - 1, self.length - 1)


@dataclass(frozen=True)
class Text:
    """ids int [tokens]; nbytes int [tokens]: of each (None where the tokenizer does not say, and of bare token ids)."""

    ids: Array
    source: str
    nbytes: Array | None = None

    def windows(self, context: int, stride: int) -> list[Window]:
        """Every `stride` tokens one of `context`; the last ends with the text. (Side by side, with a stride of `context`, the
        first token of each window is predicted by none.)"""
        out: list[Window] = []
        done = 0
        for begin in range(0, len(self.ids), stride):
            end = min(begin + context, len(self.ids))
            if end - max(done, begin + 1) < 1:
                break
            out.append(Window(begin, end, max(done, begin + 1)))
            done = end
            if end == len(self.ids):
                break
        return out

    def nbytes_of(self, tokens: Array) -> int:
        """Of these tokens, by their places; 0 where that is not known."""
        return 0 if self.nbytes is None else int(self.nbytes[tokens].sum())


def is_plain(window: Window, context: int, whole: int) -> bool:
    """Of the plain cut: whole windows side by side; of a text that is shorter than one, all of it."""
    return window.begin % context == 0 and (window.length == context or whole < context)


def text_of(sides: Sequence[Side], file: Path | None, tokens: Sequence[int] | None, most: int | None) -> Text:
    """Of a file, of token ids, or (for the kept checkpoints) the kept texts. Raises ValueError in one line."""
    vocabulary = sides[0].args.vocab_size
    if file is not None and tokens is not None:
        raise ValueError("a text and token ids: expected one of both")
    if most is not None and most < 2:
        raise ValueError(f"--tokens {most}: expected at least 2")
    if tokens is not None:
        found = Text(np.asarray(tokens, dtype=np.int64), "token ids")
    elif file is not None:
        found = _encoded(sides, _read(file), printable(str(file)))
    else:
        kept = [s.folder for s in sides if s.folder.resolve().parent == TRAINED.resolve()]
        if not kept:
            raise ValueError(
                "expected --text F: a file of text that the model is to predict, wikitext-2's test split, say"
            )
        check_kept(kept[0])
        found = _encoded(sides, "\n".join(probes()["texts"]), "the kept texts")
    if most is not None and most < len(found.ids):
        found = Text(found.ids[:most], found.source, None if found.nbytes is None else found.nbytes[:most])
    if found.ids.ndim != 1 or len(found.ids) < 2:
        raise ValueError(f"{found.source}: expected at least 2 tokens")
    if found.ids.min() < 0 or found.ids.max() >= vocabulary:
        raise ValueError(f"{found.source}: token {int(found.ids.max())} is beyond the vocabulary of {vocabulary}")
    return found


def _read(file: Path) -> str:
    try:
        return file.read_bytes().decode()  # line ends as they are
    except UnicodeDecodeError:
        raise ValueError(f"--text {printable(str(file))}: expected UTF-8") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"--text {printable(str(file))}: {getattr(error, 'strerror', None) or error}") from None


def _encoded(sides: Sequence[Side], text: str, source: str) -> Text:
    """By the tokenizer of both; where they differ, figures of the two would not be of the same tokens."""
    encodings: list[Any] = []
    for side in sides:
        tokenizer = tokenizer_of([side.folder])
        if tokenizer is not None:
            tokenizer.no_truncation()
            tokenizer.no_padding()
            encodings.append(tokenizer.encode(text, add_special_tokens=False))
    if not encodings:
        raise ValueError(f"{source}: expected a tokenizer.json beside one of the checkpoints, to encode it with")
    if any(e.ids != encodings[0].ids for e in encodings):
        raise ValueError(
            f"{source}: the tokenizers of {sides[0].checkpoint} and {sides[1].checkpoint} cut it differently"
        )
    # Offsets are of characters, which tokens may divide. In a byte-level alphabet a letter is a byte; a special token is text.
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    sizes = [len(token) if set(token) <= alphabet else len(token.encode()) for token in encodings[0].tokens]
    known = sum(sizes) == len(text.encode())
    return Text(np.array(encodings[0].ids, dtype=np.int64), source, np.array(sizes) if known else None)


def chunks(part: slice, size: int) -> Iterator[slice]:
    for start in range(part.start, part.stop, size):
        yield slice(start, min(start + size, part.stop))
