"""GLM-5.x in NumPy float64, one function per equation: the second oracle, independent of HF and of any speed.

Everything computes in the dtype of the weights. float64 is truth; the same code in float32 shows what float32 explains.

Written from the papers (DeepSeek-V2 for MLA, DeepSeek-V3 for routing and MTP, DeepSeek-V3.2 for the indexer,
arXiv 2603.12201 for IndexShare) and from the published configs. Nothing here calls HF. There is no cache: a cached run
is judged against the uncached truth. Rotary outputs keep the layout of their inputs. One file of over 400 lines, to be read from
top to bottom beside the papers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray
Weights = Callable[[str], Array]  # checkpoint name in HF layout -> float64 (or float32)


@dataclass(frozen=True)
class Conventions:
    """The constants that implementations disagree about, as the oracle is to apply them."""

    indexer_rope: str = "half-split"
    main_rope: str = "interleaved"
    indexer_norm_eps: float = 1e-6
    latent_norm_eps: float = 1e-6
    mtp_reuses_selection: bool = False
    mtp_zero_first_embedding: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Conventions:
        """What a config says: a build's own key before zai-org's, that before the default. For the reference's own programs:
        the gate hands its oracles what the definition resolved, and a test holds both readings equal."""

        def said(key: str, default: Any) -> Any:
            return default if config.get(key) is None else config[key]

        interleaved = said("indexer_rope_traditional", said("indexer_rope_interleave", False))
        return cls(
            indexer_rope="interleaved" if interleaved else "half-split",
            main_rope="interleaved" if said("rope_interleave", True) else "half-split",
            indexer_norm_eps=said("indexer_norm_eps", cls.indexer_norm_eps),
            latent_norm_eps=said("latent_norm_eps", cls.latent_norm_eps),
            mtp_reuses_selection=said("index_share_for_mtp_iteration", False),
            mtp_zero_first_embedding=said("mtp_zero_first_embedding", False),
        )


# -- elementary functions


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return weight * centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + eps) + bias


def sigmoid(x: Array) -> Array:
    return np.where(x >= 0, 1 / (1 + np.exp(-np.abs(x))), np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x))))


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def swiglu(x: Array, gate: Array, up: Array, down: Array) -> Array:
    """W_down (silu(W_gate x) * W_up x)."""
    g = x @ gate.T
    return ((g * sigmoid(g)) * (x @ up.T)) @ down.T


# -- rotary position embedding


def rope_frequencies(config: Mapping[str, Any]) -> tuple[Array, float]:
    """(angle per position of each pair, factor on cos and sin)."""
    parameters = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta: Any = parameters.get("rope_theta", config.get("rope_theta"))
    width = config["qk_rope_head_dim"]
    pairs = np.arange(width // 2)
    plain = theta ** (-2.0 * pairs / width)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return plain, 1.0
    factor = parameters["factor"]
    if kind == "linear":
        return plain / factor, 1.0
    # YaRN: pairs that turn often within the trained length stay, slow ones are stretched, a linear ramp lies between.
    trained: Any = parameters["original_max_position_embeddings"]
    bounds = [
        width * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (parameters.get("beta_fast") or 32, parameters.get("beta_slow") or 1)
    ]
    if parameters.get("truncate", True):
        bounds = [math.floor(bounds[0]), math.ceil(bounds[1])]
    low, high = max(bounds[0], 0), min(bounds[1], width - 1)
    ramp = np.clip((pairs - low) / max(high - low, 0.001), 0, 1)
    magnitude = parameters.get("attention_factor")
    if magnitude is None:
        mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
        both = mscale and all_dim
        magnitude = yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim) if both else yarn_mscale(factor, 1)
    return plain * (1 - ramp) + plain / factor * ramp, magnitude


def yarn_mscale(factor: Any, mscale: Any) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope(x: Array, positions: Array, config: Mapping[str, Any], layout: str) -> Array:
    """Turns pairs of x [B, S, H, D] at positions [B, S]."""
    frequencies, magnitude = rope_frequencies(config)
    angles = (positions[..., None].astype(x.dtype) * frequencies.astype(x.dtype))[:, :, None]  # [B, S, 1, D/2]
    cos, sin = np.cos(angles) * magnitude, np.sin(angles) * magnitude
    out = np.empty_like(x)
    half = x.shape[-1] // 2
    first, second = (
        (slice(0, None, 2), slice(1, None, 2)) if layout == "interleaved" else (slice(0, half), slice(half, None))
    )
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., second] * cos + x[..., first] * sin
    return out


# -- indexer


def indexer_scores(q: Array, k: Array, w: Array, allowed: Array) -> Array:
    """I[t, s] = sum_h w[t, h] relu(q[t, h] . k[s]) / sqrt(D), -inf where not allowed.

    q [B, S, H, D], k [B, T, D], w [B, S, H], allowed [B, S, T] -> [B, S, T]
    """
    per_head = np.maximum(np.einsum("bshd,btd->bsht", q, k, optimize=True) / math.sqrt(q.shape[-1]), 0)
    return np.where(allowed, np.einsum("bsh,bsht->bst", w, per_head, optimize=True), -np.inf)


def select(scores: Array, topk: int) -> Array:
    """The best min(topk, T) keys of each query, [B, S, K]."""
    return np.argsort(-scores, axis=-1, kind="stable")[..., : min(topk, scores.shape[-1])]


def schedule(config: Mapping[str, Any]) -> list[bool]:
    """IndexShare: True for each layer that runs its own indexer."""
    layers = config["num_hidden_layers"]
    if "index_topk" not in config:
        return [False] * layers
    if config.get("indexer_types"):
        return [t == "full" for t in config["indexer_types"]][:layers]
    if config.get("index_topk_pattern"):
        return [t in ("F", "full") for t in config["index_topk_pattern"]][:layers]
    frequency, offset = config.get("index_topk_freq") or 1, config.get("index_skip_topk_offset")
    offset = 2 if offset is None else offset
    return [max(i - offset + 1, 0) % frequency == 0 for i in range(layers)]


# -- routing


def route(logits: Array, bias: Array, config: Mapping[str, Any]) -> Array:
    """Experts chosen for each token, [B, S, k]: top k of sigmoid(logits) + bias, within the best groups."""
    biased = sigmoid(logits) + bias
    groups = config.get("n_group") or 1
    if groups > 1:
        grouped = biased.reshape(*biased.shape[:-1], groups, -1)
        best_two = np.sort(grouped, axis=-1)[..., -2:].sum(-1)
        winners = np.argsort(-best_two, axis=-1, kind="stable")[..., : config["topk_group"]]
        won = np.zeros(best_two.shape, dtype=bool)
        np.put_along_axis(won, winners, True, axis=-1)
        biased = np.where(won[..., None], grouped, -np.inf).reshape(biased.shape)
    return np.argsort(-biased, axis=-1, kind="stable")[..., : config["num_experts_per_tok"]]


def routing_weights(logits: Array, experts: Array, config: Mapping[str, Any]) -> Array:
    """The unbiased scores of the chosen, normalized and scaled, [B, S, k]."""
    chosen = np.take_along_axis(sigmoid(logits), experts, axis=-1)
    if config.get("norm_topk_prob", True):
        chosen = chosen / (chosen.sum(-1, keepdims=True) + 1e-20)
    return chosen * config["routed_scaling_factor"]


def add_expert(
    out: Array, x: Array, experts: Array, weights: Array, expert: int, gate: Array, up: Array, down: Array
) -> None:
    """Adds to `out` [B, S, hidden] what one expert answers to the tokens that chose it, weighted."""
    *token, slot = np.nonzero(experts == expert)
    out[tuple(token)] += weights[(*token, slot)][:, None] * swiglu(x[tuple(token)], gate, up, down)


# -- the model


class Equations:
    """The model as a recorder of stages. `given` puts selections and routings in the place of its own choices, and what a
    cache reads back in the place of its own latents and rotary keys.

    stages: {stage name: array}, its own, spelled as everywhere in the project. given: {stage name: array}.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: Weights,
        conventions: Conventions,
        given: Mapping[str, Array] | None = None,
    ) -> None:
        self.config, self.weights, self.conventions, self.given = config, weights, conventions, given or {}
        self.full = schedule(config)
        self.stages: dict[str, Array] = {}

    def record(self, stage: str, value: Array) -> Array:
        self.stages[stage] = value
        return value

    def choose(self, stage: str, own: Array) -> Array:
        self.stages[stage] = own
        return np.asarray(self.given.get(stage, own))

    def forward(self, tokens: Array, positions: Array | None = None, valid: Array | None = None) -> Array:
        """tokens int [B, S], positions int [B, S], valid bool [B, S] (False on pads) -> logits [B, S, V]."""
        positions = np.broadcast_to(np.arange(tokens.shape[1]) if positions is None else positions, tokens.shape)
        x = self.record("embed", self.weights("model.embed_tokens.weight")[tokens])
        selection = None
        for layer in range(self.config["num_hidden_layers"]):
            x, selection = self.layer(layer, x, positions, causal(tokens.shape, valid), selection)
        hidden = self.record("norm", rms_norm(x, self.weights("model.norm.weight"), self.config["rms_norm_eps"]))
        return self.record("logits", hidden @ self.head().T)

    def head(self) -> Array:
        tied = self.config.get("tie_word_embeddings")
        return self.weights("model.embed_tokens.weight" if tied else "lm_head.weight")

    def layer(
        self,
        layer: int,
        x: Array,
        positions: Array,
        allowed: Array,
        selection: Array | None,
        reuse: Array | None = None,
    ) -> tuple[Array, Array | None]:
        """One decoder layer: x [B, S, hidden], allowed bool [B, S, T], the selection of the layer below."""
        w, stage, eps = self._scoped(layer), f"layers.{layer}", self.config["rms_norm_eps"]
        normed = self.record(f"{stage}.input_layernorm", rms_norm(x, w("input_layernorm.weight"), eps))
        attended, selection = self.attention(layer, normed, positions, allowed, selection, reuse)
        return self.feed(layer, x + attended), selection

    def feed(self, layer: int, x: Array) -> Array:
        """What comes after a layer's attention: x + mlp(norm(x)), [B, S, hidden]."""
        w, stage, eps = self._scoped(layer), f"layers.{layer}", self.config["rms_norm_eps"]
        normed = self.record(
            f"{stage}.post_attention_layernorm", rms_norm(x, w("post_attention_layernorm.weight"), eps)
        )
        is_sparse = layer >= self.config["num_hidden_layers"] or self._mlp_types()[layer] == "sparse"
        fed = self.experts(layer, normed) if is_sparse else swiglu(normed, *self._swiglu(w, "mlp"))
        fed = self.record(f"{stage}.mlp_output", fed)
        return self.record(f"{stage}.output", x + fed)

    def attention(
        self, layer: int, x: Array, positions: Array, allowed: Array, selection: Array | None, reuse: Array | None
    ) -> tuple[Array, Array | None]:
        """q = W_uq norm(W_dq x); c = norm(W_dkv x); k = [W_uk c | rope(W_kr x)]; v = W_uv c; softmax over selected keys."""
        c, conv = self.config, self.conventions
        w, stage = self._scoped(layer, "self_attn."), f"layers.{layer}.self_attn"
        heads, nope, rotary, value = (
            c[k] for k in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        )
        batch, length, _ = x.shape
        q_latent = rms_norm(self._linear(w, "q_a_proj", x), w("q_a_layernorm.weight"), conv.latent_norm_eps)
        q_latent = self.record(f"{stage}.q_latent", q_latent)

        if reuse is not None:
            selection = reuse
        elif "index_topk" in c and (layer >= len(self.full) or self.full[layer]):
            selection = self.selection(layer, x, q_latent, positions, allowed)
        if selection is not None:
            self.record(f"{stage}.selection", selection)
            chosen = np.zeros(allowed.shape, dtype=bool)
            np.put_along_axis(chosen, selection, True, axis=-1)
            allowed = allowed & chosen

        q = (q_latent @ w("q_b_proj.weight").T).reshape(batch, length, heads, nope + rotary)
        q_rope = self.record(f"{stage}.q_rope", rope(q[..., nope:], positions, c, conv.main_rope))
        down = self._linear(w, "kv_a_proj_with_mqa", x)
        latent = rms_norm(down[..., : c["kv_lora_rank"]], w("kv_a_layernorm.weight"), conv.latent_norm_eps)
        latent = self.choose(f"{stage}.kv_latent", latent)
        k_rope = rope(down[:, :, None, c["kv_lora_rank"] :], positions, c, conv.main_rope)[:, :, 0]
        k_rope = self.choose(f"{stage}.k_rope", k_rope)

        kv = (latent @ w("kv_b_proj.weight").T).reshape(batch, -1, heads, nope + value)
        scores = np.einsum("bshd,bthd->bhst", q[..., :nope], kv[..., :nope], optimize=True)
        scores += np.einsum("bshd,btd->bhst", q_rope, k_rope, optimize=True)
        scores *= self._softmax_scale()
        # A padded row sees nothing: it attends evenly, to whatever; nobody reads it.
        scores = np.where(allowed[:, None], scores, -np.finfo(scores.dtype).max)
        out = np.einsum("bhst,bthd->bshd", self.attend(scores), kv[..., nope:], optimize=True)
        out = out.reshape(batch, length, -1)
        out = self.record(f"{stage}.heads", out)
        return self.record(f"{stage}.output", self._linear(w, "o_proj", out)), selection

    def attend(self, scores: Array) -> Array:
        """scores [B, H, S, T] -> attention, rows that sum to 1."""
        return softmax(scores)

    def selection(self, layer: int, x: Array, q_latent: Array, positions: Array, allowed: Array) -> Array:
        """What the indexer of a full layer chooses."""
        scores = self.scores(layer, x, q_latent, positions, allowed)
        return self.choose(f"layers.{layer}.self_attn.indexer.topk", select(scores, self.config["index_topk"]))

    def scores(
        self, layer: int, x: Array, q_latent: Array, positions: Array, allowed: Array, rows: slice = slice(None)
    ) -> Array:
        """The indexer of a full layer: x [B, T, hidden] after the norm, q_latent [B, S, Q] -> [B, S, T]. rows: which of the T
        tokens ask (all of them: S = T)."""
        c, conv = self.config, self.conventions
        w, stage = self._scoped(layer, "self_attn.indexer."), f"layers.{layer}.self_attn.indexer"
        heads, width, rotary = c["index_n_heads"], c["index_head_dim"], c["qk_rope_head_dim"]

        def rotate_first(z: Array, at: Array) -> Array:
            return np.concatenate([rope(z[..., :rotary], at, c, conv.indexer_rope), z[..., rotary:]], axis=-1)

        q = (q_latent @ w("wq_b.weight").T).reshape(*q_latent.shape[:2], heads, width)
        q = self.record(f"{stage}.q", rotate_first(q, positions[:, rows]))
        k = layer_norm(x @ w("wk.weight").T, w("k_norm.weight"), w("k_norm.bias"), conv.indexer_norm_eps)
        k = self.choose(f"{stage}.k", rotate_first(k[:, :, None], positions)[:, :, 0])
        weights = self.record(f"{stage}.weights", (x[:, rows] @ w("weights_proj.weight").T) / math.sqrt(heads))
        return self.record(f"{stage}.scores", indexer_scores(q, k, weights, allowed))

    def experts(self, layer: int, x: Array) -> Array:
        """Sum of the chosen experts, weighted, plus the shared one."""
        w, stage = self._scoped(layer, "mlp."), f"layers.{layer}.mlp"
        logits = self.record(f"{stage}.gate.logits", x @ w("gate.weight").T)
        own = route(logits, w("gate.e_score_correction_bias"), self.config)
        experts = self.choose(f"{stage}.gate.topk", own)
        weights = self.record(f"{stage}.gate.weights", routing_weights(logits, experts, self.config))
        out = self.record(f"{stage}.experts", self.routed(layer, x, experts, weights))
        shared = self.record(f"{stage}.shared_experts", swiglu(x, *self._swiglu(w, "shared_experts")))
        return self.record(f"{stage}.output", out + shared)

    def routed(self, layer: int, x: Array, experts: Array, weights: Array) -> Array:
        """Sum of what the chosen experts answer, weighted. x [B, S, hidden], experts and weights [B, S, k]."""
        w, out = self._scoped(layer, "mlp."), np.zeros_like(x)
        for expert in np.unique(experts):
            add_expert(out, x, experts, weights, expert, *self._swiglu(w, f"experts.{expert}"))
        return out

    # -- multi-token prediction

    def draft(
        self, hidden: Array, tokens: list[Array], steps: int, choices: Sequence[Mapping[str, Array]] = ()
    ) -> list[tuple[Array, Array]]:
        """Chained draft steps: [(logits, hidden)] of each.

        hidden [B, S, hidden] after the main model's final norm; tokens[0] int [B, S] the next token of each; tokens[i]
        int [B, 1] what step i is fed. A later step appends one position, and attends to the keys of all steps so far,
        or (mtp_reuses_selection) to the first step's selection for the last token, as it stands. choices: of each step,
        selections and routings of its new tokens, in the place of its own.
        """
        layer = self.config["num_hidden_layers"]
        w = self._scoped(layer)
        embed = (
            w("embed_tokens.weight")
            if self.config["model_type"] == "glm4_moe_lite"
            else self.weights("model.embed_tokens.weight")
        )
        head = w("shared_head.head.weight") if self.config["model_type"] == "glm4_moe_lite" else self.head()
        first = hidden.shape[1]
        inputs, reuse, out = np.zeros((*hidden.shape[:1], 0, hidden.shape[2]), hidden.dtype), None, []
        for step in range(steps):
            embedded = embed[tokens[step]]
            self.given = {**self.given, **stacked(choices[: step + 1])}
            if self.conventions.mtp_zero_first_embedding and step == 0:
                embedded = embedded.copy()
                embedded[:, 0] = 0
            eps = self.config["rms_norm_eps"]
            joined = np.concatenate(
                [rms_norm(embedded, w("enorm.weight"), eps), rms_norm(hidden, w("hnorm.weight"), eps)], -1
            )
            inputs = np.concatenate([inputs, joined @ w("eh_proj.weight").T], axis=1)
            shape = inputs.shape[:2]
            positions = np.broadcast_to(np.arange(shape[1]), shape)
            chosen = None
            if reuse is not None:  # earlier rows keep what they selected; the new row takes the last one's
                chosen = np.concatenate([reuse, reuse[:, -1:]], axis=1)
            x, selection = self.layer(layer, inputs, positions, causal(shape, None), None, chosen)
            if self.conventions.mtp_reuses_selection:
                reuse = selection
            normed = rms_norm(x, w("shared_head.norm.weight"), eps)
            hidden = normed[:, -(first if step == 0 else 1) :]
            out.append((hidden @ head.T, hidden))
            hidden = hidden[:, -1:]
        return out

    # -- names

    def _scoped(self, layer: int, part: str = "") -> Weights:
        return lambda name: self.weights(f"model.layers.{layer}.{part}{name}")

    def _linear(self, w: Weights, name: str, x: Array) -> Array:
        out = x @ w(f"{name}.weight").T
        return out + w(f"{name}.bias") if self.config.get("attention_bias") else out

    def _swiglu(self, w: Weights, prefix: str) -> tuple[Array, Array, Array]:
        return w(f"{prefix}.gate_proj.weight"), w(f"{prefix}.up_proj.weight"), w(f"{prefix}.down_proj.weight")

    def _mlp_types(self) -> list[str]:
        dense = self.config.get("first_k_dense_replace", 3)
        return self.config.get("mlp_layer_types") or ["dense" if i < dense else "sparse" for i in range(len(self.full))]

    def _softmax_scale(self) -> float:
        scale = 1 / math.sqrt(self.config["qk_nope_head_dim"] + self.config["qk_rope_head_dim"])
        parameters = {**(self.config.get("rope_scaling") or {}), **(self.config.get("rope_parameters") or {})}
        all_dim = parameters.get("mscale_all_dim")
        return scale * yarn_mscale(parameters["factor"], all_dim) ** 2 if all_dim else scale


def stacked(choices: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Choices [B, n, K] of successive tokens, one behind the other. K may grow: a key that is named twice is one key."""
    out: dict[str, Array] = {}
    for stage in choices[0] if choices else ():
        parts = [step[stage] for step in choices if stage in step]
        width = max(part.shape[-1] for part in parts)
        filled = [np.pad(part, ((0, 0), (0, 0), (0, width - part.shape[-1])), mode="edge") for part in parts]
        out[stage] = np.concatenate(filled, axis=1)
    return out


def causal(shape: tuple[int, ...], valid: Array | None) -> Array:
    """allowed[b, t, s]: s <= t, and s is no pad. bool [B, S, S]."""
    batch, length = shape[:2]
    allowed = np.tril(np.ones((length, length), dtype=bool))[None].repeat(batch, axis=0)
    return allowed if valid is None else allowed & valid[:, None, :]
