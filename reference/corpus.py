"""What the small checkpoint is trained and measured on: Python's standard library, and generated key-value lines.

Both are split once and for all by a stable hash: top-level modules and packages into training and held-out ones, keys into
those of training and those of the tests. The library's text is that of the Python that runs: another version has other files.
"""

from __future__ import annotations

import hashlib
import sysconfig
from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import pre_tokenizers

Array = np.ndarray

SPECIAL = ["<|pad|>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|sep|>"]
PAD, END, USER, ASSISTANT, SYSTEM, SEPARATOR = range(len(SPECIAL))

LETTERS = "abcdefghijklmnopqrstuvwxyz"
KEY, VALUE = 3, 3  # letters of a key (small ones) and of a value (capitals)

# not on every machine, not the same on every machine, or tables and near copies of each other rather than text
SKIPPED = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "lib2to3", "distutils",
    "ensurepip", "pydoc_data",
}  # fmt: skip
GENERATED = ("_sysconfigdata", "config-", "_sysconfig_vars")
COPIED = 0.25  # a held-out file of which more long lines than this stand in training files too is left out


def byte_ids() -> Array:
    """The token id of each byte, int [256]: the alphabet of HF's byte-level tokenizers, sorted, after the special tokens."""
    printable = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    others = iter(range(256, 512))
    spelled = [chr(b) if b in printable else chr(next(others)) for b in range(256)]
    order = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    return np.array([len(SPECIAL) + order[letter] for letter in spelled])


BYTE_IDS = byte_ids()
BYTES = {int(token): byte for byte, token in enumerate(BYTE_IDS)}


def encode(text: str | bytes) -> Array:
    """Token ids of a text, as the checkpoint's tokenizer gives them, int [bytes]."""
    data = text.encode() if isinstance(text, str) else text
    return BYTE_IDS[np.frombuffer(data, np.uint8)]


def decode(tokens: Array) -> str:
    """The text of token ids; special tokens by name."""
    data = b"".join(SPECIAL[t].encode() if t < len(SPECIAL) else bytes([BYTES[t]]) for t in tokens)
    return data.decode(errors="replace")


def is_held_out(name: str) -> bool:
    """One in ten, by the name's SHA-256."""
    return hashlib.sha256(name.encode()).digest()[0] % 10 == 0


# -- library text


@cache
def files(held_out: bool) -> dict[str, bytes]:
    """{path: content} of one side of the split. A package goes to one side as a whole."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(
        path.as_posix() for path in (file.relative_to(root) for file in root.rglob("*.py"))
        if not SKIPPED & set(path.parts) and not any(part.startswith(GENERATED) for part in path.parts)
    )  # fmt: skip
    if not names:
        raise ValueError(f"{root}: no sources of the standard library there, and they are the text to train on")
    chosen = {name: (root / name).read_bytes() for name in names if is_held_out(_top(name)) == held_out}
    if not held_out:
        return chosen
    known = {line for text in files(False).values() for line in _long_lines(text)}
    return {name: text for name, text in chosen.items() if _share(_long_lines(text), known) <= COPIED}


def _top(name: str) -> str:
    return name.split("/")[0].removesuffix(".py")


def _long_lines(text: bytes) -> set[bytes]:
    return {line for line in (line.strip() for line in text.splitlines()) if len(line) >= 24}


def _share(lines: set[bytes], known: set[bytes]) -> float:
    return len(lines & known) / max(len(lines), 1)


@cache
def standard_library(held_out: bool) -> Array:
    """All files of one side, one after the other, <|endoftext|> behind each. int [tokens]"""
    return np.concatenate([part for text in files(held_out).values() for part in (encode(text), np.array([END]))])


def window(random: np.random.Generator, text: Array, length: int) -> Array:
    start = random.integers(0, len(text) - length + 1)
    return text[start : start + length]


def windows(random: np.random.Generator, count: int, length: int) -> Array:
    """Stretches of held-out library text, each of another file as long as there are any, int [count, length]."""
    texts = [encode(text) for text in files(True).values() if len(text) >= length]
    order = np.concatenate([random.permutation(len(texts)) for _ in range(-(-count // len(texts)))])
    return np.stack([window(random, texts[i], length) for i in order[:count]])


def digest(tokens: Array) -> str:
    return hashlib.sha256(tokens.astype("<u2").tobytes()).hexdigest()


# -- recall


@cache
def keys(held_out: bool) -> list[str]:
    every = [a + b + c for a in LETTERS for b in LETTERS for c in LETTERS]
    return [key for key in every if is_held_out(f"key {key}") == held_out]


def pairs(random: np.random.Generator, count: int, held_out: bool) -> tuple[list[str], list[str]]:
    """`count` different keys, and a value for each."""
    side = keys(held_out)
    chosen = [side[i] for i in random.choice(len(side), count, replace=False)]
    return chosen, ["".join(LETTERS[i] for i in row).upper() for row in random.integers(0, 26, (count, VALUE))]


def line(name: str, value: str) -> Array:
    return encode(f"{name}={value}\n")


def recall(random: np.random.Generator, length: int, filler: Array | None, distinct: int) -> tuple[Array, Array]:
    """Lines of "key=VALUE", most of them said before: (tokens int [length], learn bool [length]).

    A line is new, or repeats one of the `distinct` pairs, or (where `filler` is given) is a stretch of that text. What
    nobody can know, the letters of a new pair, is not to be learned. Now and then a question stands in the form of a chat.
    """
    names, values = pairs(random, distinct, held_out=False)
    said = 0
    tokens: list[Array] = []
    learn: list[Array] = []
    while sum(len(part) for part in tokens) < length:
        if filler is not None and random.random() < 0.3:
            stretch = window(random, filler, int(random.integers(8, 96)))
            tokens += [stretch, encode("\n")]
            learn += [np.arange(len(stretch)) > 3, np.zeros(1, bool)]  # where it starts is anyone's guess
            continue
        is_new = said < distinct and (said == 0 or random.random() < 0.4)
        pair = said if is_new else int(random.integers(0, said))
        said += is_new
        if not is_new and random.random() < 0.15:
            asked, answered = encode(names[pair]), encode(values[pair])
            parts = [np.array([USER]), asked, np.array([SEPARATOR, ASSISTANT]), answered, np.array([SEPARATOR])]
            known = [False] * (1 + KEY) + [True] * (3 + VALUE)
        else:
            parts = [line(names[pair], values[pair])]
            known = [False] * KEY + [True] + [not is_new] * VALUE + [True]
        tokens.append(np.concatenate(parts))
        learn.append(np.array(known))
    return np.concatenate(tokens)[:length], np.concatenate(learn)[:length]
