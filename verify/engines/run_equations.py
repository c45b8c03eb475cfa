"""The equations on a prompt, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from reference.equations import Equations, add_expert, causal, rms_norm
from reference.layers import Layers

from ..core import stages
from ..core.choices import scatter
from .base import Answer, AtExperts, Steps, Weights, first_draft, vocabulary
from .recording import Hearing
from .spec import Side

Array = np.ndarray
Read = Callable[[str], Array]


class _Heard(Equations):
    """The equations, with somebody's values in the place of their own."""

    hearing: Hearing
    experts_count: int
    routed_to: Array

    def record(self, stage: str, value: Array) -> Array:
        return self._put(stage, value)

    def choose(self, stage: str, own: Array) -> Array:
        return self._put(stage, own)

    def _put(self, stage: str, value: Array) -> Array:
        noted, kind = value[0], stages.kind(stage)
        if kind == stages.ROUTING_WEIGHTS:
            noted = scatter(noted, self.routed_to, self.experts_count)
        self.hearing.note(stage, noted)
        due = None if kind == stages.ROUTING_WEIGHTS else self.hearing.due(stage)
        out = value if due is None else np.asarray(due, np.int64 if value.dtype.kind in "iu" else value.dtype)[None]
        if kind == stages.ROUTING:
            self.routed_to = out[0]
        return out


class _Stopping(Equations):
    """The equations of one layer, whose experts are somebody else's to hand over."""

    asked: Asked | None = None
    attended: tuple[Array, Array | None] | None = None

    def attention(self, *args: Any) -> tuple[Array, Array | None]:
        if self.attended is None:
            self.attended = super().attention(*args)
        return self.attended

    def routed(self, layer: int, x: Array, experts: Array, weights: Array) -> Array:
        if self.asked is None:
            self.asked = Asked(x, experts, weights, self.stages)
            raise AtExperts
        return self.asked.sum


class Asked:
    """x [B, S, hidden], experts and weights [B, S, k], and the sum of what was answered so far."""

    def __init__(self, x: Array, experts: Array, weights: Array, seen: Mapping[str, Array]) -> None:
        self.x, self.experts, self.weights, self.stages = x, experts, weights, seen
        self.sum = np.zeros_like(x)

    def take(self, first: int, weights: Weights) -> None:
        for expert in range(first, first + len(weights[1])):
            if (self.experts == expert).any():
                gate, up = weights[0][expert - first].chunk(2)
                parts = [w.double().numpy() for w in (gate, up, weights[1][expert - first])]
                add_expert(self.sum, self.x, self.experts, self.weights, expert, *parts)


class EquationsEngine:
    def __init__(self, side: Side, layers: Layers | None = None) -> None:
        """layers: of the same checkpoint, where somebody has them open."""
        self.side, self.args, self.model = side, side.args, None
        self.layers = layers or Layers(side.folder, side.conventions, **side.changes)

    def cached(self) -> None:
        return None

    def whole(self, tokens: Array, at: Array, hearing: Hearing) -> None:
        layers = self.layers
        own = _Heard(layers.config, self._read, self.side.conventions)
        own.hearing, own.experts_count = hearing, self.args.n_routed_experts
        allowed, positions = causal(tokens.shape, None), _positions(tokens.shape)
        x, selection = own.record("embed", layers.embed(torch.as_tensor(tokens)).double().numpy()), None
        for layer in range(self.args.num_hidden_layers):
            x, selection = own.layer(layer, x, positions, allowed, selection)
        hidden = own.record("norm", self.norm(x))
        if layers.has_mtp:
            index, (fed, zeroed) = self.args.num_hidden_layers, first_draft(tokens, self.args)
            embedded = layers.mtp_embed(torch.as_tensor(fed)).double().numpy()
            embedded[:, :zeroed] = 0
            joined = own.record(f"layers.{index}.eh_proj", self.eh_proj(embedded, hidden))
            out, _ = own.layer(index, joined, positions, allowed, None)
            own.record(f"layers.{index}.shared_head", self.shared_head(out))
        parts = [(hidden[0, at] @ layers.head(rows).double().numpy().T) for rows in vocabulary(self.args)]
        hearing.note("logits", np.concatenate(parts, -1))

    def layer(self, index: int, x: Array, selection: Array | None, choices: Mapping[str, Array]) -> Steps[Array]:
        """See `Layered.layer`."""
        own = _Stopping(self.layers.config, self._read, self.side.conventions, choices)
        given = x.astype(np.float64), _positions(x.shape[:2]), causal(x.shape[:2], None), selection
        with suppress(AtExperts):
            out, used = own.layer(index, *given)
        if own.asked is not None:
            yield own.asked
            out, used = own.layer(index, *given)
        return Answer(own.stages, out, used)

    def in_float32(
        self, index: int, x: Array, selection: Array | None, choices: Mapping[str, Array]
    ) -> Mapping[str, Array]:
        """Stages of a layer by the same code in float32: what float32 explains."""
        read = self.layers.read
        own = Equations(self.layers.config, lambda n: read(n, torch.float32).numpy(), self.side.conventions, choices)
        own.layer(index, x, _positions(x.shape[:2]), causal(x.shape[:2], None), selection)
        return own.stages

    # -- what joins the layers

    def norm(self, x: Array) -> Array:
        return rms_norm(x, self._read("model.norm.weight"), self.args.rms_norm_eps)

    def eh_proj(self, embedded: Array, hidden: Array) -> Array:
        """What goes into the MTP layer, of embeddings and the main model's hidden, both [B, S, hidden]."""
        parts = self._normed("enorm", embedded), self._normed("hnorm", hidden)
        return np.concatenate(parts, -1) @ self._of_mtp("eh_proj").T

    def shared_head(self, out: Array) -> Array:
        """What becomes of the MTP layer's output."""
        return self._normed("shared_head.norm", out)

    def _normed(self, name: str, x: Array) -> Array:
        return rms_norm(x, self._of_mtp(name), self.args.rms_norm_eps)

    def _of_mtp(self, name: str) -> Array:
        return self._read(f"model.layers.{self.args.num_hidden_layers}.{name}.weight")

    def _read(self, name: str) -> Array:
        return self.layers.read(name, torch.float32).double().numpy()


def _positions(shape: tuple[int, ...]) -> Array:
    return np.broadcast_to(np.arange(shape[1]), shape)
