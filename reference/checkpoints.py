"""Writes HF checkpoints, with HF's own `save_pretrained`, in several shards; and reads tensors back for the oracles.

Random weights hide faults that trained ones show. These have what trained ones have: norm weights away from 1, a
k_norm bias, a correction bias that changes choices, keys and latents of small variance (so that an eps counts), and
attention that is not flat; where it is asked for, norm weights near 0 and below, and index scores close to each other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from . import corpus, hf
from .places import BLOCK, shapes_in
from .stored import INDEX, read_tensors

# zai-org's keys, at widths that a CPU runs in a blink. 16 index heads: fewer make exact ties at score 0 (ReLU).
TINY = {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "model_type": "glm_moe_dsa",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "eos_token_id": [1, 2],
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 64,
    "index_head_dim": 24,
    "index_n_heads": 16,
    "index_topk": 16,
    "indexer_rope_interleave": True,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "kv_lora_rank": 32,
    "max_position_embeddings": 1048576,
    "moe_intermediate_size": 32,
    "moe_layer_freq": 1,
    "moe_router_dtype": "float32",
    "n_group": 1,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 8,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "q_lora_rank": 48,
    "qk_head_dim": 28,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 16,
    "rms_norm_eps": 1e-05,
    "rope_interleave": True,
    "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"},
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "use_cache": True,
    "v_head_dim": 20,
    "vocab_size": 160,
}

ONLY_INDEXER = ("index_head_dim", "index_n_heads", "index_topk", "indexer_rope_interleave")


def tiny(**changes: Any) -> dict[str, Any]:
    """A tiny GLM-5.x config; a change to None removes the key."""
    return {k: v for k, v in (TINY | changes).items() if v is not None}


def glm_5_2(**changes: Any) -> dict[str, Any]:
    """GLM-5.2's shape of things: IndexShare of freq 4, offset 3, and MTP that reuses its selection."""
    return tiny(**{"index_topk_freq": 4, "index_skip_topk_offset": 3, "index_share_for_mtp_iteration": True} | changes)


def glm_4_7(**changes: Any) -> dict[str, Any]:
    """GLM-4.7-Flash's: the same MLA, experts and MTP, no indexer; rope_theta at the top level."""
    lite = {
        "architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite", "first_k_dense_replace": 1,
        "partial_rotary_factor": 1.0, "rope_scaling": None, "rope_parameters": None, "rope_theta": 1000000,
        "rms_norm_eps": 1e-5, "qk_head_dim": None, "moe_router_dtype": None, "scoring_func": None, "num_hidden_layers": 4,
        "routed_scaling_factor": 1.8,
    }  # fmt: skip
    config = tiny(**lite | changes)
    return {k: v for k, v in config.items() if k not in ONLY_INDEXER}


def packable(**changes: Any) -> dict[str, Any]:
    """GLM-5.2's shape of things at widths that groups of 64 divide: weights and latents can be quantized as they come."""
    wide = {
        "kv_lora_rank": 64, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "qk_head_dim": 128, "v_head_dim": 64,
        "index_head_dim": 128, "q_lora_rank": 64, "intermediate_size": 128, "moe_intermediate_size": 64, "vocab_size": 320,
    }  # fmt: skip
    return glm_5_2(**wide | changes)


def write(
    folder: str | Path,
    config: Mapping[str, Any],
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    shard_size: str = "300KB",
    bias_mean: float = 0.0,
    key_mean: float = 0.0,
    uneven_norms: bool = False,
) -> Path:
    """Writes a checkpoint in HF layout, MTP layer included, config.json with exactly the keys of `config`."""
    folder = Path(folder)
    has_mtp = bool(config.get("num_nextn_predict_layers"))
    with hf.quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        model = hf.build(config, with_mtp=has_mtp, dtype=dtype).to(dtype)  # HF from 5.24 on keeps routers in float32
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # the one float32 tensor of a published checkpoint
                buffer.data = buffer.data.float()
        trained_like(model, bias_mean, key_mean, uneven_norms)
        model.save_pretrained(folder, max_shard_size=shard_size)
        if has_mtp:
            _add_mtp_tensors(folder, config, dtype, uneven_norms)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2))
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


@torch.no_grad()
def trained_like(model: Any, bias_mean: float = 0.0, key_mean: float = 0.0, uneven_norms: bool = False) -> None:
    """Draws all weights anew; gains are those on inputs of unit variance. key_mean: what all of the indexer's keys have in
    common, where RoPE does not turn them: a large one makes scores that lie close to each other."""
    gains = {
        "q_a_proj": 0.03,  # a small query latent: q_a_layernorm's eps counts
        "q_b_proj": 1.6,
        "wk": 0.01,  # small keys: k_norm's eps counts
    }
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        owner, _, kind = name.rpartition(".")
        module = owner.rsplit(".", 1)[-1]
        if kind == "e_score_correction_bias":
            parameter.normal_(bias_mean, 0.15)
        elif kind == "bias":
            parameter.normal_(0, 0.3)
            if module == "k_norm":
                parameter[model.config.qk_rope_head_dim :] += key_mean
        elif "norm" in module:
            parameter.uniform_(0.6, 1.4)
            parameter.mul_(unevenness(parameter) if uneven_norms else 1)
        elif module == "embed_tokens":
            parameter.normal_(0, 1)
        elif parameter.dim() >= 2:
            parameter.normal_(0, gains.get(module, 1.0) * parameter.shape[-1] ** -0.5)
            if module == "kv_a_proj_with_mqa":  # a small latent beside a rotary key of unit variance
                latent = parameter.shape[0] - model.config.qk_rope_head_dim
                parameter[:latent] *= 0.03


