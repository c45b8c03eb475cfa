"""A release as our definition runs it, a piece at a time: a layer, some experts, rows of the embedding or the head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from glm_dsa import checkpoint, trace, weights
from glm_dsa.checkpoint import quantize_as_stored
from glm_dsa.moe import Experts
from glm_dsa.storage import Stored, read_piece

from .base import Answer, AtExperts, Steps, Weights, first_draft
from .definition import to_numpy
from .taps import exchanged

Array = np.ndarray
# of a layer, what comes before its experts and costs: it is called once, though the layer is called again behind them
COSTLY = ("eh_proj", "self_attn.indexer", "self_attn", "mlp.gate")


class OurLayers:
    """The definition on a release, a layer at a time, in `dtype`."""

    def __init__(self, folder: Path, dtype: mx.Dtype = mx.float32, **overrides: Any) -> None:
        self.model, self.stored = checkpoint.assemble(folder, dtype, **overrides)  # lazy: nothing is read yet
        self.args, self.dtype = self.model.args, dtype

    def steps(
        self,
        layer: int,
        x: mx.array,
        selection: mx.array | None,
        choices: Mapping[str, Array],
        embeddings: mx.array | None = None,
    ) -> Steps[mx.array]:
        """As `Layered.layer` says; once, then its weights are let go. x [rows, S, hidden], of which row 0 is handed `choices`.
        embeddings: of the MTP layer, which joins them to x."""
        module: Any = self.model.model.layers[layer]
        rotation, mask = self.model.model.rotation_and_mask(x.shape[1], None)
        asked: Asked | None = None
        seen: dict[str, Any] = {}
        given: dict[str, Any] = {}

        def answer(x: mx.array, experts: mx.array) -> mx.array:
            nonlocal asked
            if asked is None:
                asked = Asked(self, layer, x, np.array(experts))
                raise AtExperts
            return asked.answers

        def once(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if name not in given:
                given[name] = call(*args, **kwargs)
            return given[name]

        def listener(stage: str, value: Any) -> Any:
            seen.setdefault(stage, value)  # what is computed once more is lazy: nobody asks for it
            if stage not in choices or value is None:
                return value
            return mx.concatenate([mx.array(choices[stage]).astype(value.dtype), value[1:]])

        def called() -> tuple[mx.array, mx.array | None]:
            with trace.listen(self.model, listener), exchanged(costly, once):
                if embeddings is not None:
                    return module.step(x, embeddings, rotation, mask, None)
                return module(x, rotation, mask, None, selection)

        if "switch_mlp" in module.mlp:
            module.mlp.switch_mlp = AnsweredExperts(answer)
        parts = dict(module.named_modules())
        costly = {name: parts[name] for name in COSTLY if name in parts}
        with suppress(AtExperts):
            out, chosen = called()
        if asked is not None:
            asked.stages = seen
            yield asked
            out, chosen = called()
        mx.eval(out, *(v for v in seen.values() if v is not None))
        self.model.model.layers[layer] = nn.Module()  # type: ignore[call-overload]
        return Answer({s: to_numpy(v) for s, v in seen.items()}, out, chosen)

    def mtp_embeddings(self, tokens: Array) -> mx.array:
        """Of `first_draft`, int [1, S] -> [1, S, hidden]."""
        fed, zeroed = first_draft(tokens, self.args)
        embeddings = self.mtp_embed(fed)
        embeddings[:, :zeroed] = 0
        return embeddings

    def mtp_embed(self, tokens: Array) -> mx.array:
        own = f"model.layers.{self.args.num_hidden_layers}.embed_tokens"
        return self.embed(tokens, own if f"{own}.weight" in self.stored else "model.embed_tokens")

    def embed(self, tokens: Array, path: str = "model.embed_tokens") -> mx.array:
        wanted, at = np.unique(tokens, return_inverse=True)
        rows = [self._rows(path, slice(int(t), int(t) + 1), self.args.hidden_size) for t in wanted]
        return mx.concatenate(rows)[mx.array(at.reshape(tokens.shape))]

    def _rows(self, path: str, rows: slice, width: int) -> mx.array:
        """Rows of a matrix, unpacked."""
        parts = {
            p: read_piece(self.stored[f"{path}.{p}"], rows) for p in weights.PACKED if f"{path}.{p}" in self.stored
        }
        if "scales" not in parts:
            return parts["weight"].astype(self.dtype)
        packing = weights.packing_of(path, {f"{path}.{p}": a for p, a in parts.items()}, width)
        floats = {p: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a for p, a in parts.items()}
        unpacked = mx.dequantize(floats["weight"], floats["scales"], floats.get("biases"), **packing)
        return unpacked.astype(self.dtype)

    def norm(self, x: mx.array) -> mx.array:
        return self.model.model.norm(x)

    def head(self, x: mx.array, rows: slice) -> mx.array:
        """Logits of some tokens of the vocabulary, with the head's own kind of matmul: x [.., hidden] -> [.., rows]."""
        return self.head_of(rows)(x)

    def head_of(self, rows: slice) -> Callable[[mx.array], mx.array]:
        path = "model.embed_tokens" if self.args.tie_word_embeddings else "lm_head"
        linear: Any = nn.Linear(self.args.hidden_size, rows.stop - rows.start, bias=False)
        holder = nn.Module()
        holder.head = linear
        tensors = {
            f"head.{p}": read_piece(self.stored[f"{path}.{p}"], rows)
            for p in weights.PACKED
            if f"{path}.{p}" in self.stored
        }
        _load(holder, tensors, self.dtype)
        return holder.head

    def experts(self, layer: int, first: int, count: int) -> Experts:
        """Experts `first`, ... of a layer, as the definition's own module."""
        prefix, part = f"model.layers.{layer}.mlp", replace(self.args, n_routed_experts=count)
        tensors: dict[str, mx.array] = {}
        for name, stored in self._of_experts(prefix):
            tensors[name] = read_piece(stored, slice(first, first + count))
        for expert in range(first, first + count):
            own = f"{prefix}.experts.{expert}."
            for projection in weights.PROJECTIONS:
                for suffix in (*weights.PACKED, "weight_scale_inv"):
                    if f"{own}{projection}.{suffix}" in self.stored:
                        tensors[f"{prefix}.experts.{expert - first}.{projection}.{suffix}"] = read_piece(
                            self.stored[f"{own}{projection}.{suffix}"]
                        )
        tensors = weights.to_modules(part, tensors)
        module = Experts(part)
        _load(module, {n.removeprefix(f"{prefix}.switch_mlp."): t for n, t in tensors.items()}, self.dtype)
        return module

    def _of_experts(self, prefix: str) -> Iterator[tuple[str, Stored]]:
        for projection in weights.PROJECTIONS:
            for suffix in (*weights.PACKED, "global_scale"):
                name = f"{prefix}.switch_mlp.{projection}.{suffix}"
                if name in self.stored:
                    yield name, self.stored[name]


