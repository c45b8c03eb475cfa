"""Which RoPE layout an indexer was trained under, told from the weights alone.

An indexer learns to select what attention then looks at. Under the layout of its training its selection holds most of
the attention mass; under the other its position signal is scrambled, and mass is lost, silently: both layouts have the
same tensors. `captured_mass` measures it by the equations, on text, for the first layers of any checkpoint in HF layout:
their inputs need no other layer's weights, so a machine that cannot hold the model can still ask.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .equations import Array, Conventions, Equations, Weights, causal, select, softmax

LAYOUTS = ("interleaved", "half-split")


class _Watched(Equations):
    """The equations with dense attention, and each layer's attention kept."""

    def attend(self, stage: str, scores: Array) -> Array:
        self.attended = softmax(scores)
        return self.attended


def captured_mass(
    config: Mapping[str, Any],
    weights: Weights,
    tokens: Array,
    conventions: Conventions | None = None,
    layers: int | None = None,
    topk: int | None = None,
) -> dict[str, dict[int, Array]]:
    """{layout: {layer: mass [B]}}: the share of a layer's dense attention that falls on its indexer's choice.

    tokens: int [B, T], text that the model can read. layers: how many, from the first on (default: all). topk: the size of
    the choice (default: index_topk, or an eighth of T where that is smaller; a choice of everything tells nothing).
    Averaged over heads, and over the queries that have at least twice `topk` keys to choose from. A shared layer is held
    to the selection that it is handed. All layers' inputs are those of dense attention, the same for both layouts.
    Raises ValueError for a model without an indexer, or a text shorter than 2 topk + 1.
    """
    if "index_topk" not in config:
        raise ValueError("no indexer (index_topk is missing): there is no layout to tell")
    length = tokens.shape[1]
    topk = topk or min(config["index_topk"], length // 8)
    if not 1 <= topk < length // 2:
        raise ValueError(f"{length} tokens cannot be told apart by choices of {topk}: give more than {2 * topk}")
    layers = config["num_hidden_layers"] if layers is None else layers
    conventions = conventions or Conventions.of(config)
    texts = [_of_one(config, weights, row[None], conventions, layers, topk) for row in tokens]
    return {
        layout: {i: np.array([text[layout][i] for text in texts]) for i in range(layers)} for layout in LAYOUTS
    }  # fmt: skip


def _of_one(
    config: Mapping[str, Any], weights: Weights, tokens: Array, conventions: Conventions, layers: int, topk: int
) -> dict[str, list[float]]:
    """{layout: mass of each layer} of one text, int [1, T]."""
    length = tokens.shape[1]
    everything = np.arange(length)[None, None].repeat(length, 1)
    positions, allowed = np.arange(length)[None], causal(tokens.shape, None)
    watched = _Watched(config, weights, conventions)
    asked = {rope: Equations(config, weights, dataclasses.replace(conventions, indexer_rope=rope)) for rope in LAYOUTS}
    x = weights("model.embed_tokens.weight")[tokens]
    chosen: dict[str, Array] = {}
    mass: dict[str, list[float]] = {rope: [] for rope in LAYOUTS}
    for layer in range(layers):
        x, _ = watched.layer(layer, x, positions, allowed, None, everything)
        attention = watched.attended.mean(1)[:, 2 * topk :]  # [1, S, T] of queries with enough to choose from
        normed, q_latent = (
            watched.stages[f"layers.{layer}.{stage}"] for stage in ("input_layernorm", "self_attn.q_latent")
        )
        for rope, equations in asked.items():
            if watched.full[layer]:
                equations.selection(layer, normed, q_latent, positions, allowed)
                scores = equations.stages[f"layers.{layer}.self_attn.indexer.scores"]
                chosen[rope] = select(scores[:, 2 * topk :], topk)
            mass[rope].append(float(np.take_along_axis(attention, chosen[rope], -1).sum(-1).mean()))
    return mass


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval, by bootstrap over the samples (texts, prompts)."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interval(samples: Sequence[float] | Array, draws: int = 2000) -> Interval:
    samples = np.asarray(samples, np.float64)
    drawn = np.random.default_rng(0).integers(0, len(samples), (draws, len(samples)))
    low, high = np.quantile(samples[drawn].mean(1), [0.025, 0.975])
    return Interval(float(samples.mean()), float(low), float(high))


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What the attention says about the layout: the mass that each captures, over layers, per text."""

    mass: Mapping[str, Interval]

    @property
    def layout(self) -> str | None:
        """The layout of the training; None where the intervals touch."""
        better, worse = sorted(LAYOUTS, key=lambda layout: -self.mass[layout].mean)
        return better if self.mass[better].low > self.mass[worse].high else None

    @property
    def ratio(self) -> float:
        """The better's mass over the other's."""
        means = sorted(self.mass[layout].mean for layout in LAYOUTS)
        return means[1] / means[0]


def evidence(mass: Mapping[str, Mapping[int, Array]]) -> Evidence:
    """Of all layers together, from `captured_mass`."""
    return Evidence({layout: interval(np.mean(list(by_layer.values()), 0)) for layout, by_layer in mass.items()})
