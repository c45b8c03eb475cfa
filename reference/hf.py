"""HF's own modules, built from a config and weights, whole or one layer, under either convention. float32, eager, CPU.

Eager attention and float32 on the CPU are HF's truest form: its sdpa path was wrong with explicit masks in some
versions. A layer more than `num_hidden_layers` holds the MTP layer's decoder part, which HF otherwise drops on load.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Indexer
from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import GlmMoeDsaIndexer

from .equations import Conventions

INDEXERS = {"half-split": DeepseekV32Indexer, "interleaved": GlmMoeDsaIndexer}


def config_for(config: Mapping[str, Any], with_mtp: bool = False) -> Any:
    """An HF config object; `with_mtp` adds one full, sparse layer behind the last."""
    own = ("quantization_config", "quantization", "dtype")  # the loader's business
    built = AutoConfig.for_model(**{k: copy.deepcopy(v) for k, v in config.items() if k not in own})
    dense = config.get("first_k_dense_replace")
    if config["model_type"] == "glm4_moe_lite" and dense is not None and not config.get("mlp_layer_types"):
        # HF never reads the key here, and has one dense layer; every engine reads it (tests/test_upstream.py)
        built.mlp_layer_types = ["dense" if i < dense else "sparse" for i in range(built.num_hidden_layers)]
    if with_mtp:
        built.num_hidden_layers += 1
        built.mlp_layer_types = [*built.mlp_layer_types[: built.num_hidden_layers - 1], "sparse"]
        if getattr(built, "indexer_types", None):
            built.indexer_types = [*built.indexer_types[: built.num_hidden_layers - 1], "full"]
            built.layer_types = ["indexed_attention"] * built.num_hidden_layers
    built._attn_implementation = "eager"
    built._experts_implementation = "eager"
    return built


def build(config: Mapping[str, Any], with_mtp: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """A causal LM with HF's own initial weights (see checkpoints.py for trained-like ones)."""
    return AutoModelForCausalLM.from_config(
        config_for(config, with_mtp), dtype=dtype, attn_implementation="eager"
    ).eval()


def load(
    folder: str | Path,
    conventions: Conventions | None = None,
    with_mtp: bool = False,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Any:
    """HF's own loading of a checkpoint in its layout. `changes` are config keys to replace."""
    config = json.loads((Path(folder) / "config.json").read_text()) | changes
    with quiet():  # as stored, then cast parameter by parameter: HF's own cast on load holds both copies
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=config_for(config, with_mtp), dtype="auto", attn_implementation="eager", use_safetensors=True
        ).eval().to(dtype)  # fmt: skip
    return apply(model, conventions) if conventions else model


def apply(model: Any, conventions: Conventions) -> Any:
    """Puts a convention in force: the indexer's class decides its RoPE layout, since both have the same parameters."""
    if model.config.model_type == "glm4_moe_lite":
        model.config.rope_interleave = conventions.main_rope == "interleaved"
    elif conventions.main_rope != "interleaved":
        raise ValueError("HF's glm_moe_dsa always turns interleaved pairs in its main attention (since 5.11)")
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.q_a_layernorm.variance_epsilon = conventions.latent_norm_eps
        attention.kv_a_layernorm.variance_epsilon = conventions.latent_norm_eps
        if getattr(attention, "indexer", None) is not None:
            attention.indexer.__class__ = INDEXERS[conventions.indexer_rope]
            attention.indexer.k_norm.eps = conventions.indexer_norm_eps
    return model


@torch.no_grad()
def forward(model: Any, tokens: Any, positions: Any = None, cache: Any = None) -> torch.Tensor:
    """tokens int [B, S] -> logits [B, S, V]."""
    return model(
        input_ids=torch.as_tensor(tokens), position_ids=None if positions is None else torch.as_tensor(positions),
        use_cache=cache is not None, **{cache_keyword(model): cache},
    ).logits  # fmt: skip


def cache_keyword(module: Any) -> str:
    """What HF calls the cache that a module's forward takes: `cache` from 5.24 on, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


def kept_in_float32(model: Any) -> tuple[str, ...]:
    """How the names end that HF casts to no other dtype: the router's bias; from 5.24 on, its weight too."""
    return tuple(model._keep_in_fp32_modules_strict or ())


@torch.no_grad()
def run_layer(model: Any, layer: int, x: Any, selection: Any = None, positions: Any = None) -> None:
    """One decoder layer on x [B, S, hidden], uncached; see it with `capture`. A shared layer needs a `selection`."""
    x = torch.as_tensor(x)
    batch, length = x.shape[:2]
    positions = torch.arange(length)[None] if positions is None else torch.as_tensor(positions)
    kwargs = {} if selection is None else {"prev_topk_indices": torch.as_tensor(selection).int()}
    model.model.layers[layer](
        x,
        attention_mask=additive_causal_mask(batch, length, length, x.dtype),
        position_ids=positions,
        position_embeddings=model.model.rotary_emb(x, position_ids=positions),
        **kwargs,
    )


class _Lifted(TorchFunctionMode):
    """Wherever HF's code asks for float32, float64 is given: its islands (norms, softmax, router, scores, angles) lifted."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            return args[0].double()
        lifted = [torch.float64 if a is torch.float32 else a for a in args]
        named = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*lifted, **named)


@contextmanager
def in_float64(model: Any) -> Iterator[Any]:
    """HF's own code, all of it in float64. `model`: loaded with dtype=torch.float64."""
    rotary = model.model.rotary_emb
    with _Lifted():
        frequencies = ROPE_INIT_FUNCTIONS.get(rotary.rope_type, rotary.compute_default_rope_parameters)
        rotary.inv_freq, rotary.attention_scaling = frequencies(rotary.config, device=torch.device("cpu"))
        yield model


@contextmanager
def standing_in(stand_ins: Mapping[Any, torch.nn.Module]) -> Iterator[None]:
    """{attention module: what stands in its indexer's place for a while}."""
    own = {attention: attention.indexer for attention in stand_ins}
    try:
        for attention, stand_in in stand_ins.items():
            attention.indexer = stand_in
        yield
    finally:
        for attention, indexer in own.items():
            attention.indexer = indexer


class Given(torch.nn.Module):
    """In an indexer's place: answers with a selection made before. `writes`: the indexer whose key is still to be cached."""

    def __init__(self, selection: torch.Tensor, writes: torch.nn.Module | None = None) -> None:
        super().__init__()
        self.selection, self.writes = selection, writes

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.writes is not None:
            self.writes(*args, **kwargs)
        return self.selection


def additive_causal_mask(batch: int, queries: int, keys: int, dtype: torch.dtype) -> torch.Tensor:
    """0 where a query may look, the dtype's lowest number elsewhere, as HF's eager path expects it. [B, 1, S, T]"""
    allowed = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    return torch.where(allowed, 0.0, torch.finfo(dtype).min).to(dtype).expand(batch, 1, queries, keys)


@contextmanager
def quiet() -> Iterator[None]:
    """Without HF's progress bars and its warning about the MTP tensors that it drops."""
    logger = logging.getLogger("transformers")
    level = logger.level
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
