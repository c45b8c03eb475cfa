"""One attention block, with its indexer, of three implementations, on the same weights and the same filled cache."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from mlx.utils import tree_flatten
from mlx_lm.models import deepseek_v32, glm_moe_dsa
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import CacheList, KVCache
from transformers import GlmMoeDsaConfig
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as hf

from glm_dsa import ModelArgs
from glm_dsa.attention import MultiHeadLatentAttention
from glm_dsa.cache import LayerCache, Widths
from glm_dsa.rope import RotaryEmbedding
from glm_dsa.store import Columns, KvQuantization
from reference.hf import cache_keyword

from .. import FOLDER

EIGHTH = FOLDER / "bench" / "eighth.json"
TRUE = FOLDER / "configs" / "glm-5.2.json"


def read(file: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(file.read_text())
    return config


class Filled:
    """What every side's cache holds: `context` tokens, and the next `chunk` of them. Unit variance, as norms leave it."""

    def __init__(self, args: ModelArgs, context: int, chunk: int, batch: int = 1, seed: int = 0) -> None:
        mx.random.seed(seed)
        self.context, self.chunk, self.batch = context, chunk, batch
        self.latents = mx.random.normal((batch, context, args.kv_lora_rank + args.qk_rope_head_dim))
        self.index_keys = mx.random.normal((batch, context, args.index_head_dim))
        self.x = mx.random.normal((batch, chunk, args.hidden_size))
        mx.eval(self.latents, self.index_keys, self.x)

    def with_room(self, values: mx.array) -> mx.array:
        """Behind what is filled, as many columns as the chunk needs: no side grows its buffers while it is timed."""
        room = -(-(self.context + self.chunk) // 256) * 256 - self.context
        return mx.contiguous(mx.pad(values, [(0, 0)] * (values.ndim - 2) + [(0, room), (0, 0)]))


class Side(ABC):
    """`fill`, then `run` as often as wanted: each run begins from what was filled."""

    name: str
    in_mlx = True  # whose memory mlx can tell

    @abstractmethod
    def fill(self, filled: Filled) -> None: ...

    @abstractmethod
    def run(self) -> Any:
        """One chunk; returns [B, S, hidden], evaluated."""

    def output(self) -> np.ndarray:
        return np.array(self.run())


class Ours(Side):
    """shared: the layer is handed the selection of a full one. like: whose weights these are."""

    def __init__(
        self, args: ModelArgs, shared: bool = False, kv_bits: int | None = None, like: Ours | None = None
    ) -> None:
        mx.random.seed(1)
        self.args, self.shared = args, shared
        self.packing = None if kv_bits is None else KvQuantization(kv_bits, 64)
        self.name = "ours" + (", shared layer" if shared else "") + ("" if kv_bits is None else f", int{kv_bits} KV")
        self.block: MultiHeadLatentAttention = (
            MultiHeadLatentAttention(args, with_indexer=True) if like is None else like.block
        )
        self.rotary = RotaryEmbedding(args)
        mx.eval(self.block.parameters())

    @property
    def weights(self) -> list[tuple[str, mx.array]]:
        return tree_flatten(self.block.parameters())  # type: ignore[return-value]

    def fill(self, filled: Filled) -> None:
        a, self.filled = self.args, filled
        self.cache = LayerCache(Widths(a.kv_lora_rank, a.qk_rope_head_dim, a.index_head_dim), self.packing)
        store, columns = self.cache.latents, [filled.latents]
        if self.packing is not None:
            columns = list(self.packing.pack(filled.latents))
        held = Columns([filled.with_room(c) for c in columns])
        store.plain, store.packed = (held, Columns()) if self.packing is None else (Columns(), held)
        self.cache.index_keys = Columns([filled.with_room(filled.index_keys)])
        held.length = self.cache.index_keys.length = filled.context
        self.rotation = self.rotary(mx.arange(filled.context, filled.context + filled.chunk))
        mx.eval(held.buffers, self.cache.index_keys.buffers, self.rotation)
        self.selection = self.select()  # for the chunk
        mx.eval(self.selection)

    def select(self) -> mx.array | None:
        x = self.filled.x
        keys = self.block.indexer.keys_so_far(x, self.rotation, self.cache)
        mask = self.cache.mask(self.filled.chunk)
        found = self.block.indexer(x, self.block.query_latent(x), keys, self.rotation, mask)
        self.cache.index_keys.trim(self.filled.chunk)  # columns in use; what is computed is as before
        return found

    def run(self) -> mx.array:
        out = self.once()
        mx.eval(out)
        return out

    def once(self) -> mx.array:
        """The same, not evaluated yet."""
        x, mask = self.filled.x, self.cache.mask(self.filled.chunk)
        latent = self.block.query_latent(x)
        if self.shared:
            selection = self.selection
        else:
            keys = self.block.indexer.keys_so_far(x, self.rotation, self.cache)
            selection = self.block.indexer(x, latent, keys, self.rotation, mask)
        out = self.block(x, latent, self.rotation, mask, self.cache, selection)
        self.cache.trim(self.filled.chunk)  # columns in use; what is computed is as before
        return out

    def attend_apart(self) -> Callable[[], mx.array]:
        """Attention on the chunk's selection alone: queries of unit variance, the chunk's own latents in the cache."""
        a, f, selection, mask = self.args, self.filled, self.selection, self.cache.mask(self.filled.chunk)
        assert selection is not None
        q_nope, q_rope = (mx.random.normal((f.batch, a.num_attention_heads, f.chunk, width))
                          for width in (a.qk_nope_head_dim, a.qk_rope_head_dim))  # fmt: skip
        tokens = self.cache.append(mx.random.normal((f.batch, f.chunk, a.kv_lora_rank + a.qk_rope_head_dim)))
        mx.eval(q_nope, q_rope, tokens.plain.buffers, tokens.packed.buffers)
        tokens.trim(f.chunk)
        return lambda: self.block.attend_gathered(q_nope, q_rope, tokens, selection, mask)


class Stock(Side):
    name = "mlx-lm"

    def __init__(self, ours: Ours, config: dict[str, Any]) -> None:
        due = glm_moe_dsa.ModelArgs.from_dict({**config, "num_hidden_layers": 1})
        self.block = deepseek_v32.DeepseekV32Attention(due)
        self.block.load_weights(ours.weights, strict=True)
        self.latent = due.kv_lora_rank

    def fill(self, filled: Filled) -> None:
        self.filled, latents = filled, filled.latents[:, None]
        main, indexer = KVCache(), KVCache()
        main.keys, main.values = (
            filled.with_room(part) for part in (latents[..., : self.latent], latents[..., self.latent :])
        )
        indexer.keys = filled.with_room(filled.index_keys[:, None])
        indexer.values = mx.zeros_like(indexer.keys)
        main.offset = indexer.offset = filled.context
        self.cache = CacheList(main, indexer)
        # One mask serves all layers of a model: it is made outside of the time of one.
        self.mask = create_attention_mask(filled.x, main, return_array=True)
        mx.eval(main.keys, main.values, indexer.keys, indexer.values, *([] if self.mask is None else [self.mask]))

    def run(self) -> mx.array:
        out = self.block(self.filled.x, self.mask, self.cache)
        mx.eval(out)
        for part in self.cache.caches:
            part.trim(self.filled.chunk)
        return out


class Hf(Side):
    """HF's modules on torch, eager, in float32."""

    name = "HF on torch"
    in_mlx = False

    def __init__(self, ours: Ours, config: dict[str, Any]) -> None:
        due = GlmMoeDsaConfig(**{k: v for k, v in config.items() if k != "model_type"})
        due._attn_implementation = "eager"
        self.block, self.rotary = hf.GlmMoeDsaAttention(due, 0), hf.GlmMoeDsaRotaryEmbedding(due)
        given = {name: torch.from_numpy(np.array(value)) for name, value in ours.weights}
        up = torch.cat([given.pop("embed_q.weight").transpose(1, 2), given.pop("unembed_out.weight")], dim=1)
        given["kv_b_proj.weight"] = up.reshape(-1, up.shape[-1])
        self.block.load_state_dict(given)
        self.latent = due.kv_lora_rank

    def fill(self, filled: Filled) -> None:
        latents, keys = (torch.from_numpy(np.array(a)) for a in (filled.latents[:, None], filled.index_keys))
        rope = self.block.qk_rope_head_dim
        turned = [*range(0, rope, 2), *range(1, rope, 2)]  # where HF keeps a rotated pair: half the width apart
        keys[..., :rope] = keys[..., turned]
        self.held = _Held(latents[..., : self.latent], latents[..., self.latent :][..., turned], keys)
        self.x = torch.from_numpy(np.array(filled.x))
        at = torch.arange(filled.context, filled.context + filled.chunk)[None].expand(filled.batch, -1)
        self.turned = self.rotary(self.x, at)
        seen = torch.arange(filled.context + filled.chunk) <= at[0][:, None]
        self.mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]

    def output(self) -> np.ndarray:
        found: np.ndarray = self.run().numpy()
        return found

    @torch.inference_mode()
    def run(self) -> torch.Tensor:
        return self.block(self.x, self.turned, self.mask, **{cache_keyword(self.block): self.held})[0]


class _Held:
    """HF's cache as its attention asks for it. (A cache of HF's own joins old and new on each call too.)"""

    def __init__(self, latent: torch.Tensor, rope: torch.Tensor, keys: torch.Tensor) -> None:
        self.latent, self.rope, self.keys = latent.contiguous(), rope.contiguous(), keys

    def update(self, latent: torch.Tensor, rope: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat([self.latent, latent], dim=2), torch.cat([self.rope, rope], dim=2)

    def update_indexer(self, keys: torch.Tensor, _: int) -> torch.Tensor:
        return torch.cat([self.keys, keys], dim=1)
