"""A reference behind a cache that is full already: HF and the equations on a few tokens after any number of others.

What the cache holds is drawn, not computed: latents and keys of 200,000 tokens cost a moment so, and HF, the equations and the
candidate are all handed the same.
"""

from __future__ import annotations

import functools
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from transformers import DynamicCache

from reference import hf
from reference.capture import capture
from reference.equations import Equations, rms_norm

from ..cases import Case, Reference

Array = np.ndarray


MOST = 200_000  # tokens that are held at most


class Held:
    """What each layer remembers of `context` tokens: latents [1, T, R], rotary keys [1, T, rope], indexer keys [1, T, D]."""

    def __init__(self, case: Case, context: int) -> None:
        args, self.context = case.args, context
        widths = {"kv_latent": args.kv_lora_rank, "k_rope": args.qk_rope_head_dim, "indexer.k": args.index_head_dim}
        self.parts: dict[str, Array] = {}
        for layer in range(args.num_hidden_layers):
            for part, width in widths.items():
                if part != "indexer.k" or args.runs_indexer(layer):
                    self.parts[f"layers.{layer}.self_attn.{part}"] = drawn(layer, part, width, case.seed)[:, :context]

    def of(self, layer: int) -> tuple[Array, Array, Array | None]:
        """(latents, rotary keys, indexer keys where the layer has an indexer)."""
        prefix = f"layers.{layer}.self_attn."
        return self.parts[prefix + "kv_latent"], self.parts[prefix + "k_rope"], self.parts.get(prefix + "indexer.k")

    def fill(self, caches: list[Any], chunk: int = 1 << 14) -> list[Any]:
        """Our caches, one for each layer, in chunks: buffers grow as they do for users."""
        for layer, cache in enumerate(caches):
            latent, turned, keys = self.of(layer)
            joined = mx.concatenate([mx.array(latent), mx.array(turned)], axis=-1)
            for start in range(0, self.context, chunk):
                if keys is not None:
                    cache.append_index_keys(mx.array(keys[:, start : start + chunk]))
                cache.append(joined[:, start : start + chunk])
                mx.eval(cache.latents.plain.buffers, cache.latents.packed.buffers, cache.index_keys.buffers)
        return caches

    def theirs(self, case: Case) -> Any:
        """HF's cache. It keeps a pair that was turned as neighbours in two halves, [evens | odds]."""
        cache, rope = DynamicCache(config=case.hf.config), case.args.qk_rope_head_dim
        slots: list[Any] = list(cache.layers)
        for layer, slot in enumerate(slots):
            latent, turned, keys = self.of(layer)
            slot.update(torch.from_numpy(latent)[:, None], halved(torch.from_numpy(turned), rope)[:, None])
            if keys is not None:
                is_interleaved = case.args.indexer_rope == "interleaved"
                slot.update_indexer(halved(torch.from_numpy(keys), rope) if is_interleaved else torch.from_numpy(keys))
        return cache


@functools.cache
def drawn(layer: int, part: str, width: int, seed: int) -> Array:
    random = np.random.default_rng([seed, layer, *part.encode()])
    # Keys of less weight than those of the tokens behind them, which are to be selected too.
    return random.standard_normal((1, MOST, width), dtype=np.float32) * np.float32(0.1 if part == "indexer.k" else 1)


def halved(x: torch.Tensor, width: int) -> torch.Tensor:
    """The first `width` entries as [evens | odds]."""
    return torch.cat([x[..., 0:width:2], x[..., 1:width:2], x[..., width:]], dim=-1)


class EquationsBehind(Equations):
    """The equations, with what is held before their own latents and keys."""

    def __init__(self, *args: Any, held: Held) -> None:
        super().__init__(*args)
        self.held = held

    def choose(self, stage: str, own: Array) -> Array:
        own = super().choose(stage, own)
        before = self.held.parts.get(stage)
        return own if before is None else np.concatenate([before, own], axis=1)

    def after(self, tokens: Array) -> None:
        """tokens int [B, S], behind the context."""
        context, (batch, length) = self.held.context, tokens.shape
        positions = np.broadcast_to(context + np.arange(length), tokens.shape)
        allowed = np.ones((batch, length, context + length), bool)
        allowed[:, :, context:] = np.tril(np.ones((length, length), bool))
        x, selection = self.record("embed", self.weights("model.embed_tokens.weight")[tokens]), None
        for layer in range(self.config["num_hidden_layers"]):
            x, selection = self.layer(layer, x, positions, allowed, selection)
        hidden = self.record("norm", rms_norm(x, self.weights("model.norm.weight"), self.config["rms_norm_eps"]))
        self.record("logits", hidden @ self.head().T)


class Behind(Reference):
    """HF's stages on `length` tokens behind `context` others."""

    def __init__(self, case: Case, context: int, length: int) -> None:
        self.case, self.tokens, self.held = case, case.tokens(length), Held(case, context)
        with capture(case.hf) as self.hf:
            hf.forward(case.hf, self.tokens, cache=self.held.theirs(case))
        self.given = {s: v for s, v in self.hf.items() if s.endswith(".topk")}

    @property
    def end(self) -> int:
        return self.held.context + self.length

    @cached_property
    def truth(self) -> dict[str, Array]:
        case = self.case
        equations = EquationsBehind(case.config, case.weights, case.conventions, self.given, held=self.held)
        equations.after(self.tokens)
        return equations.stages
