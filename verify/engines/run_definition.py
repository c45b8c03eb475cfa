"""This definition on a prompt: whole, or one of its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from glm_dsa import trace

from ..core import stages
from ..core.choices import scatter
from ..core.compare import same_sets
from .base import MX, Calls, Steps, chunks, let_go, renumbered, vocabulary
from .definition import to_numpy
from .definition_streamed import AnsweredExperts, Asked, OurLayers
from .recording import Hearing
from .spec import Side

Array = np.ndarray


class DefinitionEngine:
    """`seeded` faults have to be in force from the constructor on: the model is assembled in each run."""

    def __init__(self, side: Side) -> None:
        self.side, self.args, self.model = side, side.args, None

    @cached_property
    def layers(self) -> OurLayers:
        """For runs of single layers, each of which is run once."""
        return OurLayers(self.side.folder, MX[self.side.dtype], **self.side.overrides)

    def layer(
        self,
        index: int,
        x: mx.array,
        selection: mx.array | None,
        choices: Mapping[str, Array],
        embeddings: mx.array | None = None,
    ) -> Steps[mx.array]:
        """See `OurLayers.steps`."""
        return self.layers.steps(index, x, selection, choices, embeddings)

    def cached(self) -> Calls:
        model = self.assembled().model
        cache = model.make_cache(**{k: v for k, v in self.side.options.items() if k.startswith("kv_")})
        return lambda part: model(mx.array(part), cache)

    def whole(self, tokens: Array, at: Array, hearing: Hearing) -> None:
        layers = self.assembled()
        model, cache = layers.model, self._cache(layers)
        embedded = None if self.side.is_small else layers.embed(tokens)
        listener = Listener(hearing, self.args.n_routed_experts)
        with trace.listen(model, lambda stage, value: self._listened(layers, listener, stage, value)):
            hidden = model.model(mx.array(tokens), cache, embedded)
            if model.mtp is not None:
                self._mtp(layers, hidden, tokens)
            if self.side.is_small:
                model.logits(hidden[:, mx.array(at)])
                return
        parts: list[Array] = []
        for rows in vocabulary(self.args):
            logits = layers.head(hidden[:, mx.array(at)], rows)
            mx.eval(logits)
            parts.append(np.array(logits[0].astype(mx.float32)))
        hearing.note("logits", np.concatenate(parts, -1))

    def run_layer(self, index: int, tokens: Array, hearing: Hearing) -> None:
        """One layer on the reference's input and, where it is handed one, its selection."""
        layers, hearing = self.assembled(), renumbered(self.side, hearing)
        if index == self.args.num_hidden_layers:
            with trace.listen(layers.model, Listener(hearing, self.args.n_routed_experts)):
                hidden = hearing.other("norm")
                assert hidden is not None
                self._mtp(layers, mx.array(hidden).astype(MX[self.side.dtype])[None], tokens)
            return
        x = hearing.other("embed" if index == 0 else f"layers.{index - 1}.output")
        handed = hearing.other(f"layers.{index - 1}.self_attn.selection") if index else None
        assert x is not None
        listener, backbone = Listener(hearing, self.args.n_routed_experts), layers.model.model
        with trace.listen(layers.model, listener):
            rotation, mask = backbone.rotation_and_mask(len(x), None)
            selection = None if handed is None else mx.array(handed)[None]
            cache = (self._cache(layers) or [None] * (index + 1))[index]
            backbone.layers[index](mx.array(x).astype(MX[self.side.dtype])[None], rotation, mask, cache, selection)

    def _cache(self, layers: OurLayers) -> Any:
        """Only where it is to be packed."""
        bits, size = (self.side.options.get(key, default) for key, default in (("kv_bits", 0), ("kv_group_size", 64)))
        return layers.model.make_cache(kv_bits=bits, kv_group_size=size) if bits else None

    def assembled(self) -> OurLayers:
        """The definition on the side's checkpoint, lazy."""
        layers = OurLayers(self.side.folder, MX[self.side.dtype], **self.side.overrides)
        if self.side.is_small:
            layers.model.set_dtype(layers.dtype)  # scales too: an embedding is unpacked in their dtype
        else:
            self._experts_in_chunks(layers)
        return layers

    def _mtp(self, layers: OurLayers, hidden: mx.array, tokens: Array) -> None:
        """`first_draft`."""
        mtp = layers.model.mtp
        assert mtp is not None
        rotation, mask = layers.model.model.rotation_and_mask(tokens.shape[1], None)
        mtp.step(hidden, layers.mtp_embeddings(tokens), rotation, mask, None)

    def _listened(self, layers: OurLayers, listener: Listener, stage: str, value: Any) -> Any:
        value = listener(stage, value)
        index = stages.layer_of(stage)
        if self.side.is_small or index is None or index == self.args.num_hidden_layers:
            return value  # (the MTP layer is the last, and its norm comes behind its output)
        if stages.kind(stage) == "output":
            mx.eval(value)
            let_go(layers.model.model.layers[index])
        return value

    def _experts_in_chunks(self, layers: OurLayers) -> None:
        def answer_of(layer: int) -> Callable[[mx.array, mx.array], mx.array]:
            def answer(x: mx.array, experts: mx.array) -> mx.array:
                asked = Asked(layers, layer, x, np.array(experts))
                for first, count in chunks(self.args):
                    asked.read(first, count)
                return asked.answers

            return answer

        for index, layer in enumerate(layers.model.model.layers):
            if "switch_mlp" in layer.mlp:
                layer.mlp.switch_mlp = AnsweredExperts(answer_of(index))


class Listener:
    """Between the definition's taps [1, S, ..] and a hearing [S, ..]."""

    def __init__(self, hearing: Hearing, experts: int) -> None:
        self.hearing, self.experts = hearing, experts
        self.routed = np.zeros((0, 0), np.int64)
        self.is_own = np.zeros(0, bool)

    def __call__(self, stage: str, value: Any) -> Any:
        array = to_numpy(value)
        own = None if array is None else array[0]
        kind = stages.kind(stage)
        if kind == stages.ROUTING_WEIGHTS:
            assert own is not None
            return self._weights(stage, own, value)
        self.hearing.note(stage, own)
        due = self.hearing.due(stage)
        if kind == stages.ROUTING:
            assert own is not None
            self.routed = own if due is None else due
            self.is_own = np.ones(len(own), bool) if due is None else same_sets(own, due)
        if due is None:
            return value
        dtype = mx.uint32 if value is None else value.dtype
        return mx.array(np.ascontiguousarray(due))[None].astype(dtype)

    def _weights(self, stage: str, own: Array, value: mx.array) -> mx.array:
        self.hearing.note(stage, scatter(own, self.routed, self.experts))
        theirs = self.hearing.other(stage) if self.hearing.hands_weights else None
        if theirs is None or self.is_own.all():
            return value
        handed = np.take_along_axis(theirs, self.routed.astype(np.int64), -1)
        return mx.array(np.where(self.is_own[:, None], own, handed))[None].astype(value.dtype)
