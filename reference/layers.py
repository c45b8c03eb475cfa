"""HF's model a layer at a time: each is built from a checkpoint's own tensors, run and dropped, so that memory does not grow
with the model. The experts of a layer come in chunks: one layer of GLM-5.2's is 39 GB in float32.

The layers run HF's code unmodified. Whoever runs one says what stands in its experts' place: `Chunk`s of HF's own class,
most likely, summed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from . import hf
from .equations import Conventions
from .mtp import Around
from .stored import read_tensors

EMBEDDING = "model.embed_tokens.weight"
Answer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Experts(torch.nn.Module):
    """In the place of a layer's experts: x [tokens, hidden], experts and weights [tokens, k] -> what `answer` says."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.answer(x, experts, weights)


class Layers:
    """A checkpoint in any layout (`read_tensors`), as HF's modules in `dtype`. `changes` are config keys to replace."""

    def __init__(
        self, folder: str | Path, conventions: Conventions, dtype: torch.dtype = torch.float32, **changes: Any
    ) -> None:
        self.read, self.dtype = read_tensors(folder), dtype
        self.config: Mapping[str, Any] = self.read.config | changes
        self.has_mtp = f"model.layers.{self.config['num_hidden_layers']}.eh_proj.weight" in self.read
        config = hf.config_for(self.config, self.has_mtp)
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        self.model.model.rotary_emb = type(self.model.model.rotary_emb)(config=self.model.config)
        hf.apply(self.model, conventions)
        self.empty = list(self.model.model.layers)
        sparse = [layer.mlp for layer in self.model.model.layers if hasattr(layer.mlp, "experts")]
        self.experts_class = type(sparse[0].experts) if sparse else torch.nn.Module

    def embed(self, tokens: torch.Tensor, name: str = EMBEDDING) -> torch.Tensor:
        """int [B, S] -> [B, S, hidden]; only the rows that are asked for are read."""
        wanted, at = tokens.unique(return_inverse=True)
        return torch.stack([self.read(name, torch.float32, int(row)) for row in wanted])[at]

    def around_mtp(self) -> Around:
        """What joins the MTP layer, number `num_hidden_layers`, to the model."""
        norm, layer = type(self.empty[0].input_layernorm), self.config["num_hidden_layers"]
        return Around(self.model.config, norm, layer, self.read, self.dtype)

    def mtp_embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """As `embed`, by the MTP layer's own embedding, if it has one."""
        own = f"model.layers.{self.config['num_hidden_layers']}.embed_tokens.weight"
        return self.embed(tokens, own if own in self.read else EMBEDDING)

    def assembled(self, layer: int, answer: Answer) -> torch.nn.Module:
        """A layer with its weights; `answer` stands in the place of its experts."""
        module, prefix = copy.deepcopy(self.empty[layer]), f"model.layers.{layer}."
        if hasattr(module.mlp, "experts"):
            module.mlp.experts = Experts(answer)
        names = [*dict(module.named_parameters()), *dict(module.named_buffers())]
        kept = hf.kept_in_float32(self.model)
        tensors = {n: self.read(prefix + n, torch.float32 if n.endswith(kept) else self.dtype) for n in names}
        module.load_state_dict(tensors, strict=True, assign=True)
        return module

    @contextmanager
    def loaded(self, layer: int, answer: Answer) -> Iterator[torch.nn.Module]:
        """The model, with this one layer's weights in memory."""
        self.model.model.layers[layer] = self.assembled(layer, answer)
        try:
            yield self.model
        finally:
            self.model.model.layers[layer] = self.empty[layer]

    @torch.no_grad()
    def run(
        self, layer: int, x: torch.Tensor, selection: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A loaded layer on x [B, S, hidden], uncached -> (x, the selection that it used, int [B, S, K])."""
        batch, length = x.shape[:2]
        positions = torch.arange(length)[None]
        kwargs = {} if selection is None else {"prev_topk_indices": selection.int()}
        out = self.model.model.layers[layer](
            x,
            attention_mask=hf.additive_causal_mask(batch, length, length, x.dtype),
            position_ids=positions,
            position_embeddings=self.model.model.rotary_emb(x, position_ids=positions),
            **kwargs,
        )
        return out if isinstance(out, tuple) else (out, None)

    def experts(self, layer: int, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts `first`, ... of a layer, float32: gate_up [count, 2 I, hidden], down [count, hidden, I]."""
        return self.some_experts(layer, range(first, first + count))

    def some_experts(self, layer: int, numbers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """As `experts`, those of these numbers."""
        inner, hidden = self.config["moe_intermediate_size"], self.config["hidden_size"]
        gate_up, down = torch.empty(len(numbers), 2 * inner, hidden), torch.empty(len(numbers), hidden, inner)
        for i, number in enumerate(numbers):
            path = f"model.layers.{layer}.mlp.experts.{number}"
            gate_up[i, :inner] = self.read(f"{path}.gate_proj.weight", torch.float32)
            gate_up[i, inner:] = self.read(f"{path}.up_proj.weight", torch.float32)
            down[i] = self.read(f"{path}.down_proj.weight", torch.float32)
        return gate_up, down

    def chunk(self, first: int, gate_up: torch.Tensor, down: torch.Tensor) -> Chunk:
        """Experts `first`, `first` + 1, ... of a layer: gate_up [n, 2 I, hidden], down [n, hidden, I]."""
        return Chunk(self.experts_class, self.model.config, first, gate_up, down)

    @torch.no_grad()
    def norm(self, x: torch.Tensor, empty: torch.nn.Module | None = None) -> torch.Tensor:
        """The final norm; `empty`: the module to fill, where another stands in its place in the model."""
        norm = copy.deepcopy(empty or self.model.model.norm)
        norm.load_state_dict({"weight": self.read("model.norm.weight", self.dtype)}, assign=True)
        return norm(x)

    def head(self, rows: slice) -> torch.Tensor:
        """Some rows of the head, float32 [rows, hidden]."""
        tied = self.config.get("tie_word_embeddings")
        return self.read("model.embed_tokens.weight" if tied else "lm_head.weight", torch.float32, rows)


class Chunk:
    """Some experts of a layer, in a module of HF's own class."""

    def __init__(
        self, kind: type[torch.nn.Module], config: Any, first: int, gate_up: torch.Tensor, down: torch.Tensor
    ) -> None:
        self.first, self.count = first, len(down)
        of_chunk = copy.deepcopy(config)
        of_chunk.n_routed_experts = self.count
        with torch.device("meta"):
            self.module = kind(of_chunk)
        self.module.load_state_dict({"gate_up_proj": gate_up, "down_proj": down}, assign=True)

    @torch.no_grad()
    def __call__(self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What these experts add to each token, [tokens, hidden]. HF leaves out the expert numbered `count`."""
        own = experts - self.first
        return self.module(x, own.where((own >= 0) & (own < self.count), self.count), weights)
