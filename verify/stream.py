"""A release against HF and the equations, layer by layer, in one pass over its weights and in bounded memory.

A layer runs in three hands: HF's module on the release's own weights, unpacked; the equations in float64, on HF's input and
under HF's choices; ours on the release as it is stored, on two rows: HF's input (local error) and what ours itself made of
the layers before (drift). Each waits at its experts for the next; the innermost then reads these, a chunk at a time, for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import torch

from glm_dsa import checkpoint, trace, weights
from glm_dsa.checkpoint import Stored, quantize_as_stored
from glm_dsa.moe import Experts
from reference.capture import capture
from reference.equations import Conventions, Equations, add_expert, causal
from reference.layers import Layers

from . import stages
from .candidate import to_numpy

Array = np.ndarray
CHUNK = 1 << 28  # bytes of a chunk of experts, in float32, that HF is handed at once
MX = {"U32": mx.uint32, "U8": mx.uint8, "F8_E4M3": mx.uint8, "BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}


# -- pieces of what is stored


def piece(stored: Stored, rows: slice | None = None) -> mx.array:
    """A tensor, or rows of it, by offset: `mx.load` would read all of it, and keep it."""
    shape = stored.shape
    begin, count = 0, int(np.prod(shape, dtype=np.int64))
    if rows is not None:
        each = count // shape[0]
        begin, count, shape = rows.start * each, (rows.stop - rows.start) * each, (rows.stop - rows.start, *shape[1:])
    size = checkpoint.ITEM_BYTES[stored.dtype]
    with stored.file.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
        stream.seek(8 + header + stored.begin + begin * size)
        raw = np.frombuffer(stream.read(count * size), np.uint8)
    return mx.array(raw).view(MX[stored.dtype]).reshape(shape)


class OurLayers:
    """The definition on a release, a layer at a time, in float32."""

    def __init__(self, folder: Path, **overrides: Any) -> None:
        self.model, self.stored = checkpoint.assemble(folder, mx.float32, **overrides)  # lazy: nothing is read yet
        self.args = self.model.args

    def run(self, layer: int, x: mx.array, selection: mx.array | None, given: Mapping[str, Array], answer: Any) -> Seen:
        """x [rows, S, hidden], of which row 0 is handed `given` choices. `answer` stands in the place of its experts."""
        module = self.model.model.layers[layer]
        if "switch_mlp" in module.mlp:
            module.mlp.switch_mlp = answer
        rotation, mask = self.model.model.rotation_and_mask(x.shape[1], None)
        seen: dict[str, Any] = {}

        def listener(stage: str, value: Any) -> Any:
            seen[stage] = value
            if stage not in given or value is None:
                return value
            return mx.concatenate([mx.array(given[stage]).astype(value.dtype), value[1:]])

        with trace.listen(self.model, listener):
            out, chosen = module(x, rotation, mask, None, selection)
        mx.eval(out, *(v for v in seen.values() if v is not None))
        self.model.model.layers[layer] = nn.Module()  # type: ignore[call-overload]  # its weights are let go
        return Seen({s: to_numpy(v) for s, v in seen.items()}, out, chosen)

    def embed(self, tokens: Array) -> mx.array:
        wanted, at = np.unique(tokens, return_inverse=True)
        rows = [self._rows("model.embed_tokens", slice(int(t), int(t) + 1), self.args.hidden_size) for t in wanted]
        return mx.concatenate(rows)[mx.array(at.reshape(tokens.shape))]

    def _rows(self, path: str, rows: slice, width: int) -> mx.array:
        """Rows of a matrix, unpacked."""
        parts = {p: piece(self.stored[f"{path}.{p}"], rows) for p in weights.PACKED if f"{path}.{p}" in self.stored}
        if "scales" not in parts:
            return parts["weight"].astype(mx.float32)
        packing = weights.packing_of(path, {f"{path}.{p}": a for p, a in parts.items()}, width)
        floats = {p: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a for p, a in parts.items()}
        return mx.dequantize(floats["weight"], floats["scales"], floats.get("biases"), **packing)

    def norm(self, x: mx.array) -> mx.array:
        return self.model.model.norm(x)

    def head(self, x: mx.array, rows: slice) -> mx.array:
        """Logits of some tokens of the vocabulary, with the head's own kind of matmul: x [.., hidden] -> [.., rows]."""
        path = "model.embed_tokens" if self.args.tie_word_embeddings else "lm_head"
        linear: Any = nn.Linear(self.args.hidden_size, rows.stop - rows.start, bias=False)
        holder = nn.Module()
        holder.head = linear
        tensors = {
            f"head.{p}": piece(self.stored[f"{path}.{p}"], rows) for p in weights.PACKED if f"{path}.{p}" in self.stored
        }
        _load(holder, tensors)
        return holder.head(x)

    def experts(self, layer: int, first: int, count: int) -> Experts:
        """Experts `first`, ... of a layer, as the definition's own module."""
        prefix, part = f"model.layers.{layer}.mlp", replace(self.args, n_routed_experts=count)
        tensors: dict[str, mx.array] = {}
        for name, stored in self._of_experts(prefix):
            match stored:
                case Stored():
                    tensors[name] = piece(stored, slice(first, first + count))
        for expert in range(first, first + count):
            own = f"{prefix}.experts.{expert}."
            for projection in weights.PROJECTIONS:
                for suffix in (*weights.PACKED, "weight_scale_inv"):
                    if f"{own}{projection}.{suffix}" in self.stored:
                        tensors[f"{prefix}.experts.{expert - first}.{projection}.{suffix}"] = piece(
                            self.stored[f"{own}{projection}.{suffix}"]
                        )
        tensors = weights.to_modules(part, tensors)
        module = Experts(part)
        _load(module, {n.removeprefix(f"{prefix}.switch_mlp."): t for n, t in tensors.items()})
        return module

    def _of_experts(self, prefix: str) -> Iterator[tuple[str, Stored]]:
        for projection in weights.PROJECTIONS:
            for suffix in (*weights.PACKED, "global_scale"):
                name = f"{prefix}.switch_mlp.{projection}.{suffix}"
                if name in self.stored:
                    yield name, self.stored[name]


