"""HF config.json -> `ModelArgs`: frozen, validated, every contested constant resolved here and nowhere else.

A *convention* is a constant that implementations disagree about. Each is resolved in this order: explicit
override > the build's own key > zai-org's key > default, and carries its source, so that a report can print it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config_reader import Reader, is_number, read_json
from .errors import ConfigError

INTERLEAVED = "interleaved"  # pairs (x0, x1), (x2, x3), ...; `traditional=True` in MLX
HALF_SPLIT = "half-split"  # pairs (x0, x_{D/2}), (x1, x_{D/2+1}), ...
FULL, SHARED = "full", "shared"
DENSE, SPARSE = "dense", "sparse"

# What HF assumes where the key is missing (saving a config drops some of them).
DEFAULTS: dict[str, dict[str, Any]] = {
    "glm_moe_dsa": {"first_k_dense_replace": 3, "routed_scaling_factor": 2.5},
    "glm4_moe_lite": {"first_k_dense_replace": 1, "routed_scaling_factor": 1.8},
}
MODEL_TYPES = tuple(DEFAULTS)
HEADS_ALONE = tuple(f"{model_type}_mtp" for model_type in MODEL_TYPES)  # mlx-vlm's drafters

INDEXER_KEYS = (
    "index_topk", "index_n_heads", "index_head_dim", "indexer_types", "index_topk_pattern", "index_topk_freq",
    "index_skip_topk_offset", "indexer_rope_traditional", "indexer_rope_interleave", "indexer_norm_eps",
    "index_share_for_mtp_iteration",
)  # fmt: skip


def _is_layout(value: Any) -> bool:
    return value in (INTERLEAVED, HALF_SPLIT)


def _is_eps(value: Any) -> bool:
    return is_number(value) and 0 < value < 1


# What a caller may override: a check, and what is expected where it fails.
OVERRIDES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "indexer_rope": (_is_layout, f"{INTERLEAVED!r} or {HALF_SPLIT!r}"),
    "main_rope": (_is_layout, f"{INTERLEAVED!r} or {HALF_SPLIT!r}"),
    "indexer_norm_eps": (_is_eps, "a number between 0 and 1"),
    "latent_norm_eps": (_is_eps, "a number between 0 and 1"),
    "indexer_types": (lambda v: isinstance(v, (list, tuple)), "a list of 'full' and 'shared'"),
    "index_topk": (lambda v: isinstance(v, int) and not isinstance(v, bool) and v > 0, "a whole number of at least 1"),
    "mtp_reuses_selection": (lambda v: isinstance(v, bool), "True or False"),
    "mtp_zero_first_embedding": (lambda v: isinstance(v, bool), "True or False"),
}


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
        """True on full layers; the MTP layer (index num_hidden_layers) always runs its own."""
        return self.has_indexer and (layer >= self.num_hidden_layers or self.indexer_types[layer] == FULL)

    def is_sparse(self, layer: int) -> bool:
        """True where the feed-forward is a mixture of experts; the MTP layer's always is."""
        return layer >= self.num_hidden_layers or self.mlp_layer_types[layer] == SPARSE

    @classmethod
    def from_file(cls, path: str | Path, **overrides: Any) -> ModelArgs:
        """Reads a config.json, or the one inside a checkpoint folder. Raises `ConfigError` naming the file."""
        path = Path(path)
        try:
            path = path / "config.json" if path.is_dir() else path
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror or error}") from None
        params = read_json(path)
        try:
            return cls.from_dict(params, **overrides)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, params: Mapping[str, Any], **overrides: Any) -> ModelArgs:
        """HF's (or an MLX build's) config keys -> `ModelArgs`.

        `overrides` are named as in `OVERRIDES` and beat every key; None leaves the key in force. Raises `ConfigError`
        on a key that is neither handled nor listed in `keys.IGNORED`, and on an impossible value.
        """
        read, resolve = Reader(params), _Resolver(overrides)
        if read.raw("model_type") in HEADS_ALONE:
            raise ConfigError(
                f"model_type = {params['model_type']!r}: an MTP head alone, as mlx-vlm splits it off: expected a model; put the "
                "head's model.safetensors beside the model's files as mtp.safetensors"
            )
        model_type = read.choice("model_type", MODEL_TYPES)
        read.fixed()
        layers = read.count("num_hidden_layers", most=256)
        fields = {
            "model_type": model_type,
            "num_hidden_layers": layers,
            "vocab_size": read.count("vocab_size"),
            "hidden_size": read.count("hidden_size"),
            "rms_norm_eps": read.positive("rms_norm_eps", 1e-5),
            "tie_word_embeddings": read.flag("tie_word_embeddings", False),
            **_attention(read, resolve, model_type),
            **_indexer(read, resolve, model_type, layers),
            **_feed_forward(read, DEFAULTS[model_type], layers),
            **_mtp(read, resolve, model_type),
        }
        read.done()
        return cls(**fields, conventions=tuple(resolve.found))


