"""Multi-token prediction in HF's own modules: `MtpLayer`, the glue, around HF's own decoder layer.

HF's `MtpModel` refuses this architecture (its mask key, its layer types, and a decoder layer that returns a tuple), so
the three lines that it would add stand here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.modeling_layers import MtpLayer

from .capture import Stages, capture, reinterleave
from .hf import Given, additive_causal_mask, cache_keyword, standing_in
from .stored import read_tensors


class FirstOutput(torch.nn.Module):
    """HF's decoder layer returns (hidden, selection); MtpLayer wants the hidden. The selection is kept here."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.selection: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        out = self.layer(x, **kwargs)
        if isinstance(out, tuple):
            out, self.selection = out
        return out


class Placeholder(torch.nn.Identity):
    """Where MtpLayer would build a decoder layer of its own; HF's loaded one takes its place."""


def glue(config: Any, norm: type, layer: int, read: read_tensors, dtype: torch.dtype) -> Any:
    """HF's MtpLayer with its norms and eh_proj, around a placeholder where its decoder layer belongs."""
    with torch.device("meta"):
        mtp = MtpLayer(config, Placeholder, norm, layer)
    own = {
        "enorm.weight": "enorm.weight", "hnorm.weight": "hnorm.weight", "eh_proj.weight": "eh_proj.weight",
        "post_norm.weight": "shared_head.norm.weight",
    }  # fmt: skip
    tensors = {ours: read(f"model.layers.{layer}.{theirs}", dtype) for ours, theirs in own.items()}
    mtp.load_state_dict(tensors, strict=True, assign=True)
    return mtp.eval()


class Around:
    """What goes into an MTP layer's decoder layer, and what becomes of that layer's output: HF's glue, a step at a time."""

    def __init__(self, config: Any, norm: type, layer: int, read: read_tensors, dtype: torch.dtype) -> None:
        self.mtp = glue(config, norm, layer, read, dtype)
        self.mtp.mtp_block = self.block = _Replaced()

    def before(self, embedded: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Embeddings of the next tokens and the main model's hidden, both [B, S, hidden] -> the layer's input."""
        self._run(embedded, hidden)
        return self.block.given

    def after(self, out: torch.Tensor) -> torch.Tensor:
        """The layer's output -> hidden after the shared head's norm."""
        self.block.out = out
        return self._run(out, out)

    @torch.no_grad()
    def _run(self, embedded: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        nothing: Any = None
        return self.mtp(embedded, hidden, nothing, nothing, nothing, nothing)


class _Replaced(torch.nn.Module):
    """In a decoder layer's place: keeps what it is given, gives what it is told to."""

    out: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.given = x
        return x if self.out is None else self.out


class Mtp:
    """The MTP layer of a checkpoint. `model`: loaded by `hf.load(folder, with_mtp=True)`."""

    def __init__(self, model: Any, folder: str | Path, reuse: bool, zero_first: bool = False) -> None:
        self.model, self.reuse, self.zero_first = model, reuse, zero_first
        layer = model.model.layers[-1]
        tensors, index = read_tensors(folder), len(model.model.layers) - 1
        prefix = f"model.layers.{index}."
        self.mtp = glue(model.config, type(model.model.norm), index, tensors, torch.float32)
        self.block = FirstOutput(layer)
        self.mtp.mtp_block = self.block
        owns = prefix + "embed_tokens.weight" in tensors.names
        self.embed = tensors(prefix + "embed_tokens.weight", torch.float32) if owns else model.model.embed_tokens.weight
        self.head = tensors(prefix + "shared_head.head.weight", torch.float32) if owns else model.lm_head.weight

    def index_keys(self) -> np.ndarray | None:
        """The indexer keys that HF's cache holds after `draft`, [B, T, D], in the order in which wk made them."""
        indexer = getattr(self.block.layer.self_attn, "indexer", None)
        if indexer is None:
            return None
        keys = self.cache.layers[self.model.config.num_hidden_layers - 1].indexer_keys.numpy().copy()
        is_interleaved = type(indexer).__name__.startswith("Glm")
        return reinterleave(keys, indexer.qk_rope_head_dim) if is_interleaved else keys

    @torch.no_grad()
    def draft(
        self, hidden: np.ndarray, tokens: list[np.ndarray], steps: int
    ) -> list[tuple[np.ndarray, np.ndarray, Any]]:
        """As `Equations.draft`, cached as HF caches: [(logits, hidden, selection)] of each step. `steps` is left behind: the
        stages of each, of its own tokens."""
        self.steps: list[Stages] = []
        self.cache = cache = DynamicCache(config=self.model.config)
        index = self.model.config.num_hidden_layers - 1
        previous, out = torch.as_tensor(hidden), []
        attention: Any = self.block.layer.self_attn
        indexer = getattr(attention, "indexer", None)
        for step in range(steps):
            fed = torch.as_tensor(tokens[step])
            embedded = torch.nn.functional.embedding(fed, self.embed)
            past = cache.get_seq_length(index)
            positions = torch.arange(past, past + fed.shape[1])[None]
            if self.zero_first and past == 0:
                embedded = embedded.clone()
                embedded[:, 0] = 0
            stand_ins = {}
            if step > 0 and self.reuse and indexer is not None:
                assert self.block.selection is not None
                stand_ins[attention] = Given(self.block.selection[:, -1:], writes=indexer)
            with standing_in(stand_ins), capture(self.model) as seen:
                x = self.mtp(
                    embedded, previous,
                    position_embeddings=self.model.model.rotary_emb(embedded, position_ids=positions),
                    attention_mask=additive_causal_mask(fed.shape[0], fed.shape[1], past + fed.shape[1], embedded.dtype),
                    position_ids=positions, **{cache_keyword(self.mtp): cache},
                )  # fmt: skip
            self.steps.append({s: v for s, v in seen.items() if ".writes." not in s})
            logits = torch.nn.functional.linear(x, self.head)
            selection = None if self.block.selection is None else self.block.selection.numpy().copy()
            out.append((logits.numpy(), x.numpy(), selection))
            previous = x[:, -1:]
        return out