def _load(module: nn.Module, tensors: dict[str, mx.array]) -> None:
    quantize_as_stored(module, tensors)  # type: ignore[arg-type]
    floats = {
        n: t.astype(mx.float32) if f"{n.rpartition('.')[0]}.scales" not in tensors else t for n, t in tensors.items()
    }
    module.load_weights(list(floats.items()), strict=True)
    module.eval()


@dataclass
class Seen:
    stages: dict[str, Any]  # all rows
    out: mx.array
    selection: mx.array | None


class OurExperts(nn.Module):
    """In the place of a layer's experts: what `answer` says of x [rows, S, hidden], experts int [rows, S, k]."""

    def __init__(self, answer: Callable[[mx.array, mx.array], mx.array]) -> None:
        super().__init__()
        self._answer = answer

    def __call__(self, x: mx.array, experts: mx.array) -> mx.array:
        return self._answer(x, experts)


class _Waiting(Equations):
    """The equations, whose experts are somebody else's to run."""

    routed_by: Callable[[Array, Array, Array], Array]

    def routed(self, layer: int, x: Array, experts: Array, weights: Array) -> Array:
        return self.routed_by(x, experts, weights)


@dataclass
class Ran:
    """One layer in three hands. hf, truth: {stage: array} of one row; ours: of two, HF's input and its own."""

    hf: dict[str, Array]
    truth: dict[str, Array]
    ours: dict[str, Any]


