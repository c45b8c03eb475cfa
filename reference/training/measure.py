"""What the small checkpoint has learned, measured on what it was not trained on, and written into its model card.

    python -m reference.measure DIR/checkpoint      DIR: as in reference.train. Adds measured.json and the card, README.md

Everything but the captured mass runs HF's own modules in float32.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from .. import corpus, hf, layout
from ..equations import Array, Conventions
from ..layout import interval
from ..mtp import Mtp
from ..stored import read_tensors
from . import train, trainee
from .card import MEASURED, TRAINING, card

CHOICES = ("learned", "recent", "random")  # what decides which keys a query attends to
FIRST = 2  # the first token that is asked for: a trigram model needs two before it

# -- bits per byte


def bits_per_byte(model: Any, tokens: Array) -> Array:
    """Of each text, [B]: mean over its tokens from the third on. A token is a byte."""
    out = []
    for row in tokens:
        logits = hf.forward(model, row[None])[0, FIRST - 1 : -1].double()
        out.append(float(torch.nn.functional.cross_entropy(logits, torch.as_tensor(row[FIRST:]))) / np.log(2))
    return np.array(out)


def trigram_bits(tokens: Array) -> Array:
    """As `bits_per_byte`, of a byte trigram model of the training text: Witten-Bell, each order backed by the one below."""
    text, size = corpus.standard_library(held_out=False).astype(np.int64), len(corpus.SPECIAL) + 256
    orders = []
    for order in range(3):
        grams = sum(text[back : len(text) - order + back] * size ** (order - back) for back in range(order + 1))
        counts = np.bincount(grams, minlength=size ** (order + 1)).reshape(-1, size)
        orders.append((counts, counts.sum(1), (counts > 0).sum(1)))
    out = []
    for row in tokens.astype(np.int64):
        places = np.arange(FIRST, len(row))
        p = np.full(len(places), 1 / size)
        for order, (counts, total, kinds) in enumerate(orders):
            context = sum((row[places - back] * size ** (back - 1) for back in range(1, order + 1)), 0 * places)
            count, n, k = counts[context, row[places]], total[context], kinds[context]
            p = np.where(n > 0, (count + k * p) / np.maximum(n + k, 1), p)
        out.append(float(-np.log2(p).mean()))
    return np.array(out)


# -- needles


def choosing(model: Any, choice: str, seed: int = 0) -> AbstractContextManager[None]:
    """The model with its indexers' choices as they are (`learned`), or replaced by the most recent keys or random ones."""
    attentions = {
        i: layer.self_attn for i, layer in enumerate(model.model.layers) if layer.self_attn.indexer is not None
    }
    if choice == "learned":
        attentions = {}
    return hf.standing_in({a: _Chosen(choice, a.indexer.index_topk, 1000 * seed + i) for i, a in attentions.items()})


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
    prompts, values = [], []
    before = 64  # tokens of other lines in front of the needle
    for _ in range(count):
        names, said = corpus.pairs(random, distinct, held_out=True)
        lines = [corpus.line(name, value) for name, value in zip(names, said, strict=True)]
        needle = lines[0]
        question = needle[: corpus.KEY + 1]
        # distance: from the first letter of the value to the token that asks for it
        between = between_lines(random, distance - corpus.VALUE - len(question), lines[1:])
        prompts.append(np.concatenate([between_lines(random, before, lines[1:]), needle, between, question]))
        values.append(needle[corpus.KEY + 1 : -1])
    return np.stack(prompts), np.stack(values)


def between_lines(random: np.random.Generator, length: int, lines: Sequence[Array]) -> Array:
    """What lies around a needle: `lines`, and stretches of held-out library text; cut in front, so that the last is whole."""
    text = corpus.standard_library(held_out=True)
    parts: list[Array] = []
    while sum(len(part) for part in parts) < length:
        if random.random() < 0.3:
            parts.append(np.append(corpus.window(random, text, int(random.integers(8, 96))), corpus.encode("\n")))
        else:
            parts.append(lines[int(random.integers(len(lines)))])
    return np.concatenate(parts)[-length:]