@dataclass
class _Resolver:
    """Puts overrides above keys, and keeps the record of what was resolved to what, and from where."""

    overrides: Mapping[str, Any]
    found: list[Convention] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, value in self.overrides.items():
            if name not in OVERRIDES:
                raise ConfigError(f"override {name!r} is not known; allowed: {', '.join(OVERRIDES)}")
            fits, due = OVERRIDES[name]
            if value is not None and not fits(value):
                raise ConfigError(f"override {name} = {value!r}: expected {due}")

    def overridden(self, name: str) -> bool:
        return self.overrides.get(name) is not None

    def __call__(self, name: str, value: Any, source: str, contested: str = "") -> Any:
        if self.overridden(name):
            value, source = self.overrides[name], "override"
        self.found.append(Convention(name, value, source, contested))
        return value


def _attention(read: Reader, resolve: _Resolver, model_type: str) -> dict[str, Any]:
    heads = read.count("num_attention_heads")
    read.equal("num_key_value_heads", heads, "num_attention_heads: MLA has one latent for all heads")
    nope, rope = read.count("qk_nope_head_dim"), read.count("qk_rope_head_dim")
    if rope % 2:
        raise ConfigError(f"qk_rope_head_dim = {rope}: expected an even width: RoPE turns pairs")
    read.equal("qk_head_dim", nope + rope, "qk_nope_head_dim + qk_rope_head_dim")
    theta, scaling = read.rope()
    interleave = read.flag("rope_interleave", True)
    rms_eps, contested = read.positive("rms_norm_eps", 1e-5), ""
    if not read.has("latent_norm_eps") and rms_eps != 1e-6:
        contested = f"HF uses 1e-6; vLLM, SGLang, llama.cpp and the trainer use rms_norm_eps = {rms_eps:g}"
    return {
        "num_attention_heads": heads,
        "q_lora_rank": read.count("q_lora_rank"),
        "kv_lora_rank": read.count("kv_lora_rank"),
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": read.count("v_head_dim"),
        "attention_bias": read.flag("attention_bias", False),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "main_rope": resolve(
            "main_rope",
            INTERLEAVED if interleave else HALF_SPLIT,
            read.source("rope_interleave"),
            ""
            if interleave or model_type != "glm_moe_dsa"
            else "HF never reads this key here, and turns interleaved pairs",
        ),
        "latent_norm_eps": resolve(
            "latent_norm_eps", read.positive("latent_norm_eps", 1e-6), read.source("latent_norm_eps"), contested
        ),
    }