class Pass:
    """The streams of a release, advanced a layer at a time."""

    def __init__(self, folder: Path, conventions: Conventions, overrides: Mapping[str, Any], tokens: Array) -> None:
        changes = {k: v for k, v in overrides.items() if k == "index_topk"}
        self.theirs, self.ours = Layers(folder, conventions, **changes), OurLayers(folder, **overrides)
        self.conventions, self.args, self.tokens = conventions, self.ours.args, tokens
        self.hf = self.theirs.embed(torch.as_tensor(tokens))
        own = self.ours.embed(tokens)
        self.own = mx.concatenate([own, own])  # [HF's input, its own]
        self.hf_selection: torch.Tensor | None = None
        self.own_selection: mx.array | None = None
        inner = self.args.moe_intermediate_size * self.args.hidden_size * 3 * 4
        self.chunk = max(1, min(self.args.n_routed_experts, CHUNK // inner))

    @property
    def is_sparse(self) -> bool:
        return 0 < self.args.index_topk < self.tokens.shape[1]

    def layer(self, index: int) -> Ran:
        run = _Layer(self, index)
        ran = run.all()
        own_out, own_selection = run.seen.out, run.seen.selection
        self.hf, self.hf_selection = run.out, run.selection
        given = mx.array(self.hf.numpy())
        self.own = mx.concatenate([given, own_out[1:]])
        self.own_selection = own_selection
        if own_selection is not None and run.selection is not None:
            handed = mx.array(run.selection.numpy()).astype(own_selection.dtype)
            self.own_selection = mx.concatenate([handed, own_selection[1:]])
        mx.eval(self.own)
        return ran


class _Layer:
    """A layer's three runs, each waiting at its experts for the next."""

    def __init__(self, on: Pass, index: int) -> None:
        self.on, self.index = on, index
        self.x, self.handed = on.hf, on.hf_selection
        self.asked: list[tuple[Any, Any, Any]] = []
        self.went_on = {"truth": False, "ours": False}

    def all(self) -> Ran:
        on = self.on
        with on.theirs.loaded(self.index, self._hf_experts) as model, capture(model) as self.hf:
            self.out, self.selection = on.theirs.run(self.index, self.x, self.handed)
            self._truth()
        return Ran(self.hf, self.truth, self.seen.stages)

    @property
    def given(self) -> dict[str, Array]:
        """HF's choices, as far as it has come; where every key is selected there is nothing to hand on."""
        chosen = {s: v for s, v in self.hf.items() if s.endswith(".topk")}
        return {s: v for s, v in chosen.items() if self.on.is_sparse or s.endswith(stages.ROUTING)}

    def _hf_experts(self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        self.hf_asked, self.hf_sum = (x, experts, weights), torch.zeros_like(x)
        self._truth()
        return self.hf_sum

    def _truth(self) -> None:
        """The equations on HF's input, under its choices; once."""
        if self.went_on["truth"]:
            return
        self.went_on["truth"] = True
        on, shape = self.on, self.on.tokens.shape
        read = on.theirs.read
        own = _Waiting(
            on.theirs.config, lambda name: read(name, torch.float32).double().numpy(), on.conventions,
            {s: v for s, v in self.hf.items() if s.endswith(".topk")},
        )  # fmt: skip
        own.routed_by = self._truth_experts
        positions = np.broadcast_to(np.arange(shape[1]), shape)
        handed = None if self.handed is None else self.handed.numpy()
        own.layer(self.index, self.x.double().numpy(), positions, causal(shape, None), handed)
        self._ours()
        self.truth = own.stages

    def _truth_experts(self, x: Array, experts: Array, weights: Array) -> Array:
        self.truth_asked, self.truth_sum = (x, experts, weights), np.zeros_like(x)
        self._ours()
        return self.truth_sum

    def _ours(self) -> None:
        if self.went_on["ours"]:
            return
        self.went_on["ours"] = True
        on = self.on
        self.seen = on.ours.run(self.index, on.own, on.own_selection, self.given, OurExperts(self._our_experts))

    def _our_experts(self, x: mx.array, experts: mx.array) -> mx.array:
        """Reads the experts that are asked for, once, for all three."""
        on = self.on
        flat, k = np.array(experts).reshape(-1), experts.shape[-1]
        rows, answers = x.reshape(-1, x.shape[-1]), np.zeros((flat.size, x.shape[-1]), np.float32)
        for first in range(0, on.args.n_routed_experts, on.chunk):
            count = min(on.chunk, on.args.n_routed_experts - first)
            self._their_chunk(first, count)
            slots = np.flatnonzero((flat >= first) & (flat < first + count))
            if slots.size:
                module = on.ours.experts(self.index, first, count)
                answer = module(rows[mx.array(slots // k)][None], mx.array(flat[slots] - first)[None, :, None])
                answers[slots] = np.array(answer[0, :, 0])
                del module, answer
        return mx.array(answers).reshape(*experts.shape, -1)

    def _their_chunk(self, first: int, count: int) -> None:
        on, read = self.on, self.on.theirs.read
        (x, experts, weights), (x64, experts64, weights64) = self.hf_asked, self.truth_asked
        inner, hidden = on.args.moe_intermediate_size, on.args.hidden_size
        gate_up, down = torch.empty(count, 2 * inner, hidden), torch.empty(count, hidden, inner)
        for i in range(count):
            path = f"model.layers.{self.index}.mlp.experts.{first + i}"
            gate_up[i, :inner] = read(f"{path}.gate_proj.weight", torch.float32)
            gate_up[i, inner:] = read(f"{path}.up_proj.weight", torch.float32)
            down[i] = read(f"{path}.down_proj.weight", torch.float32)
            gate, up, back = (w.double().numpy() for w in (gate_up[i, :inner], gate_up[i, inner:], down[i]))
            add_expert(self.truth_sum, x64, experts64, weights64, first + i, gate, up, back)
        self.hf_sum += on.theirs.chunk(first, gate_up, down)(x, experts, weights)
