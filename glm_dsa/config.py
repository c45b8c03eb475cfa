"""HF config.json -> `ModelArgs`: frozen, validated, every contested constant resolved here and nowhere else.

A *convention* is a constant that implementations disagree about. Each is resolved in this order: explicit
override > the build's own key > zai-org's key > default, and carries its source, so that a report can print it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INTERLEAVED = "interleaved"  # pairs (x0, x1), (x2, x3), ...; `traditional=True` in MLX
HALF_SPLIT = "half-split"  # pairs (x0, x_{D/2}), (x1, x_{D/2+1}), ...
LAYOUTS = (INTERLEAVED, HALF_SPLIT)
FULL, SHARED = "full", "shared"
DENSE, SPARSE = "dense", "sparse"


class ConfigError(ValueError):
    """A config that cannot be a GLM-5.x (or 4.7-Flash) model: names the key, its value and what is allowed."""


@dataclass(frozen=True)
class Convention:
    """A contested constant: its `value` and the `source` it came from.

    `contested` is the evidence against the value, if there is any; empty otherwise.
    """

    name: str
    value: Any
    source: str
    contested: str = ""

    def __str__(self) -> str:
        line = f"{self.name} = {self.value} ({self.source})"
        return f"{line}; CONTESTED: {self.contested}" if self.contested else line


# Keys that change nothing in inference, each with the reason why it may be ignored.
IGNORED = {
    "architectures": "the model_type decides",
    "attention_dropout": "training only",
    "auto_map": "no remote code is ever run",
    "bos_token_id": "tokenizer",
    "chunk_size_feed_forward": "HF memory option",
    "dtype": "the tensors decide",
    "eos_token_id": "tokenizer",
    "ep_size": "deployment",
    "head_dim": "redundant, and not the rotary width (64 in GLM-5.1, 192 in GLM-5.2); qk_rope_head_dim is",
    "id2label": "HF default",
    "initializer_range": "training only",
    "is_encoder_decoder": "HF default",
    "keep_shared_indexer": "build note of some converters",
    "label2id": "HF default",
    "layer_types": "HF's cache dispatch; indexer_types decides",
    "max_position_embeddings": "no table depends on it (RoPE is computed for any position)",
    "mlx_lm_version": "build note",
    "model_file": "mlx-lm's own loader option",
    "name_or_path": "HF bookkeeping",
    "_name_or_path": "HF bookkeeping",
    "_attn_implementation": "HF runtime option",
    "output_attentions": "HF runtime option",
    "output_hidden_states": "HF runtime option",
    "output_router_logits": "training only",
    "pad_token_id": "tokenizer",
    "pretraining_tp": "training only",
    "problem_type": "HF default",
    "quantization": "read by the loader",
    "quantization_config": "read by the loader",
    "quantize_activations": "mlx-lm's own loader option",
    "return_dict": "HF runtime option",
    "router_aux_loss_coef": "training only",
    "seq_aux": "training only",
    "aux_loss_alpha": "training only",
    "tokenizer_class": "tokenizer",
    "torch_dtype": "the tensors decide",
    "transformers_version": "HF bookkeeping",
    "transformers_weights": "HF bookkeeping",
    "use_cache": "HF runtime option",
}

# Keys with one admissible value: anything else is another architecture.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "moe_layer_freq": (1,),
    "moe_router_dtype": ("float32", None),
    "partial_rotary_factor": (1.0,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
}

INDEXER_KEYS = (
    "index_topk", "index_n_heads", "index_head_dim", "indexer_types", "index_topk_pattern", "index_topk_freq",
    "index_skip_topk_offset", "indexer_rope_traditional", "indexer_rope_interleave", "indexer_norm_eps",
    "index_share_for_mtp_iteration",
)  # fmt: skip

# What HF assumes where the key is missing (saving a config drops some of them).
DEFAULTS: dict[str, dict[str, Any]] = {
    "glm_moe_dsa": {"first_k_dense_replace": 3, "routed_scaling_factor": 2.5},
    "glm4_moe_lite": {"first_k_dense_replace": 1, "routed_scaling_factor": 1.8},
}

OVERRIDES = (
    "indexer_rope", "indexer_norm_eps", "latent_norm_eps", "indexer_types", "main_rope", "index_topk",
    "mtp_reuses_selection", "mtp_zero_first_embedding",
)  # fmt: skip


@dataclass(frozen=True)
class ModelArgs:
    """Everything the definition needs, in the field's terms. Widths are in elements, eps are added to variances.

    Build it with `from_dict` or `from_file`; the constructor does no checking of its own.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    # multi-head latent attention
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    attention_bias: bool
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    main_rope: str
    latent_norm_eps: float
    # indexer; `indexer_types` is empty where the architecture has none
    index_topk: int
    index_n_heads: int
    index_head_dim: int
    indexer_types: tuple[str, ...]
    indexer_rope: str
    indexer_norm_eps: float
    # feed-forward
    mlp_layer_types: tuple[str, ...]
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    # multi-token prediction
    num_nextn_predict_layers: int
    mtp_reuses_selection: bool
    mtp_zero_first_embedding: bool
    conventions: tuple[Convention, ...]

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def has_indexer(self) -> bool:
        return bool(self.indexer_types)

    @property
    def mtp_owns_embeddings(self) -> bool:
        """GLM-4.7-Flash ships an embedding and a head of its own in its MTP layer; GLM-5.x shares the main ones."""
        return self.model_type == "glm4_moe_lite"

    def runs_indexer(self, layer: int) -> bool:
        """True on full layers; MTP layers (index >= num_hidden_layers) always run their own."""
        return self.has_indexer and (layer >= self.num_hidden_layers or self.indexer_types[layer] == FULL)

    def is_sparse(self, layer: int) -> bool:
        """True where the feed-forward is a mixture of experts; MTP layers always are."""
        return layer >= self.num_hidden_layers or self.mlp_layer_types[layer] == SPARSE

    @classmethod
    def from_file(cls, path: str | Path, **overrides: Any) -> ModelArgs:
        """Reads a config.json, or the one inside a checkpoint folder. Raises `ConfigError`."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        return cls.from_dict(read_json(path), **overrides)

    @classmethod
    def from_dict(cls, params: Mapping[str, Any], **overrides: Any) -> ModelArgs:
        """HF's (or an MLX build's) config keys -> `ModelArgs`.

        `overrides` are named as in `OVERRIDES` and beat every key. Raises `ConfigError` on a key that is neither
        handled nor listed in `IGNORED`, and on an impossible value.
        """
        if not isinstance(params, Mapping):
            raise ConfigError(f"config: {type(params).__name__} where an object of keys and values is due")
        for name in overrides:
            if name not in OVERRIDES:
                raise ConfigError(f"override {name!r} is not known; allowed: {', '.join(OVERRIDES)}")
        overrides = {k: v for k, v in overrides.items() if v is not None}
        read = _Reader(params)
        model_type = read.choice("model_type", tuple(DEFAULTS))
        defaults = DEFAULTS[model_type]
        for key, allowed in FIXED.items():
            read.fixed(key, allowed)

        layers = read.count("num_hidden_layers")
        heads = read.count("num_attention_heads")
        read.equal("num_key_value_heads", heads, "num_attention_heads: MLA has one latent for all heads")
        nope, rope = read.count("qk_nope_head_dim"), read.count("qk_rope_head_dim")
        if rope % 2:
            raise ConfigError(f"qk_rope_head_dim = {rope}: RoPE turns pairs, an even width is due")
        read.equal("qk_head_dim", nope + rope, "qk_nope_head_dim + qk_rope_head_dim")
        theta, scaling = read.rope()
        experts, groups = read.count("n_routed_experts"), read.count("n_group", 1)
        read.equal("num_experts", experts, "n_routed_experts")
        top_groups, top_experts = read.count("topk_group", 1), read.count("num_experts_per_tok")
        if experts % groups or (groups > 1 and experts // groups < 2):
            raise ConfigError(f"n_group = {groups}: must divide n_routed_experts = {experts} into groups of 2 or more")
        if top_groups > groups:
            raise ConfigError(f"topk_group = {top_groups}: at most n_group = {groups}")
        if top_experts > experts // groups * top_groups:
            raise ConfigError(
                f"num_experts_per_tok = {top_experts}: at most the {experts // groups * top_groups} experts "
                f"that n_routed_experts = {experts}, n_group = {groups}, topk_group = {top_groups} leave to choose from"
            )
        rms_norm_eps = read.positive("rms_norm_eps", 1e-5)
        conventions: list[Convention] = []

        def resolve(name: str, keyed: Any, source: str, contested: str = "") -> Any:
            if name in overrides:
                keyed, source, contested = overrides[name], "override", contested and f"{contested}; overridden here"
            conventions.append(Convention(name, keyed, source, contested))
            return keyed

        # -- main attention
        interleave = read.flag("rope_interleave", True)
        main_rope = resolve(
            "main_rope", INTERLEAVED if interleave else HALF_SPLIT, read.source("rope_interleave"),
            "" if interleave else "HF never reads this key for glm_moe_dsa and turns interleaved pairs",
        )  # fmt: skip
        latent_eps = resolve(
            "latent_norm_eps", read.positive("latent_norm_eps", 1e-6), read.source("latent_norm_eps"),
            "" if read.has("latent_norm_eps") or rms_norm_eps == 1e-6 else
            f"HF uses 1e-6; vLLM, SGLang, llama.cpp and the trainer use rms_norm_eps = {rms_norm_eps:g}",
        )  # fmt: skip

        # -- indexer
        types: tuple[str, ...] = ()
        index_topk = index_heads = index_width = 0
        index_rope, index_eps, reuse = HALF_SPLIT, 1e-6, False
        if model_type == "glm_moe_dsa":
            index_topk = read.count("index_topk")
            index_heads, index_width = read.count("index_n_heads"), read.count("index_head_dim")
            if index_width < rope:
                raise ConfigError(
                    f"index_head_dim = {index_width}: must hold the rotary part, qk_rope_head_dim = {rope}"
                )
            index_topk = overrides.get("index_topk", index_topk)
            if "index_topk" in overrides:
                resolve("index_topk", index_topk, "override")
            index_rope = resolve("indexer_rope", *_indexer_rope(read))
            index_eps = resolve(
                "indexer_norm_eps", read.positive("indexer_norm_eps", 1e-6), read.source("indexer_norm_eps")
            )
            types, source, contested = _schedule(read, layers)
            types = tuple(overrides.get("indexer_types", types))
            _check_schedule(types, layers)
            resolve(
                "indexer_schedule",
                describe_schedule(types),
                "override" if "indexer_types" in overrides else source,
                contested,
            )
            reuse = resolve(
                "mtp_reuses_selection", read.flag("index_share_for_mtp_iteration", False),
                read.source("index_share_for_mtp_iteration"),
            )  # fmt: skip
        else:
            for key in INDEXER_KEYS:
                if key in params:
                    raise ConfigError(
                        f"{key}: glm4_moe_lite has no indexer; remove the key, or use model_type glm_moe_dsa"
                    )

        # -- multi-token prediction
        mtp_layers = read.count("num_nextn_predict_layers", 0, least=0)
        if mtp_layers > 1:
            raise ConfigError(
                f"num_nextn_predict_layers = {mtp_layers}: 0 or 1; steps are chained through the one layer"
            )
        conventions.append(Convention("mtp_hidden", "after the shared-head norm", "default"))
        zero_first = resolve(
            "mtp_zero_first_embedding",
            read.flag("mtp_zero_first_embedding", False),
            read.source("mtp_zero_first_embedding"),
        )

        args = cls(
            model_type=model_type,
            vocab_size=read.count("vocab_size"),
            hidden_size=read.count("hidden_size"),
            num_hidden_layers=layers,
            rms_norm_eps=rms_norm_eps,
            tie_word_embeddings=read.flag("tie_word_embeddings", False),
            num_attention_heads=heads,
            q_lora_rank=read.count("q_lora_rank"),
            kv_lora_rank=read.count("kv_lora_rank"),
            qk_nope_head_dim=nope,
            qk_rope_head_dim=rope,
            v_head_dim=read.count("v_head_dim"),
            attention_bias=read.flag("attention_bias", False),
            rope_theta=theta,
            rope_scaling=scaling,
            main_rope=main_rope,
            latent_norm_eps=latent_eps,
            index_topk=index_topk,
            index_n_heads=index_heads,
            index_head_dim=index_width,
            indexer_types=types,
            indexer_rope=index_rope,
            indexer_norm_eps=index_eps,
            mlp_layer_types=_mlp_types(read, layers, defaults["first_k_dense_replace"]),
            intermediate_size=read.count("intermediate_size"),
            moe_intermediate_size=read.count("moe_intermediate_size"),
            n_routed_experts=experts,
            n_shared_experts=read.count("n_shared_experts", 1),
            num_experts_per_tok=top_experts,
            n_group=groups,
            topk_group=top_groups,
            norm_topk_prob=read.flag("norm_topk_prob", True),
            routed_scaling_factor=read.positive("routed_scaling_factor", defaults["routed_scaling_factor"]),
            num_nextn_predict_layers=mtp_layers,
            mtp_reuses_selection=reuse,
            mtp_zero_first_embedding=zero_first,
            conventions=tuple(conventions),
        )
        for name, layout in (("main_rope", main_rope), ("indexer_rope", index_rope)):
            if layout not in LAYOUTS:
                raise ConfigError(f"{name} = {layout!r}: allowed are {', '.join(LAYOUTS)}")
        read.done()
        return args


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `ConfigError` naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_hook=_untag)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; a checkpoint folder or a config.json is due") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {type(value).__name__} where a JSON object is due")
    return value


def _untag(value: dict[str, Any]) -> Any:
    # transformers writes non-finite floats as {"__float__": "Infinity"}
    return float(value["__float__"]) if set(value) == {"__float__"} else value


def describe_schedule(types: tuple[str, ...]) -> str:
    full = [i for i, t in enumerate(types) if t == FULL]
    return "all full" if len(full) == len(types) else f"{len(full)} of {len(types)} full: {', '.join(map(str, full))}"


def _indexer_rope(read: _Reader) -> tuple[str, str, str]:
    traditional, interleave = read.flag("indexer_rope_traditional", None), read.flag("indexer_rope_interleave", None)
    if traditional is None and interleave is None:
        return (
            HALF_SPLIT,
            "default",
            (
                "all published GLM-5.x configs say indexer_rope_interleave = true; without the key this is DeepSeek-V3.2's layout"
            ),
        )
    chosen, key = (
        (traditional, "indexer_rope_traditional")
        if traditional is not None
        else (interleave, "indexer_rope_interleave")
    )
    contested = ""
    if traditional is not None and interleave is not None and traditional != interleave:
        contested = f"indexer_rope_traditional = {traditional} but indexer_rope_interleave = {interleave}"
    elif not chosen:
        contested = (
            "the published GLM-5.x weights are interleaved (GLM-5.2-FP8 on GSM8K 100-shot: 0.36 -> 0.98 with that alone, "
            "ROCm/ATOM 1502)"
        )
    return (INTERLEAVED if chosen else HALF_SPLIT), f"key {key}", contested


def _schedule(read: _Reader, layers: int) -> tuple[tuple[str, ...], str, str]:
    """IndexShare: indexer_types > index_topk_pattern > index_topk_freq + index_skip_topk_offset."""
    found: list[tuple[str, tuple[str, ...]]] = []
    listed = read.raw("indexer_types")
    if listed is not None:
        found.append(("indexer_types", _types("indexer_types", listed)))
    pattern = read.raw("index_topk_pattern")
    if pattern is not None:
        letters = {"F": FULL, "S": SHARED}
        if isinstance(pattern, str):
            if set(pattern) - set(letters):
                raise ConfigError(
                    f"index_topk_pattern = {pattern!r}: only the letters F (full) and S (shared) are allowed"
                )
            pattern = [letters[c] for c in pattern]
        found.append(("index_topk_pattern", _types("index_topk_pattern", pattern)))
    frequency = read.count("index_topk_freq", 1)
    offset = read.count("index_skip_topk_offset", 2, least=0)
    if read.has("index_topk_freq") or read.has("index_skip_topk_offset"):
        by_rule = tuple(FULL if max(i - offset + 1, 0) % frequency == 0 else SHARED for i in range(layers))
        found.append(("index_topk_freq", by_rule))
    if not found:
        return (FULL,) * layers, "default", ""
    key, types = found[0]
    contested = "; ".join(f"{other} says otherwise" for other, theirs in found[1:] if theirs[:layers] != types[:layers])
    if len(types) > layers:  # some builds list the MTP layer too, which is always full
        types = types[:layers]
    return types, f"key {key}", contested


def _types(key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or any(v not in (FULL, SHARED) for v in value):
        raise ConfigError(f"{key} = {value!r}: a list of 'full' and 'shared' is due")
    return tuple(value)


def _check_schedule(types: tuple[str, ...], layers: int) -> None:
    if len(types) != layers:
        raise ConfigError(f"indexer_types: {len(types)} entries for num_hidden_layers = {layers}")
    if types[0] != FULL:
        raise ConfigError(
            "indexer_types: layer 0 is shared, but no full layer below it makes a selection; it must be full"
        )


def _mlp_types(read: _Reader, layers: int, default_dense: int) -> tuple[str, ...]:
    dense = read.count("first_k_dense_replace", default_dense, least=0)
    listed = read.raw("mlp_layer_types")
    if listed is None:
        return tuple(DENSE if i < dense else SPARSE for i in range(layers))
    if not isinstance(listed, (list, tuple)) or any(v not in (DENSE, SPARSE) for v in listed) or len(listed) < layers:
        raise ConfigError(
            f"mlp_layer_types: {layers} entries of 'dense' and 'sparse' are due (num_hidden_layers), got {listed!r}"
        )
    return tuple(listed[:layers])


_MISSING = object()


class _Reader:
    """Typed access to a config, remembering what was read, so that what was not read can be named."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self.params = params
        self.seen: set[str] = set()

    def has(self, key: str) -> bool:
        return self.params.get(key) is not None

    def source(self, key: str) -> str:
        return f"key {key}" if self.has(key) else "default"

    def raw(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        value = self.params.get(key)
        return default if value is None else value

    def required(self, key: str, default: Any, what: str) -> Any:
        value = self.raw(key, default)
        if value is _MISSING:
            raise ConfigError(f"{key} is missing: {what} is due")
        return value

    def count(self, key: str, default: Any = _MISSING, least: int = 1) -> int:
        value = self.required(key, default, "a whole number")
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{key} = {value!r}: a whole number of at least {least} is due")
        return value

    def positive(self, key: str, default: Any = _MISSING) -> float:
        value = self.required(key, default, "a number above 0")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ConfigError(f"{key} = {value!r}: a finite number above 0 is due")
        return float(value)

    def flag(self, key: str, default: Any) -> Any:
        value = self.raw(key, default)
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"{key} = {value!r}: true or false is due")
        return value

    def choice(self, key: str, allowed: tuple[Any, ...]) -> Any:
        value = self.required(key, _MISSING, f"one of {', '.join(map(repr, allowed))}")
        if value not in allowed:
            raise ConfigError(f"{key} = {value!r}: allowed are {', '.join(map(repr, allowed))}")
        return value

    def fixed(self, key: str, allowed: tuple[Any, ...]) -> None:
        if key in self.params and self.raw(key) not in allowed and self.params[key] is not None:
            raise ConfigError(f"{key} = {self.params[key]!r}: this architecture has {allowed[0]!r}")
        self.seen.add(key)

    def equal(self, key: str, due: int, why: str) -> None:
        value = self.raw(key, due)
        if value != due:
            raise ConfigError(f"{key} = {value!r}: must equal {why} = {due}")

    def rope(self) -> tuple[float, dict[str, Any] | None]:
        """theta and scaling, from `rope_parameters` (5.x) or the top level (4.7-Flash)."""
        parameters = self.raw("rope_parameters", {})
        scaling = self.raw("rope_scaling", {})
        for key, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{key} = {value!r}: an object with rope_type (and rope_theta) is due")
        merged = {**scaling, **parameters}
        inner, outer = merged.pop("rope_theta", None), self.raw("rope_theta")
        if inner is not None and outer is not None and inner != outer:
            raise ConfigError(f"rope_theta = {outer!r}, but rope_parameters says {inner!r}: they must agree")
        theta = inner if inner is not None else outer
        if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 1 < theta < math.inf:
            raise ConfigError(
                f"rope_theta = {theta!r} (rope_parameters.rope_theta or top level): a number above 1 is due"
            )
        kind = merged.pop("rope_type", merged.pop("type", "default"))
        merged.pop("type", None)
        if merged.pop("partial_rotary_factor", 1.0) != 1.0:
            raise ConfigError("rope_parameters.partial_rotary_factor: only 1.0; the rotary width is qk_rope_head_dim")
        if kind == "default":
            if merged:
                raise ConfigError(f"rope_parameters: {sorted(merged)} have no meaning for rope_type 'default'")
            return float(theta), None
        needed = {"linear": {"factor"}, "yarn": {"factor", "original_max_position_embeddings"}}
        optional = {"yarn": {"beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"}}
        if kind not in needed:
            raise ConfigError(f"rope_type = {kind!r}: allowed are 'default', 'linear', 'yarn'")
        unknown = set(merged) - needed[kind] - optional.get(kind, set())
        missing = needed[kind] - set(merged)
        if unknown or missing:
            raise ConfigError(f"rope_parameters for {kind!r}: missing {sorted(missing)}, not known {sorted(unknown)}")
        for key, value in merged.items():
            if key != "truncate" and (
                isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf
            ):
                raise ConfigError(f"rope_parameters.{key} = {value!r}: a finite number of at least 0 is due")
        if merged["factor"] < 1:
            raise ConfigError(f"rope_parameters.factor = {merged['factor']!r}: at least 1")
        return float(theta), {"rope_type": kind, **merged}

    def done(self) -> None:
        unknown = sorted(k for k in self.params if k not in self.seen and k not in IGNORED)
        if unknown:
            raise ConfigError(
                f"config key{'s' * (len(unknown) > 1)} {', '.join(map(repr, unknown))}: neither handled nor known to be "
                "harmless; if it changes nothing in inference, list it in glm_dsa/config.py IGNORED"
            )