def recalled(model: Any, prompts: Array, values: Array) -> Array:
    """Whether greedy decoding gives the whole value, bool [count]."""
    rows = np.concatenate([prompts, values[:, :-1]], 1)  # greedy is right throughout iff it is right at each step
    out = []
    for row, value in zip(rows, values, strict=True):
        best = hf.forward(model, row[None])[0, -len(value) :].argmax(-1).numpy()
        out.append(bool((best == value).all()))
    return np.array(out)


# -- drafts


def greedy(model: Any, prompt: Array, count: int) -> Array:
    """What the model says after a prompt (int [S]), greedily, int [count]; special tokens like any other."""
    tokens = prompt
    for _ in range(count):
        tokens = np.append(tokens, int(hf.forward(model, tokens[None])[0, -1].argmax()))
    return tokens[len(prompt) :]


@torch.no_grad()
def drafted(model: Any, mtp: Mtp, prompt: Array, token: int, steps: int) -> Array:
    """What the MTP layer drafts after a prompt (int [S]) and the main model's next token, greedily, int [steps]."""
    hidden = model.model(torch.as_tensor(prompt)[None], use_cache=False).last_hidden_state.numpy()
    fed = [np.append(prompt[1:], token)[None]]
    for step in range(1, steps + 1):  # a chain of given tokens at a time: `Mtp.draft` chooses none itself
        best = mtp.draft(hidden, fed, step)[-1][0][:, -1].argmax(-1)
        fed.append(best[:, None])
    return np.concatenate(fed[1:], 1)[0]


def accepted(folder: Path, tokens: Array, steps: int = trainee.DRAFTS) -> Array:
    """Greedy drafts that the main model would have said too: bool [texts, steps], True while all so far were right."""
    conventions = Conventions.of(json.loads((folder / "config.json").read_text()))
    model = hf.load(folder, conventions)
    mtp = Mtp(hf.load(folder, conventions, with_mtp=True), folder, reuse=conventions.mtp_reuses_selection)
    out = []
    for row in tokens:
        said = greedy(model, row, steps + 1)
        out.append(np.logical_and.accumulate(drafted(model, mtp, row, said[0], steps) == said[1:]))
    return np.array(out)


# -- what the gate asks


def probes(count: int = 5, length: int = 2560) -> dict[str, Any]:
    """Held-out texts, `count` of library text and `count` of recall lines, and as many needles at 4 times index_topk: what the
    gate keeps, since another Python has another library.
    """
    random = np.random.default_rng(1126)

    def lines() -> Array:
        names, values = corpus.pairs(random, 24, held_out=True)
        said = [corpus.line(name, value) for name, value in zip(names, values, strict=True)]
        return between_lines(random, length, said)

    def as_text(draw: Callable[[], Array]) -> str:
        while True:
            tokens = draw()
            text = corpus.decode(tokens)
            if text.isascii() and np.array_equal(corpus.encode(text), tokens):
                return text

    def needle() -> Array:
        prompts, values = needles(random, 1, 4 * train.CONFIG["index_topk"])
        return np.append(prompts[0], values[0])

    asked = [as_text(needle) for _ in range(count)]
    return {
        "texts": [
            as_text(draw) for draw in (lambda: corpus.windows(random, 1, length)[0], lines) for _ in range(count)
        ],
        "needles": [{"prompt": text[: -corpus.VALUE], "value": text[-corpus.VALUE :]} for text in asked],
    }


# -- all of it, and the card


def sample(model: Any, prompt: str, count: int, seed: int = 0) -> str:
    """`prompt` and what follows, sampled at temperature 0.7."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        said = model.generate(
            torch.as_tensor(corpus.encode(prompt))[None], max_new_tokens=count, do_sample=True, temperature=0.7, top_k=0
        )
    return corpus.decode(said[0].numpy())


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of the checkpoint, but for what is said about it."""
    files = sorted(f for f in folder.iterdir() if f.suffix in (".safetensors", ".json", ".jinja"))
    about = (MEASURED, TRAINING)
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.name not in about}


