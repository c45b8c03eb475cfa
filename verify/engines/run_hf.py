"""HF's modules on a prompt: its backbone runs as it is, over layers that are read as they are called."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch

from reference.capture import capture
from reference.layers import Layers
from reference.modules import choosing
from reference.mtp import Around

from ..core import stages
from ..core.choices import scatter
from ..core.compare import same_sets
from ..core.stages import EXPERTS, INDEXER, MODULE_OUTPUTS, ROUTER
from .base import TORCH, Answer, AtExperts, Steps, Weights, chunks, first_draft, vocabulary
from .recording import Hearing
from .spec import Side

Array = np.ndarray
# where a stage is what a module gives; not where that is a tuple, or another's place in the model
PLACES = {m: s for m, s in MODULE_OUTPUTS.items() if m not in ("self_attn", "", "norm", "lm_head")} | {EXPERTS: EXPERTS}


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


class HfEngine:
    """HF's backbone runs as it is; what it holds is read a layer at a time."""

    def __init__(self, side: Side) -> None:
        self.side, self.args = side, side.args
        self.layers = Layers(side.folder, side.conventions, TORCH[side.dtype], **side.changes)

    @property
    def model(self) -> Any:
        return self.layers.model

    def cached(self) -> None:
        return None

    def layer(
        self,
        index: int,
        x: torch.Tensor,
        selection: torch.Tensor | None,
        choices: Mapping[str, Array],
        attended: dict[str, Array] | None = None,
        places: torch.Tensor | None = None,
    ) -> Steps[torch.Tensor]:
        """See `steps`."""
        return steps(self.layers, index, x.to(self.layers.dtype), selection, choices, attended, places)

    def before_mtp(self, tokens: Array, hidden: torch.Tensor) -> tuple[Around, torch.Tensor, torch.Tensor]:
        """`first_draft` of tokens int [1, S], hidden [B, S, hidden] after the final norm -> (HF's glue, embeddings
        [1, S, hidden], the layer's input)."""
        around, (fed, zeroed) = self.layers.around_mtp(), first_draft(tokens, self.args)
        embedded = self.layers.mtp_embed(torch.as_tensor(fed)).to(self.layers.dtype)
        embedded[:, :zeroed] = 0
        return around, embedded, around.before(embedded.expand_as(hidden), hidden)

    def whole(self, tokens: Array, at: Array, hearing: Hearing) -> None:
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
            self._mtp(tokens, hidden, hearing)
        parts = [(hidden[0, at].float() @ self.layers.head(rows).T).numpy() for rows in vocabulary(self.args)]
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

    def _answer(self, layer: int) -> Callable[..., torch.Tensor]:
        def answer(x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            asked = Asked(self.layers, x, experts, weights)
            for first, count in chunks(self.args):
                asked.take(first, self.layers.experts(layer, first, count))
            return asked.sum

        return answer

    def _mtp(self, tokens: Array, hidden: torch.Tensor, hearing: Hearing) -> None:
        index = self.args.num_hidden_layers
        around, _, x = self.before_mtp(tokens, hidden)
        hearing.note(f"layers.{index}.eh_proj", x[0].float().numpy())
        with self.layers.loaded(index, self._answer(index)) as model:
            module: Any = model.model.layers[index]  # type: ignore[union-attr, index]
            out, _ = self._heard(index, module, hearing, lambda: self.layers.run(index, x, None))
        if (due := hearing.due(f"layers.{index}.output")) is not None:
            out = _like(due, out)
        hearing.note(f"layers.{index}.shared_head", around.after(out)[0].float().numpy())


# -- a layer by itself


class Asked:
    """What HF's experts are asked, and the sum of what they answered so far. x [tokens, hidden], experts and weights
    [tokens, k]. stages: of the layer, until there."""

    def __init__(self, layers: Layers, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> None:
        self.layers, self.x, self.experts, self.weights = layers, x, experts, weights
        self.sum, self.stages = torch.zeros_like(x), dict[str, Array]()

    def take(self, first: int, weights: Weights) -> None:
        gate_up, down = (part.to(self.layers.dtype) for part in weights)
        self.sum += self.layers.chunk(first, gate_up, down)(self.x, self.experts, self.weights)


def steps(
    layers: Layers,
    index: int,
    x: torch.Tensor,
    selection: torch.Tensor | None = None,
    choices: Mapping[str, Array] | None = None,
    attended: dict[str, Array] | None = None,
    places: torch.Tensor | None = None,
) -> Steps[torch.Tensor]:
    """One layer of HF's, as `Layered.layer` says. attended: filled with how much attention each key gets. places: the numbers
    under which whoever hands experts over knows them, int [E]."""
    asked: Asked | None = None

    def answer(x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        nonlocal asked
        if asked is None:
            asked = Asked(layers, x, experts if places is None else places[experts], weights)
            raise AtExperts
        return asked.sum

    seen: dict[str, Array] = {}
    with layers.loaded(index, answer) as model:
        module: Any = model.model.layers[index]  # type: ignore[union-attr, index]
        module.self_attn.forward = _Once(module.self_attn.forward)
        chosen = {stage.removesuffix(".topk"): choice for stage, choice in (choices or {}).items()}

        def called() -> tuple[torch.Tensor, torch.Tensor | None]:
            # not held while others run: what HF's attention calls is exchanged in its module, and put back in order
            with choosing(model, chosen), capture(model, attended) as stages:
                try:
                    return layers.run(index, x, selection)
                finally:
                    seen.update(stages)

        with suppress(AtExperts):
            out, used = called()
        if asked is not None:
            asked.stages = seen
            yield asked
            out, used = called()
    return Answer(seen, out, used)


class _Once:
    """In the place of a forward: runs it once, and gives that again."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward, self.out = forward, None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.out is None:
            self.out = self.forward(*args, **kwargs)
        return self.out


# -- the whole model under others' values


@contextmanager
def _putting(module: torch.nn.Module, prefix: str, hearing: Hearing) -> Iterator[None]:
    """Replaced outputs of HF's modules, where a stage is one's output."""
    hooks, modules = [], dict(module.named_modules())
    routing = hearing.due(f"{prefix}.{stages.ROUTING}")
    if routing is not None and ROUTER in modules:
        weights = hearing.other(f"{prefix}.{stages.ROUTING_WEIGHTS}")
        hooks.append(modules[ROUTER].register_forward_hook(lambda m, a, out: _routed(out, routing, weights)))
    for path, stage in PLACES.items():
        due = hearing.due(f"{prefix}.{stage}") if path in modules else None
        if due is not None:
            hooks.append(modules[path].register_forward_hook(lambda m, a, out, due=due: _like(due, out)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _routed(out: Any, due: Array, theirs: Array | None) -> Any:
    """What a router gives, its experts exchanged for `due`. The weights stay its own where the experts are the same; where
    they are not, theirs (by expert) come with them."""
    logits, weights, experts = out
    chosen, count = experts.numpy(), logits.shape[-1]
    own = scatter(weights.float().numpy(), chosen, count)
    if theirs is not None:
        own = np.where(same_sets(chosen, due)[:, None], own, theirs)
    due = due.astype(np.int64)
    return logits, torch.from_numpy(np.take_along_axis(own, due, -1)).to(weights.dtype), torch.from_numpy(due)


def _like(due: Array, x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(due)).reshape(x.shape).to(x.dtype)