def _indexer(read: Reader, resolve: _Resolver, model_type: str, layers: int) -> dict[str, Any]:
    if model_type == "glm4_moe_lite":
        for key in INDEXER_KEYS:
            if key in read.params:
                raise ConfigError(f"{key}: glm4_moe_lite has no indexer; remove it, or use model_type glm_moe_dsa")
        return {
            "index_topk": 0, "index_n_heads": 0, "index_head_dim": 0, "indexer_types": (), "indexer_rope": HALF_SPLIT,
            "indexer_norm_eps": 1e-6,
        }  # fmt: skip
    topk = read.count("index_topk")
    if resolve.overridden("index_topk"):  # no convention, but a report must show that it is not the checkpoint's
        topk = resolve("index_topk", topk, "key index_topk")
    width, rotary = read.count("index_head_dim"), read.count("qk_rope_head_dim")
    if width < rotary:
        raise ConfigError(f"index_head_dim = {width}: must hold the rotary part, qk_rope_head_dim = {rotary}")
    rope = resolve("indexer_rope", *_indexer_rope(read))
    eps = resolve("indexer_norm_eps", read.positive("indexer_norm_eps", 1e-6), read.source("indexer_norm_eps"))
    types, source, contested = _schedule(read, layers)
    if resolve.overridden("indexer_types"):
        types, source = _types("indexer_types", resolve.overrides["indexer_types"]), "override"
    if len(types) != layers:
        raise ConfigError(f"indexer_types: {len(types)} entries for num_hidden_layers = {layers}")
    if types[0] != FULL:
        raise ConfigError("indexer_types: layer 0 is shared, but no full layer below it selects; it must be full")
    resolve("indexer_schedule", describe_schedule(types), source, contested)
    return {
        "index_topk": topk, "index_n_heads": read.count("index_n_heads"), "index_head_dim": width, "indexer_types": types,
        "indexer_rope": rope, "indexer_norm_eps": eps,
    }  # fmt: skip


def _indexer_rope(read: Reader) -> tuple[str, str, str]:
    """(layout, source, evidence against it). The published GLM-5.x weights are interleaved; other builds exist."""
    own, published = "indexer_rope_traditional", "indexer_rope_interleave"
    flags = {key: read.flag(key, None) for key in (own, published)}
    said = {key: flag for key, flag in flags.items() if flag is not None}
    if not said:
        return (
            HALF_SPLIT,
            "default",
            f"all published GLM-5.x configs say {published} = true; this is DeepSeek-V3.2's layout",
        )
    key, chosen = next(iter(said.items()))
    contested = ""
    if len(set(said.values())) > 1:
        contested = f"{own} = {flags[own]} but {published} = {flags[published]}"
    elif not chosen:
        contested = (
            "the published weights are interleaved: GLM-5.2-FP8 on GSM8K 0.36 -> 0.98 with that alone (ROCm/ATOM 1502)"
        )
    return (INTERLEAVED if chosen else HALF_SPLIT), f"key {key}", contested


def _schedule(read: Reader, layers: int) -> tuple[tuple[str, ...], str, str]:
    """IndexShare: indexer_types > index_topk_pattern > index_topk_freq + index_skip_topk_offset; all full without."""
    found: dict[str, tuple[str, ...]] = {}
    if (listed := read.raw("indexer_types")) is not None:
        found["indexer_types"] = _types("indexer_types", listed)
    if (pattern := read.raw("index_topk_pattern")) is not None:
        if isinstance(pattern, str):
            letters = {"F": FULL, "S": SHARED}
            if set(pattern) - set(letters):
                raise ConfigError(
                    f"index_topk_pattern = {pattern!r}: only the letters F (full) and S (shared) are allowed"
                )
            pattern = [letters[c] for c in pattern]
        found["index_topk_pattern"] = _types("index_topk_pattern", pattern)
    frequency = read.count("index_topk_freq", 1)
    offset = read.count("index_skip_topk_offset", 2, least=0)
    if read.has("index_topk_freq") or read.has("index_skip_topk_offset"):
        rule = (FULL if max(i - offset + 1, 0) % frequency == 0 else SHARED for i in range(layers))
        found["index_topk_freq"] = tuple(rule)
    if not found:
        return (FULL,) * layers, "default", ""
    # Some builds list the MTP layer too, which is always full.
    found = {key: types[:layers] if types[layers:] == (FULL,) else types for key, types in found.items()}
    (key, types), *others = found.items()
    return types, f"key {key}", "; ".join(f"{other} says otherwise" for other, theirs in others if theirs != types)