def measure(folder: Path, texts: int, prompts: int) -> dict[str, Any]:
    """All figures of the card, from so many texts, and so many prompts of each kind."""
    config, training = (json.loads((folder / file).read_text()) for file in ("config.json", TRAINING))
    conventions, topk = Conventions.of(config), config["index_topk"]
    model = hf.load(folder, conventions)
    random = np.random.default_rng(2026)
    tensors = read_tensors(folder)
    out: dict[str, Any] = {"parameters": sum(tensors(name, torch.float32).numel() for name in tensors.names)}

    untrained = trainee.Trainee(config, conventions.indexer_rope, training["recipe"]["seed"]).model.eval()
    untrained.config.num_hidden_layers = config["num_hidden_layers"]
    text = corpus.windows(random, texts, 8 * topk)
    trained, trigram = bits_per_byte(model, text), trigram_bits(text)
    out["bits_per_byte"] = {
        "trained": interval(trained),
        "untrained twin": interval(bits_per_byte(untrained, text)),
        "byte trigram model": interval(trigram),
        "saved, against the trigram model": interval(trigram - trained),
    }

    out["recall"] = {}
    for times in (2, 4, 8):
        asked, values = needles(random, prompts, times * topk)
        out["recall"][times] = {}
        for choice in CHOICES:
            with choosing(model, choice):
                out["recall"][times][choice] = interval(recalled(model, asked, values))

    mass = layout.captured_mass(config, tensors, text, conventions)
    found = layout.evidence(mass)
    out["captured_mass"] = {
        "by_layout": dict(found.mass), "chance": found.chance, "ratio": found.ratio, "layout": found.layout,
        "by_layer": {rope: {i: float(m.mean()) for i, m in layers.items()} for rope, layers in mass.items()},
    }  # fmt: skip

    right = accepted(folder, corpus.windows(random, prompts, 4 * topk))
    out["accepted"] = {step + 1: interval(right[:, step]) for step in range(right.shape[1])}

    out["sample"] = sample(model, "def read(self, size=-1):\n", 400)
    out["sha256"] = digests(folder)
    return out


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m reference.measure", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "folder", metavar="DIR", type=Path, nargs="?", help="the folder `checkpoint` of reference.train"
    )
    parser.add_argument("--texts", metavar="N", type=_count, default=40, help="held-out texts, at least 4 (default 40)")
    parser.add_argument("--prompts", metavar="N", type=_count, default=100, help="needles, and drafts (default 100)")
    parser.add_argument("--probes", metavar="FILE", type=Path, help="instead: write the gate's texts and needles")
    chosen = parser.parse_args(argv)
    try:
        if chosen.probes:
            if chosen.folder is not None:
                parser.error("--probes FILE and DIR: expected one of them")
            chosen.probes.write_text(json.dumps(probes(), indent=1) + "\n")
            return
        if chosen.folder is None:
            parser.error("expected DIR, or --probes FILE")
        for file in ("config.json", TRAINING):
            if not (chosen.folder / file).is_file():
                raise ValueError(
                    f"{chosen.folder / file}: no such file; due is the folder `checkpoint` of reference.train"
                )
        _check(chosen.folder)
        measured = json.dumps(measure(chosen.folder, chosen.texts, chosen.prompts), indent=2, default=asdict) + "\n"
        text = card(chosen.folder, json.loads(measured))
        (chosen.folder / MEASURED).write_text(measured)
        (chosen.folder / "README.md").write_text(text)
    except (ValueError, OSError, SafetensorError) as error:
        parser.exit(1, f"{error}\n")
    print(chosen.folder / "README.md")


def _check(folder: Path) -> None:
    """Minutes of measuring should not end in a card that cannot be written. Raises ValueError."""
    try:
        training, config = (json.loads((folder / file).read_text()) for file in (TRAINING, "config.json"))
        recipe, steps = training["recipe"], {line["step"] for line in training["log"]}
        ends = np.cumsum([phase["steps"] for phase in recipe["phases"]])
        if config["index_topk"] != recipe["config"]["index_topk"] or not steps.issuperset(ends.tolist()):
            raise ValueError("the log does not reach the end of each phase, or config.json is another model's")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / TRAINING}: not what reference.train writes beside its checkpoint ({error!r})"
        ) from None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < layout.TEXTS:
        raise argparse.ArgumentTypeError(f"{text}: expected a number of at least {layout.TEXTS}")
    return int(text)


if __name__ == "__main__":
    main()
