"""What the small checkpoint has learned, measured on what it was not trained on, and written into its model card.

    python -m reference.measure DIR --log LOG      writes DIR/measured.json and the card, DIR/README.md

Everything but `captured_mass` runs HF's own modules in float32.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import corpus, hf
from .equations import Array, Conventions
from .mtp import Mtp

CHOICES = ("learned", "recent", "random")  # what decides which keys a query attends to


def held_out(random: np.random.Generator, count: int, length: int) -> Array:
    """Stretches of held-out library text, int [count, length]."""
    text = corpus.library(held_out=True)
    return np.stack([corpus.window(random, text, length) for _ in range(count)])


# -- bits per byte


def bits_per_byte(model: Any, tokens: Array, first: int = 1) -> Array:
    """Mean over the tokens from `first` on of each text, [B]. A token is a byte (or <|endoftext|>)."""
    out = []
    for row in np.split(tokens, len(tokens)):
        logits = hf.forward(model, row)[0, first - 1 : -1].double()
        wanted = torch.as_tensor(row[0, first:])
        out.append(float(torch.nn.functional.cross_entropy(logits, wanted)) / np.log(2))
    return np.array(out)


def trigram_bits(tokens: Array, first: int = 1) -> Array:
    """As `bits_per_byte`, of a byte trigram model of the training text: Witten-Bell, each order backed by the one below."""
    text, size = corpus.library(held_out=False).astype(np.int64), len(corpus.SPECIAL) + 256
    orders = []
    for order in range(3):
        grams = sum(text[back : len(text) - order + back] * size ** (order - back) for back in range(order + 1))
        counts = np.bincount(grams, minlength=size ** (order + 1)).reshape(-1, size)
        orders.append((counts, counts.sum(1), (counts > 0).sum(1)))
    out = []
    for row in tokens.astype(np.int64):
        places = np.arange(max(first, 2), len(row))
        p = np.full(len(places), 1 / size)
        for order, (counts, total, kinds) in enumerate(orders):
            context = sum((row[places - back] * size ** (back - 1) for back in range(1, order + 1)), 0 * places)
            count, n, k = counts[context, row[places]], total[context], kinds[context]
            p = np.where(n > 0, (count + k * p) / np.maximum(n + k, 1), p)
        out.append(float(-np.log2(p).mean()))
    return np.array(out)


# -- needles


@contextmanager
def choosing(model: Any, choice: str, seed: int = 0):
    """The model with its indexers' choices as they are (`learned`), or replaced by the most recent keys or random ones."""
    if choice == "learned":
        yield
        return
    replaced = {}
    for layer in model.model.layers:
        indexer = layer.self_attn.indexer
        if indexer is not None:
            replaced[layer] = indexer
            layer.self_attn.indexer = _Chosen(choice, indexer.index_topk, seed)
    try:
        yield
    finally:
        for layer, indexer in replaced.items():
            layer.self_attn.indexer = indexer


class _Chosen(torch.nn.Module):
    """The `topk` most recent keys of each query, or as many random ones; always itself."""

    def __init__(self, choice: str, topk: int, seed: int) -> None:
        super().__init__()
        self.choice, self.topk, self.random = choice, topk, torch.Generator().manual_seed(seed)

    def forward(self, x: Any, q_latent: Any, rotation: Any, mask: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        queries, keys = mask.shape[-2:]
        age = (torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)[None]).float()
        order = -age if self.choice == "recent" else torch.rand(mask.shape, generator=self.random) + (age == 0)
        order = torch.where(age >= 0, order, -torch.inf).expand(mask.shape)
        return order.topk(min(self.topk, keys)).indices.int()


def needles(random: np.random.Generator, count: int, distance: int, distinct: int = 24) -> tuple[Array, Array]:
    """Prompts that end by asking for a value said `distance` tokens before: (tokens [count, S], values [count, VALUE]).

    Keys of the held-out side; between needle and question, other pairs, said again and again, and held-out library text.
    """
    text = corpus.library(held_out=True)
    prompts, values = [], []
    before = 64  # tokens of other lines in front of the needle
    for _ in range(count):
        names, said = corpus.pairs(random, distinct, held_out=True)
        lines = [corpus.encode(f"{name}={value}\n") for name, value in zip(names, said, strict=True)]

        def filled(length: int) -> Array:
            parts: list[Array] = []
            while sum(map(len, parts)) < length:
                if random.random() < 0.3:
                    stretch = corpus.window(random, text, int(random.integers(8, 96)))
                    parts += [stretch, corpus.encode("\n")]
                else:
                    parts.append(lines[random.integers(1, distinct)])
            # cut at the front, so that the last line is whole
            return np.concatenate(parts)[-length:]

        needle = lines[0]
        question = needle[: corpus.KEY + 1]
        # distance: from the first letter of the value to the token that asks for it
        between = filled(distance - corpus.VALUE - 1 - len(question) + 1)
        prompts.append(np.concatenate([filled(before), needle, between, question]))
        values.append(needle[corpus.KEY + 1 : -1])
    return np.stack(prompts), np.stack(values)


def recalled(model: Any, prompts: Array, values: Array) -> Array:
    """Whether greedy decoding gives the whole value, bool [count]."""
    rows = np.concatenate([prompts, values[:, :-1]], 1)  # greedy is right throughout iff it is right at each step
    out = []
    for row, value in zip(rows, values, strict=True):
        best = hf.forward(model, row[None])[0, -len(value) :].argmax(-1).numpy()
        out.append(bool((best == value).all()))
    return np.array(out)


# -- drafts


@torch.no_grad()
def accepted(folder: Path, tokens: Array, steps: int = 3) -> Array:
    """Greedy drafts that the main model would have said too: bool [texts, steps], True while all so far were right."""
    conventions = Conventions.of(json.loads((folder / "config.json").read_text()))
    model = hf.load(folder, conventions, with_mtp=True)
    plain = hf.load(folder, conventions)
    mtp = Mtp(model, folder, reuse=conventions.mtp_reuses_selection)
    out = []
    for row in np.split(tokens, len(tokens)):
        said = plain.generate(torch.as_tensor(row), max_new_tokens=steps + 1, min_new_tokens=steps + 1, do_sample=False)
        said = said[:, row.shape[1] :].numpy()
        with torch.no_grad():
            hidden = plain.model(torch.as_tensor(row), use_cache=False).last_hidden_state.numpy()
        fed = [np.concatenate([row[:, 1:], said[:, :1]], 1)]
        right: list[bool] = []
        for step in range(1, steps + 1):
            best = mtp.draft(hidden, fed, step)[-1][0][:, -1].argmax(-1)
            fed.append(best[:, None])
            right.append(bool(best[0] == said[0, step]) and all(right))
        out.append(right)
    return np.array(out)
