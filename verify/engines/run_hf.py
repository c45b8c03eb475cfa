"""HF's modules on a prompt: its backbone runs as it is, over layers that are read as they are called."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from reference.capture import capture
from reference.layers import Layers
from reference.modules import choosing
from reference.mtp import Around

from ..core import stages
from ..core.choices import scatter
from .recording import Hearing
from .runner import TORCH, Runner, same_sets
from .spec import Side

Array = np.ndarray
INDEXER = "self_attn.indexer"


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