def _load(module: nn.Module, tensors: dict[str, mx.array], dtype: mx.Dtype) -> None:
    quantize_as_stored(module, tensors)  # type: ignore[arg-type]
    floats = {n: t.astype(dtype) if f"{n.rpartition('.')[0]}.scales" not in tensors else t for n, t in tensors.items()}
    module.load_weights(list(floats.items()), strict=True)
    module.eval()


class Asked:
    """What the definition's experts are asked, and what they answered so far. x [.., S, hidden], experts int [.., S, k]."""

    def __init__(self, layers: OurLayers, layer: int, x: mx.array, experts: Array) -> None:
        self.layers, self.layer, self.x, self.experts = layers, layer, x, experts
        self.stages: Mapping[str, Any] = {}
        self._answers = np.zeros((experts.size, x.shape[-1]), np.float32)

    def take(self, first: int, weights: Weights) -> None:
        """Reads them again, as they are stored."""
        self.read(first, len(weights[1]))

    def read(self, first: int, count: int) -> None:
        chosen = self.experts.reshape(-1)
        slots = np.flatnonzero((chosen >= first) & (chosen < first + count))
        if slots.size:
            rows = self.x.reshape(-1, self.x.shape[-1])[mx.array(slots // self.experts.shape[-1])]
            experts = self.layers.experts(self.layer, first, count)
            answers = experts(rows[None], mx.array(chosen[slots] - first)[None, :, None])
            self._answers[slots] = to_numpy(answers[0, :, 0])

    @property
    def answers(self) -> mx.array:
        """[.., S, k, hidden]"""
        return mx.array(self._answers.reshape(*self.experts.shape, -1)).astype(self.x.dtype)


class AnsweredExperts(nn.Module):
    """In the place of a layer's experts: what `answer` says of x [rows, S, hidden], experts int [rows, S, k]."""

    def __init__(self, answer: Callable[[mx.array, mx.array], mx.array]) -> None:
        super().__init__()
        self._answer = answer

    def __call__(self, x: mx.array, experts: mx.array) -> mx.array:
        return self._answer(x, experts)