def unevenness(norm: torch.Tensor) -> torch.Tensor:
    """Factors of a norm's weight: every seventh entry near 0 and another seventh negative (GLM-5.2's shared_head.norm spans
    -0.07 to 1.81). A weight whose magnitude is taken, or that is clamped, shows there alone."""
    places = torch.arange(norm.numel())
    return torch.where(places % 7 == 0, 0.02, torch.where(places % 7 == 3, -1.0, 1.0)).to(norm.dtype)


def write_tokenizer(folder: str | Path) -> Path:
    """A real, small tokenizer in HF's format: every byte a token, some special ones, a chat template. 262 tokens."""
    special = corpus.SPECIAL
    tokens = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=special[0], eos_token=special[1])
    wrapped.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|sep|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    wrapped.save_pretrained(folder)
    return Path(folder)


def _add_mtp_tensors(folder: Path, config: Mapping[str, Any], dtype: torch.dtype, uneven_norms: bool) -> None:
    """One shard more, with what joins the MTP layer to the model; HF wrote its decoder layer already."""
    hidden, prefix = config["hidden_size"], f"model.layers.{config['num_hidden_layers']}."
    tensors = {prefix + "eh_proj.weight": torch.randn(hidden, 2 * hidden) * (2 * hidden) ** -0.5}
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        weight = torch.rand(hidden) * 0.8 + 0.6
        tensors[f"{prefix}{norm}.weight"] = weight * unevenness(weight) if uneven_norms else weight
    if config["model_type"] == "glm4_moe_lite":
        tensors[prefix + "embed_tokens.weight"] = torch.randn(config["vocab_size"], hidden)
        tensors[prefix + "shared_head.head.weight"] = torch.randn(config["vocab_size"], hidden) * hidden**-0.5
    add_shard(folder, "model-mtp.safetensors", {k: v.to(dtype) for k, v in tensors.items()})


def add_shard(folder: Path, file: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Adds (or replaces) tensors of a checkpoint in a shard of their own."""
    index_file = folder / INDEX
    if index_file.exists():
        index = json.loads(index_file.read_text())
    else:
        files = sorted(folder.glob("model*.safetensors"))
        index = {"metadata": {}, "weight_map": {name: f.name for f in files for name, _ in shapes_in(f)}}
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / file, metadata={"format": "pt"})
    added = {n: t for n, t in tensors.items() if n not in index["weight_map"]}
    for key, more in (
        ("total_parameters", lambda t: t.numel()),
        ("total_size", lambda t: t.numel() * t.element_size()),
    ):
        if key in index["metadata"]:
            index["metadata"][key] += sum(more(t) for t in added.values())
    index["weight_map"] |= dict.fromkeys(tensors, file)
    index_file.write_text(json.dumps(index, indent=2))


# Kept in bf16 by GLM-5.2-FP8; all other matrices of a layer are FP8.
NOT_FP8 = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "weights_proj", "eh_proj", "shared_head")


def write_fp8(source: str | Path, packed: str | Path, plain: str | Path) -> None:
    """Rewrites a bf16 checkpoint twice: as e4m3 blocks with float32 scales (as GLM-5.2-FP8 is stored), and as bf16
    holding exactly what those blocks mean. HF itself refuses 576 rows in 5 blocks, so torch's float8 is the oracle.
    """
    read = read_tensors(source)
    stored, meant = {}, {}
    for name in read.names:
        weight = read(name, torch.float32)
        if weight.dim() != 2 or any(part in name for part in NOT_FP8):
            dtype = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
            stored[name] = meant[name] = weight.to(dtype)
            continue
        rows, columns = weight.shape
        grid = (-(-rows // BLOCK), -(-columns // BLOCK))
        padded = torch.zeros(grid[0] * BLOCK, grid[1] * BLOCK)
        padded[:rows, :columns] = weight
        scale = padded.view(grid[0], BLOCK, grid[1], BLOCK).abs().amax((1, 3)).clamp_min(1e-12) / 448
        spread = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
        stored[name] = (weight / spread).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
        meant[name] = (stored[name].float() * spread).to(torch.bfloat16)
    config = json.loads((Path(source) / "config.json").read_text())
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    }
    for folder, tensors, extra in ((packed, stored, {"quantization_config": quantization}), (plain, meant, {})):
        Path(folder).mkdir(parents=True)
        save_file(
            {n: t.contiguous() for n, t in tensors.items()},
            Path(folder) / "model.safetensors",
            metadata={"format": "pt"},
        )
        (Path(folder) / "config.json").write_text(json.dumps(config | extra))
