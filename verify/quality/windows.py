"""A text cut into windows: each is run by itself, and each token is scored where it has the most context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glm_dsa.errors import printable

from ..cases import TRAINED, check_kept, probes
from ..drift.prompts import tokenizer_of
from ..drift.sides import Side

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
    """ids int [tokens]; begins: the byte at which each begins (None: token ids without a text); nbytes: of all of it."""

    ids: Array
    source: str
    begins: Array | None = None
    nbytes: int = 0

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

    def nbytes_of(self, windows: Sequence[Window]) -> int:
        """Of the tokens that are scored: all but the first."""
        if self.begins is None:
            return 0
        last = windows[-1].end
        end = self.nbytes if last == len(self.ids) else int(self.begins[last])
        return end - int(self.begins[windows[0].scored])


def is_plain(window: Window, context: int, whole: int) -> bool:
    """Of the plain cut: whole windows side by side; of a text that is shorter than one, all of it."""
    return window.begin % context == 0 and (window.length == context or whole < context)


def text_of(sides: Sequence[Side], file: Path | None, tokens: Sequence[int] | None, most: int | None) -> Text:
    """Of a file, of token ids, or (for the kept checkpoints) the kept texts. Raises ValueError in one line."""
    vocabulary = sides[0].args.vocab_size
    if file is not None and tokens is not None:
        raise ValueError("a text and token ids: one of both is due")
    if most is not None and most < 2:
        raise ValueError(f"--tokens {most}: at least 2 are due")
    if tokens is not None:
        found = Text(np.asarray(tokens, dtype=np.int64), "token ids")
    elif file is not None:
        found = _encoded(sides, _read(file), printable(str(file)))
    else:
        kept = [s.folder for s in sides if s.folder.resolve().parent == TRAINED.resolve()]
        if not kept:
            raise ValueError(
                "--text F is due: a file of text that the model is to predict, wikitext-2's test split, say"
            )
        check_kept(kept[0])
        found = _encoded(sides, "\n".join(probes()["texts"]), "the kept texts")
    if most is not None and most < len(found.ids):
        begins = found.begins
        nbytes = found.nbytes if begins is None else int(begins[most])
        found = Text(found.ids[:most], found.source, None if begins is None else begins[:most], nbytes)
    if found.ids.ndim != 1 or len(found.ids) < 2:
        raise ValueError(f"{found.source}: at least 2 tokens are due")
    if found.ids.min() < 0 or found.ids.max() >= vocabulary:
        raise ValueError(f"{found.source}: token {int(found.ids.max())} is beyond the vocabulary of {vocabulary}")
    return found


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"--text {printable(str(file))}: UTF-8 is due") from None
    except OSError as error:
        raise ValueError(f"--text {printable(str(file))}: {error.strerror or error}") from None


def _encoded(sides: Sequence[Side], text: str, source: str) -> Text:
    """By the tokenizer of both; where they differ, figures of the two would not be of the same tokens."""
    encodings: list[Any] = []
    for side in sides:
        tokenizer = tokenizer_of([side.folder])
        if tokenizer is not None:
            encodings.append(tokenizer.encode(text, add_special_tokens=False))
    if not encodings:
        raise ValueError(f"{source}: a tokenizer.json is due beside one of the checkpoints, to encode it with")
    if any(e.ids != encodings[0].ids for e in encodings):
        raise ValueError(
            f"{source}: the tokenizers of {sides[0].checkpoint} and {sides[1].checkpoint} cut it differently"
        )
    at = np.concatenate([[0], np.cumsum([len(c.encode()) for c in text])])  # bytes before each character
    begins = at[[begin for begin, _ in encodings[0].offsets]]
    return Text(np.array(encodings[0].ids, dtype=np.int64), source, begins, int(at[-1]))


def chunks(part: slice, size: int) -> Iterator[slice]:
    for start in range(part.start, part.stop, size):
        yield slice(start, min(start + size, part.stop))
