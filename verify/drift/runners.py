"""The ways of running a side on a prompt: this definition, HF's modules, the equations, somebody's code.

Each run is of the whole model, from tokens to logits, in bounded memory: a large checkpoint is read a layer at a time, its
experts in chunks, and let go again. `Hearing` notes each stage and says what is to stand in its place.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
import torch

from glm_dsa import trace
from reference.capture import capture
from reference.equations import Equations, causal, rms_norm
from reference.layers import Layers
from reference.modules import choosing
from reference.mtp import Around

from .. import stages
from ..candidate import to_numpy
from ..judge import scatter
from ..pieces import OurExperts, OurLayers
from .recording import Hearing
from .sides import EQUATIONS, HF, OURS, Side

Array = np.ndarray
CHUNK = 1 << 28  # bytes of experts, in float32, that are unpacked at once
HEAD_ROWS = 8192  # tokens of the vocabulary whose logits are computed at once
TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MX = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
INDEXER = "self_attn.indexer"


class Runner(ABC):
    """`at`: the positions whose logits are asked for."""

    def __init__(self, side: Side) -> None:
        self.side, self.args = side, side.args

    def run(self, tokens: Array, at: Array, hearing: Hearing) -> None:
        """tokens int [1, S]. Raises what the side's code raises."""
        with self.side.within(self.model), torch.no_grad():
            self._run(tokens, at, hearing)

    @property
    def model(self) -> Any:
        """What is there before the run: HF's, without its weights."""
        return None

    @abstractmethod
    def _run(self, tokens: Array, at: Array, hearing: Hearing) -> None: ...

    @property
    def chunk(self) -> int:
        inner = self.args.moe_intermediate_size * self.args.hidden_size * 3 * 4
        return max(1, min(self.args.n_routed_experts, CHUNK // inner))

    def chunks(self) -> Iterator[tuple[int, int]]:
        """(first, how many) of the experts that are read at once."""
        every = self.args.n_routed_experts
        return ((first, min(self.chunk, every - first)) for first in range(0, every, self.chunk))

    def vocabulary(self) -> Iterator[slice]:
        every = self.args.vocab_size
        return (slice(start, min(start + HEAD_ROWS, every)) for start in range(0, every, HEAD_ROWS))


def runner_of(side: Side) -> Runner:
    from .their_runner import TheirRunner

    kinds: dict[str, Callable[[Side], Runner]] = {OURS: OurRunner, HF: HfRunner, EQUATIONS: EquationsRunner}
    return kinds.get(side.implementation, TheirRunner)(side)


# -- this definition


class OurRunner(Runner):
    """`seeded` faults have to be in force from the constructor on: the model is assembled in each run."""

    def _run(self, tokens: Array, at: Array, hearing: Hearing) -> None:
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
        for rows in self.vocabulary():
            logits = layers.head(hidden[:, mx.array(at)], rows)
            mx.eval(logits)
            parts.append(np.array(logits[0].astype(mx.float32)))
        hearing.note("logits", np.concatenate(parts, -1))

    def run_layer(self, index: int, tokens: Array, hearing: Hearing) -> None:
        """One layer on the reference's input and, where it is handed one, its selection."""
        layers = self.assembled()
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
        """The first draft step over the whole prompt: each position is fed the next token, the last one the first."""
        model, following = layers.model, np.roll(tokens, -1, axis=1)
        rotation, mask = model.model.rotation_and_mask(tokens.shape[1], None)
        embeddings = layers.mtp_embed(following)
        if self.args.mtp_zero_first_embedding:
            embeddings = mx.where((mx.arange(tokens.shape[1]) == 0)[:, None], 0, embeddings)
        mtp = model.mtp
        assert mtp is not None
        mtp.step(hidden, embeddings, rotation, mask, None)

    def _listened(self, layers: OurLayers, listener: Listener, stage: str, value: Any) -> Any:
        value = listener(stage, value)
        if not self.side.is_small and stages.kind(stage) == "output":
            mx.eval(value)
            index = stages.layer_of(stage)
            assert index is not None
            let_go(layers.model.model.layers[index])
        return value

    def _experts_in_chunks(self, layers: OurLayers) -> None:
        def answer_of(layer: int) -> Any:
            def answer(x: mx.array, experts: mx.array) -> mx.array:
                chosen = np.array(experts)
                out = np.zeros((chosen.size, x.shape[-1]), np.float32)
                for first, count in self.chunks():
                    slots, answers = layers.answers(layer, first, count, x, chosen)
                    out[slots] = np.array(answers.astype(mx.float32))
                return mx.array(out.reshape(*chosen.shape, -1)).astype(x.dtype)

            return answer

        for index, layer in enumerate(layers.model.model.layers):
            if "switch_mlp" in layer.mlp:
                layer.mlp.switch_mlp = OurExperts(answer_of(index))


def let_go(layer: Any) -> None:
    """Of a layer that has answered, its weights."""
    for module in layer.modules():
        for name in [n for n, part in module.items() if isinstance(part, mx.array)]:
            module[name] = mx.zeros((0,))


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


def same_sets(ours: Array, ref: Array) -> Array:
    """bool [S]: where choices [S, K] are the same."""
    if ours.shape != ref.shape:
        return np.zeros(len(ref), bool)
    return (np.sort(ours, -1) == np.sort(ref, -1)).all(-1)


# -- HF


class _Embedding(torch.nn.Module):
    """In the place of HF's: that very module, with the rows that are asked for."""

    def __init__(self, layers: Layers, own: torch.nn.Module) -> None:
        super().__init__()
        self.layers, self.own = layers, [own]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        wanted, at = tokens.unique(return_inverse=True)
        module: Any = copy.deepcopy(self.own[0])
        module.padding_idx = None
        module.weight = torch.nn.Parameter(self.layers.embed(wanted).to(self.layers.dtype), requires_grad=False)
        return module(at)


class _Streamed(torch.nn.Module):
    """In the place of one of HF's layers: it is read as it is called."""

    def __init__(self, call: Any) -> None:
        super().__init__()
        self.call = call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


class HfRunner(Runner):
    """HF's backbone runs as it is; what it holds is read a layer at a time."""

    def __init__(self, side: Side) -> None:
        super().__init__(side)
        self.layers = Layers(side.folder, side.conventions, TORCH[side.dtype], **side.changes)

    @property
    def model(self) -> Any:
        return self.layers.model

    def _run(self, tokens: Array, at: Array, hearing: Hearing) -> None:
        ids, backbone = torch.as_tensor(tokens), self.layers.model.model
        own = backbone.embed_tokens, backbone.layers, backbone.norm
        calls = [_Streamed(self._layer(i, hearing)) for i in range(self.args.num_hidden_layers)]
        backbone.embed_tokens, backbone.layers = _Embedding(self.layers, own[0]), torch.nn.ModuleList(calls)
        backbone.norm = _Streamed(lambda x: self.layers.norm(x, own[2]))
        # what HF's backbone makes of its embedding (nothing, if it is sound) is what the first layer is given
        first = calls[0].register_forward_pre_hook(self._embedded(hearing), with_kwargs=True)
        last = backbone.register_forward_hook(lambda m, a, out: self._finished(out, hearing))
        try:
            hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state
        finally:
            first.remove()
            last.remove()
            backbone.embed_tokens, backbone.layers, backbone.norm = own
        if self.layers.has_mtp:
            self._mtp(ids, hidden, hearing)
        parts = [(hidden[0, at].float() @ self.layers.head(rows).T).numpy() for rows in self.vocabulary()]
        hearing.note("logits", np.concatenate(parts, -1))

    def _embedded(self, hearing: Hearing) -> Any:
        def given(module: Any, args: Any, kwargs: Any) -> Any:
            hearing.note("embed", args[0][0].float().numpy())
            due = hearing.due("embed")
            return (args if due is None else (_like(due, args[0]), *args[1:])), kwargs

        return given

    def _finished(self, out: Any, hearing: Hearing) -> Any:
        hearing.note("norm", out.last_hidden_state[0].float().numpy())
        if (due := hearing.due("norm")) is not None:
            out.last_hidden_state = _like(due, out.last_hidden_state)
        return out

    def _layer(self, index: int, hearing: Hearing) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            module = self.layers.assembled(index, self._answer(index))
            out = self._heard(index, module, hearing, lambda: module(*args, **kwargs))
            due = hearing.due(f"layers.{index}.output")
            if due is None:
                return out
            x = out[0] if isinstance(out, tuple) else out
            return (_like(due, x), *out[1:]) if isinstance(out, tuple) else _like(due, x)

        return call

    def _heard(self, index: int, module: torch.nn.Module, hearing: Hearing, call: Any) -> Any:
        """A layer's call, with its stages noted and others in their place."""
        prefix = f"layers.{index}"
        chosen = hearing.due(f"{prefix}.{INDEXER}.topk")
        selected = {} if chosen is None else {f"{prefix}.{INDEXER}": chosen[None]}
        holder = torch.nn.Module()
        holder.model = torch.nn.Module()
        holder.model.layers = torch.nn.ModuleDict({str(index): module})
        with capture(holder) as seen, choosing(holder, selected), _putting(module, prefix, hearing):
            out = call()
        routing = f"{prefix}.{stages.ROUTING}"
        for stage in stages.in_order(seen):
            value = seen[stage][0]
            if stages.kind(stage) == stages.ROUTING_WEIGHTS:
                value = scatter(value, seen[routing][0], self.args.n_routed_experts)
            hearing.note(stage, value)
        return out

    def _answer(self, layer: int) -> Any:
        def answer(x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            out = torch.zeros_like(x)
            for first, count in self.chunks():
                parts = (part.to(self.layers.dtype) for part in self.layers.experts(layer, first, count))
                out += self.layers.chunk(first, *parts)(x, experts, weights)
            return out

        return answer

    def _mtp(self, ids: torch.Tensor, hidden: torch.Tensor, hearing: Hearing) -> None:
        index, following = self.args.num_hidden_layers, torch.roll(ids, -1, 1)
        around: Around = self.layers.around_mtp()
        embedded = self.layers.mtp_embed(following).to(self.layers.dtype)
        embedded[:, : int(self.args.mtp_zero_first_embedding)] = 0
        x = around.before(embedded, hidden)
        hearing.note(f"layers.{index}.eh_proj", x[0].float().numpy())
        with self.layers.loaded(index, self._answer(index)) as model:
            module: Any = model.model.layers[index]  # type: ignore[union-attr, index]
            out, _ = self._heard(index, module, hearing, lambda: self.layers.run(index, x, None))
        if (due := hearing.due(f"layers.{index}.output")) is not None:
            out = _like(due, out)
        hearing.note(f"layers.{index}.shared_head", around.after(out)[0].float().numpy())


@contextmanager
def _putting(module: torch.nn.Module, prefix: str, hearing: Hearing) -> Iterator[None]:
    """Replaced outputs of HF's modules, where a stage is one's output."""
    places = {
        "input_layernorm": "input_layernorm", "self_attn.q_a_layernorm": "self_attn.q_latent",
        "self_attn.kv_a_layernorm": "self_attn.kv_latent", "self_attn.o_proj": "self_attn.output",
        "post_attention_layernorm": "post_attention_layernorm", "mlp.experts": "mlp.experts",
        "mlp.shared_experts": "mlp.shared_experts", "mlp": "mlp_output",
    }  # fmt: skip
    hooks, modules = [], dict(module.named_modules())
    routing = hearing.due(f"{prefix}.{stages.ROUTING}")
    if routing is not None and "mlp.gate" in modules:
        weights = hearing.other(f"{prefix}.{stages.ROUTING_WEIGHTS}")
        hooks.append(modules["mlp.gate"].register_forward_hook(lambda m, a, out: _routed(out, routing, weights)))
    for path, stage in places.items():
        due = hearing.due(f"{prefix}.{stage}") if path in modules else None
        if due is not None:
            hooks.append(modules[path].register_forward_hook(lambda m, a, out, due=due: _like(due, out)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _routed(out: Any, due: Array, theirs: Array | None) -> Any:
    """What a router gives, its experts exchanged for those that are due. The weights stay its own where the experts are the
    same; where they are not, theirs (by expert) are due with them."""
    logits, weights, experts = out
    chosen, count = experts.numpy(), logits.shape[-1]
    own = scatter(weights.float().numpy(), chosen, count)
    if theirs is not None:
        own = np.where(same_sets(chosen, due)[:, None], own, theirs)
    due = due.astype(np.int64)
    return logits, torch.from_numpy(np.take_along_axis(own, due, -1)).to(weights.dtype), torch.from_numpy(due)


def _like(due: Array, x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(due)).reshape(x.shape).to(x.dtype)


# -- the equations


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


class EquationsRunner(Runner):
    def _run(self, tokens: Array, at: Array, hearing: Hearing) -> None:
        layers = Layers(self.side.folder, self.side.conventions, **self.side.changes)
        own = _Heard(
            layers.config, lambda name: layers.read(name, torch.float32).double().numpy(), self.side.conventions
        )
        own.hearing, own.experts_count = hearing, self.args.n_routed_experts
        shape, ids = tokens.shape, torch.as_tensor(tokens)
        positions = np.broadcast_to(np.arange(shape[1]), shape)
        x, selection = own.record("embed", layers.embed(ids).double().numpy()), None
        for layer in range(self.args.num_hidden_layers):
            x, selection = own.layer(layer, x, positions, causal(shape, None), selection)
        hidden = own.record("norm", rms_norm(x, own.weights("model.norm.weight"), self.args.rms_norm_eps))
        if layers.has_mtp:
            self._mtp(own, layers, ids, hidden)
        parts = [(hidden[0, at] @ layers.head(rows).double().numpy().T) for rows in self.vocabulary()]
        hearing.note("logits", np.concatenate(parts, -1))

    def _mtp(self, own: _Heard, layers: Layers, ids: torch.Tensor, hidden: Array) -> None:
        index, eps = self.args.num_hidden_layers, self.args.rms_norm_eps
        embedded = layers.mtp_embed(torch.roll(ids, -1, 1)).double().numpy()
        embedded[:, : int(self.args.mtp_zero_first_embedding)] = 0
        w = {
            n: own.weights(f"model.layers.{index}.{n}.weight")
            for n in ("enorm", "hnorm", "eh_proj", "shared_head.norm")
        }
        joined = np.concatenate([rms_norm(embedded, w["enorm"], eps), rms_norm(hidden, w["hnorm"], eps)], -1)
        x = own.record(f"layers.{index}.eh_proj", joined @ w["eh_proj"].T)
        positions = np.broadcast_to(np.arange(x.shape[1]), x.shape[:2])
        out, _ = own.layer(index, x, positions, causal(x.shape, None), None)
        own.record(f"layers.{index}.shared_head", rms_norm(out, w["shared_head.norm"], eps))