def _types(key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or any(v not in (FULL, SHARED) for v in value):
        raise ConfigError(f"{key} = {value!r}: expected a list of 'full' and 'shared'")
    return tuple(value)


def describe_schedule(types: tuple[str, ...]) -> str:
    full = [i for i, t in enumerate(types) if t == FULL]
    return "all full" if len(full) == len(types) else f"{len(full)} of {len(types)} full: {', '.join(map(str, full))}"


def _feed_forward(read: Reader, defaults: Mapping[str, Any], layers: int) -> dict[str, Any]:
    experts, groups = read.count("n_routed_experts", most=1024), read.count("n_group", 1)
    for alias in ("num_experts", "num_local_experts"):  # HF's own names for it
        read.equal(alias, experts, "n_routed_experts")
    top_groups, topk = read.count("topk_group", 1), read.count("num_experts_per_tok")
    if experts % groups or (groups > 1 and experts // groups < 2):
        raise ConfigError(f"n_group = {groups}: must divide n_routed_experts = {experts} into groups of 2 or more")
    if top_groups > groups:
        raise ConfigError(f"topk_group = {top_groups}: at most n_group = {groups}")
    most = experts // groups * top_groups
    if topk > most:
        raise ConfigError(
            f"num_experts_per_tok = {topk}: at most the {most} experts that n_routed_experts = {experts}, "
            f"n_group = {groups}, topk_group = {top_groups} leave to choose from"
        )
    dense = read.count("first_k_dense_replace", defaults["first_k_dense_replace"], least=0)
    types = read.raw("mlp_layer_types", [DENSE if i < dense else SPARSE for i in range(layers)])
    if not isinstance(types, (list, tuple)) or any(t not in (DENSE, SPARSE) for t in types) or len(types) < layers:
        raise ConfigError(f"mlp_layer_types: expected {layers} entries of 'dense' and 'sparse', got {types!r}")
    return {
        "mlp_layer_types": tuple(types[:layers]),
        "intermediate_size": read.count("intermediate_size"),
        "moe_intermediate_size": read.count("moe_intermediate_size"),
        "n_routed_experts": experts,
        "n_shared_experts": read.count("n_shared_experts", 1),
        "num_experts_per_tok": topk,
        "n_group": groups,
        "topk_group": top_groups,
        "norm_topk_prob": read.flag("norm_topk_prob", True),
        "routed_scaling_factor": read.positive("routed_scaling_factor", defaults["routed_scaling_factor"]),
    }


def _mtp(read: Reader, resolve: _Resolver, model_type: str) -> dict[str, Any]:
    layers = read.count("num_nextn_predict_layers", 0, least=0)
    if layers > 1:
        raise ConfigError(f"num_nextn_predict_layers = {layers}: 0 or 1; draft steps are chained through the one layer")
    reuses = False
    if model_type == "glm_moe_dsa":
        key = "index_share_for_mtp_iteration"
        reuses = read.flag(key, False)
        evidence = "engines differ on whether a later draft step sees its own key; here it does not" if reuses else ""
        reuses = resolve("mtp_reuses_selection", reuses, read.source(key), evidence)
    resolve("mtp_hidden", "after the shared-head norm", "default")
    key = "mtp_zero_first_embedding"
    zeroes = read.flag(key, False)
    contested = "vLLM zeroes the embedding at position 0" if layers and not zeroes else ""
    return {
        "num_nextn_predict_layers": layers,
        "mtp_reuses_selection": reuses,
        "mtp_zero_first_embedding": resolve(key, zeroes, read.source(key), contested),
    }
