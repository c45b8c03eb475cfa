"""Which RoPE layout an indexer was trained under, told from the weights alone.

An indexer learns to select what attention then looks at. Under the layout of its training its selection holds most of
the attention mass; under the other its position signal is scrambled, and mass is lost, silently: both layouts have the
same tensors. `captured_mass` measures it by the equations, on text, for the first layers of any checkpoint that `stored` reads:
their inputs need no other layer's weights, so a machine that cannot hold the model can still ask about the dense ones.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .equations import Array, Conventions, Equations, Weights, causal, rms_norm, select

LAYOUTS, CHANCE = ("interleaved", "half-split"), "chance"
# What a verdict takes at least: texts, layers, the better's mass over the other's, and its share of what chance leaves, over all
# layers and in each. The last two tell indexers that have learned: without, those that never did favour either layout, by luck
# of their weights, at ratios up to 2.6; and so do those whose rotary rows were shuffled, alike in queries and keys.
TEXTS, LAYERS, RATIO, LEARNED, LEARNED_EACH = 4, 2, 1.1, 1 / 2, 1 / 3


class _Watched(Equations):
    """The equations, with the attention of the last layer that ran kept, as a mean over heads [B, S, T]."""

    def attend(self, scores: Array) -> Array:
        """In place: nobody else holds them, and they are the largest arrays there are."""
        scores -= scores.max(-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(-1, keepdims=True)
        self.attention_seen = scores.mean(1)
        return scores


def captured_mass(
    config: Mapping[str, Any],
    weights: Weights,
    tokens: Array,
    conventions: Conventions | None = None,
    layers: int | None = None,
    topk: int | None = None,
    embed: Callable[[Array], Array] | None = None,
) -> dict[str, dict[int, Array]]:
    """{layout: {layer: mass [B]}}: the share of a layer's dense attention that falls on its indexer's choice. And, under
    "chance", what a choice of as many keys at random would catch.

    weights: names in HF layout -> arrays (as `stored` reads them); they are read once a layer, and of the last layer
    nothing behind its attention. tokens: int [B, T], different texts that the model can read. layers: how many, from the first on
    (default: all). topk: the size of the choice (default: index_topk, or an eighth of T where that is smaller; a choice of
    everything tells nothing). Averaged over heads, and over the queries that see more than twice `topk` keys. A shared layer
    is held to the selection that it is handed. All layers' inputs are those of dense attention, the same for both layouts.
    Memory: one layer's attention, and of one text some 3 x heads x T^2 numbers; then its feed-forward (of experts one at a time),
    and of all texts some 4 x tokens x intermediate_size numbers; in the dtype that `weights` gives. The embedding as a whole
    (7.6 GB of GLM-5.2 in float64), but where `embed` is given: tokens [B, T] -> [B, T, hidden].

    Raises ValueError for a model without an indexer, for texts or a number of layers that do not fit, and for a checkpoint
    that lacks a tensor, or holds one that is not finite.
    """
    if config.get("index_topk") is None:
        raise ValueError("no indexer (index_topk is missing): there is no layout to tell")
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not tokens.size or tokens.dtype.kind not in "iu":
        raise ValueError(f"tokens {tokens.dtype} {list(tokens.shape)}: expected whole numbers [texts, length]")
    if tokens.min() < 0 or tokens.max() >= config["vocab_size"]:
        raise ValueError(
            f"tokens from {tokens.min()} to {tokens.max()}: expected from 0 to below vocab_size = {config['vocab_size']}"
        )
    if len(np.unique(tokens, axis=0)) < len(tokens):
        raise ValueError("two texts are the same: each counts as a sample of its own")
    (batch, length), count = tokens.shape, config["num_hidden_layers"]
    topk = min(config["index_topk"], length // 8) if topk is None else topk
    layers = count if layers is None else layers
    if topk < 1 or 2 * topk >= length:
        raise ValueError(
            f"{length} tokens do not suffice to tell choices of {topk} apart: expected at least {2 * topk + 1}"
        )
    if type(layers) is not int or not 1 <= layers <= count:
        raise ValueError(f"layers = {layers}: the model has {count}")
    conventions = conventions or Conventions.of(config)
    positions, allowed = np.arange(length)[None], causal((1, length), None)
    everything = np.broadcast_to(np.arange(length), (1, length, length))
    watched = _Watched(config, weights, conventions)
    indexers = {
        rope: Equations(config, weights, dataclasses.replace(conventions, indexer_rope=rope)) for rope in LAYOUTS
    }
    hidden = weights("model.embed_tokens.weight")[tokens] if embed is None else embed(tokens)  # [B, T, hidden]
    chosen: dict[tuple[str, int], Array] = {}
    mass: dict[str, dict[int, Array]] = {rope: {i: np.zeros(batch) for i in range(layers)} for rope in LAYOUTS}
    by_chance = float((topk / np.arange(2 * topk + 1, length + 1)).mean())
    mass[CHANCE] = {i: np.full(batch, by_chance) for i in range(layers)}
    for layer in range(layers):
        own = _kept(weights)
        for equations in (watched, *indexers.values()):
            equations.weights = own
        norm = own(f"model.layers.{layer}.input_layernorm.weight")
        for text in range(batch):
            x = rms_norm(hidden[text : text + 1], norm, config["rms_norm_eps"])
            attended, _ = watched.attention(layer, x, positions, allowed, None, everything)
            q_latent = watched.stages[f"layers.{layer}.self_attn.q_latent"]
            for rope, equations in indexers.items():
                if watched.full[layer]:
                    scores = equations.scores(layer, x, q_latent, positions, allowed)
                    if np.isnan(scores).any():
                        raise ValueError(
                            f"layer {layer}: its indexer's scores are not finite; the checkpoint is damaged"
                        )
                    chosen[rope, text] = select(scores[:, 2 * topk :], topk)
                seen = np.take_along_axis(watched.attention_seen[:, 2 * topk :], chosen[rope, text], -1)
                mass[rope][layer][text] = seen.sum(-1).mean()
            hidden[text] += attended[0]
            for equations in (watched, *indexers.values()):
                equations.stages.clear()
        if layer < layers - 1:
            watched.weights = weights  # each is needed once, for all texts together
            del own
            for equations in indexers.values():
                equations.weights = weights
            hidden = watched.feed(layer, hidden)
            watched.stages.clear()
    return mass


def _kept(weights: Weights) -> Weights:
    """Reads each tensor once."""
    read: dict[str, Array] = {}

    def get(name: str) -> Array:
        if name not in read:
            read[name] = weights(name)
        return read[name]

    return get


# -- from samples to a verdict


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interval(samples: Sequence[float] | Array, draws: int = 2000) -> Interval:
    """Of independent samples (texts): by bootstrap. Of yes and no: Wilson's."""
    samples = np.asarray(samples)
    mean, count = float(samples.mean()), len(samples)
    if samples.dtype == bool:
        z2 = 1.96**2 / count
        middle, half = mean + z2 / 2, math.sqrt(z2 * (mean * (1 - mean) + z2 / 4))
        return Interval(mean, max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2)))
    drawn = np.random.default_rng(0).integers(0, count, (draws, count))
    low, high = np.quantile(samples[drawn].mean(1), [0.025, 0.975])
    return Interval(mean, float(low), float(high))


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What attention says about the layout: the mass that each captures, mean over layers, and its interval over texts.

    by_layer: {layer: {layout, or "chance": mass, mean over texts}}.
    """

    mass: Mapping[str, Interval]
    texts: int
    chance: float
    by_layer: Mapping[int, Mapping[str, float]]

    @property
    def layout(self) -> str | None:
        """The layout of the training; None where this does not suffice to tell."""
        return None if self.doubt else self._ranked[0]

    @property
    def doubt(self) -> str:
        """Why this tells of no layout, in a line; empty where it does."""
        better, worse = self._ranked
        if self.texts < TEXTS:
            return f"got {self.texts} texts, expected {TEXTS} or more"
        if len(self.by_layer) < LAYERS:
            return "one layer alone may favour either layout by luck of its weights"
        if self.mass[better].low - self.chance < LEARNED * (1 - self.chance):
            return (
                f"the indexers catch {self.mass[better].mean:.3f}, random keys {self.chance:.3f}: less than half of what is left; "
                "they never learned, or were shuffled, or the text is no text to them"
            )
        if (weak := self.unlearned) is not None:
            seen, chance = self.by_layer[weak][better], self.by_layer[weak][CHANCE]
            return (
                f"layer {weak}'s indexer catches {seen:.3f}, random keys {chance:.3f}: less than a third of what is left; it "
                "never learned, or was shuffled, or the text is no text to it"
            )
        if self.mass[better].low <= self.mass[worse].high or self.ratio < RATIO:
            return "what the layouts catch is too near to each other"
        if any(mass[worse] >= mass[better] for mass in self.by_layer.values()):
            return "the layers favour different layouts"
        return ""

    @property
    def has_learned(self) -> bool:
        """Whether the indexers catch far more than chance, under the better layout: all together, and each."""
        better = self.mass[self._ranked[0]].low
        return better - self.chance >= LEARNED * (1 - self.chance) and self.unlearned is None

    @property
    def unlearned(self) -> int | None:
        """The first layer whose indexer catches little more than chance, under the better layout."""
        better = self._ranked[0]
        weak = (
            i for i, mass in self.by_layer.items() if mass[better] - mass[CHANCE] < LEARNED_EACH * (1 - mass[CHANCE])
        )
        return next(weak, None)

    @property
    def ratio(self) -> float:
        """The better's mass over the other's."""
        better, worse = self._ranked
        return self.mass[better].mean / self.mass[worse].mean

    @property
    def _ranked(self) -> list[str]:
        return sorted(LAYOUTS, key=lambda layout: -self.mass[layout].mean)


def evidence(mass: Mapping[str, Mapping[int, Array]]) -> Evidence:
    """Of all layers together, from `captured_mass`."""
    by_text = {rope: np.mean(list(layers.values()), 0) for rope, layers in mass.items()}
    masses = {rope: interval(by_text[rope]) for rope in LAYOUTS}
    by_layer = {i: {rope: float(mass[rope][i].mean()) for rope in (*LAYOUTS, CHANCE)} for i in mass[LAYOUTS[0]]}
    return Evidence(masses, len(by_text[LAYOUTS[0]]), float(by_text[CHANCE].mean()), by_layer)
