"""The catalogue of faults: mistakes that were shipped, or that could be, each a small change to our running definition.

    with faults.seeded("indexer-no-relu"): ...        pytest verify/ --fault indexer-no-relu

Each says beforehand where the gate must notice it: the claim, and the first stage that differs. The declarations are written
before the gate first meets the fault; where one had to be corrected afterwards, `corrected` says from what.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches

from .edits import Edit, edited

# claims, as the gate's files name them
ATTENTION, BEHAVIOUR = "attention under an injected selection", "a trained model's behaviour"
CACHES, OPERATIONS = "caches: chunks, decode, rewind, padding", "cache operations, any sequence"
CONFIG, INDEXER, LAYERS = "config and schedules", "indexer scores and selections", "each layer on the reference's input"
LOGITS, INT8, MTP = "final logits", "int8 latent cache", "MTP, chained draft steps"
ROPE, ROUTER, SIZES, WEIGHTS = "rope, both layouts", "router and experts", "sizes in use", "weights and formats"

ALWAYS, SPARSE, CACHED = "always", "T > index_topk", "from the second call on"
OWN = "this catalogue"


@dataclass(frozen=True)
class Fault:
    """stage: how the first differing stage begins, without its layer. shows: on what input. origin: who shipped it.

    equivalent: the proof that no output can change, if so; then `stage` is where it is seen all the same, "" for nowhere.
    """

    name: str
    component: str
    what: str
    edits: tuple[Edit, ...]
    claim: str
    stage: str
    shows: str = ALWAYS
    origin: str = OWN
    equivalent: str = ""
    corrected: str = ""


@contextmanager
def seeded(*names: str) -> Iterator[None]:
    """The definition with these faults, each once, until the block ends; build models inside it. Raises LookupError on
    unknown names."""
    with edited(edit for name in dict.fromkeys(names) for edit in named(name).edits):
        yield


def named(name: str) -> Fault:
    if name not in CATALOGUE:
        near = ", ".join(get_close_matches(name, CATALOGUE, cutoff=0.75))
        raise LookupError(f"no fault is named {name!r}{near and f' ({near}?)'}; `python -m verify faults` lists them")
    return CATALOGUE[name]


def chosen(names: str | None) -> list[str]:
    """Of a list separated by commas, or all. Raises LookupError on unknown names."""
    return list(CATALOGUE) if names is None else [named(name.strip()).name for name in names.split(",")]


def digest(fault: Fault) -> str:
    """Of what it changes: a verdict on other changes under the same name is none on these."""
    return hashlib.sha256(repr(fault.edits).encode()).hexdigest()[:12]


def listed() -> str:
    """A line for each fault."""
    width = max(map(len, CATALOGUE))
    return "\n".join(f"{f.name.ljust(width)}  {f.component}: {f.what}" for f in CATALOGUE.values())


def described(name: str) -> str:
    """All that the catalogue says of one."""
    f = named(name)
    seen = f"{f.stage}, in the claim {f.claim!r}" if f.stage else "nowhere"
    lines = [f"{f.name}  ({f.component})", f.what, f"shows: {f.shows}", f"met first at: {seen}", f"origin: {f.origin}"]
    lines += [f"equivalent: {f.equivalent}"] if f.equivalent else []
    lines += [f"declared otherwise at first: {f.corrected}"] if f.corrected else []
    return "\n".join([*lines, *(f"  {edit}" for edit in f.edits)])


# Each of these was in our definition once, seeded, while every claim agreed.
ONCE_PASSED = frozenset((
    "experts-unordered-from-8192-pairs", "own-chunk-unseen-from-513-queries", "gather-columns-in-16-bit",
    "growth-beyond-16k-loses-a-token", "tiles-forget-at-64-index-topk", "token-ids-in-16-bit",
    "router-logits-in-the-models-dtype", "indexer-scores-in-the-models-dtype", "head-weights-in-the-models-dtype",
    "topk-bucket-overflow", "topk-bucket-overflow-at-8", "topk-bucket-overflow-at-31", "router-weights-from-biased",
))  # fmt: skip
# fmt: off


def _indexer() -> Iterator[Fault]:
    init, score, best = "indexer.Indexer.__init__", "indexer.Indexer.score", "indexer.Indexer.best"
    keys, weights = "indexer.Indexer.keys_so_far", "indexer.Indexer.head_weights"
    layer = "block.DecoderLayer.__call__"
    masked = "scores if mask is None else mx.where(mask, scores, -mx.inf)"

    def fault(name: str, what: str, *edits: Edit, stage: str, claim: str = INDEXER, shows: str = SPARSE, **more: str):
        return Fault(name, "indexer", what, edits, claim, f"self_attn.indexer.{stage}", shows, **more)

    yield fault("indexer-rope-layout", "half-split where interleaved is due, or the reverse",
                Edit(init, "args.indexer_rope,", "{'interleaved': 'half-split'}.get(args.indexer_rope, 'interleaved'),"),
                stage="k", origin="transformers 46842, sglang 13495, vllm 28968, mlx-lm 1431")
    yield fault("indexer-nope-first", "rotates the last dims of a head instead of the first",
                Edit("indexer.Indexer._rotate_first", "turned, rest = mx.split(x, [self.rotary], axis=-1)",
                     "rest, turned = mx.split(x, [x.shape[-1] - self.rotary], axis=-1)"),
                Edit("indexer.Indexer._rotate_first", "[rotate(turned, rotation, self.layout), rest]",
                     "[rest, rotate(turned, rotation, self.layout)]"), stage="k",
                origin="the trainer's layout, swapped on export")
    yield fault("indexer-without-rope", "neither queries nor keys are rotated",
                Edit("indexer.Indexer._rotate_first", "rotate(turned, rotation, self.layout)", "turned"), stage="k")
    yield fault("indexer-keys-unrotated", "keys are cached before RoPE",
                Edit(keys, "self._rotate_first(k, rotation)[:, :, 0]", "k[:, :, 0]"), stage="k")
    yield fault("indexer-eps", "LayerNorm eps 1e-5 instead of 1e-6", Edit(init, "eps=args.indexer_norm_eps", "eps=1e-5"),
                stage="k", shows="keys of small variance", origin="mlx-lm 1419, stock today")
    yield fault("indexer-rmsnorm", "RMSNorm where LayerNorm is due",
                Edit(keys, "self.k_norm(self.wk(x))",
                     "(mx.fast.rms_norm(self.wk(x), self.k_norm.weight, self.k_norm.eps) + self.k_norm.bias)"), stage="k",
                origin="transformers 43912, FastDeploy 7398")
    yield fault("indexer-norm-without-bias", "k_norm's bias is not loaded",
                Edit(keys, "self.k_norm(self.wk(x))", "(self.k_norm(self.wk(x)) - self.k_norm.bias)"), stage="k")
    yield fault("indexer-reads-raw-hidden", "keys are made before input_layernorm",
                Edit(layer, "keys_so_far(normed,", "keys_so_far(x,"), stage="k", claim=LAYERS)
    yield fault("indexer-weighs-raw-hidden", "head weights are made before input_layernorm",
                Edit(layer, "self.self_attn.indexer(normed,", "self.self_attn.indexer(x,"), stage="weights", claim=LAYERS)
    yield fault("indexer-query-before-norm", "queries are made of the latent before its norm",
                Edit(layer, "self.self_attn.indexer(normed, q_latent,",
                     "self.self_attn.indexer(normed, self.self_attn.q_a_proj(normed),"), stage="q", claim=LAYERS)
    yield fault("indexer-heads-transposed", "wq_b's rows are read as [width, heads]",
                Edit("indexer.Indexer.project_queries", "self.heads, self.width)", "self.width, self.heads).swapaxes(2, 3)"),
                stage="q")
    yield fault("indexer-weights-positive", "the magnitude of a head's weight counts, not its sign",
                Edit(weights, "self.weights_proj(x.astype(mx.float32))", "mx.abs(self.weights_proj(x.astype(mx.float32)))"),
                stage="weights")
    yield fault("indexer-weights-softmax", "head weights go through a softmax",
                Edit(weights, "self.weights_proj(x.astype(mx.float32)) * self.heads**-0.5",
                     "mx.softmax(self.weights_proj(x.astype(mx.float32)), axis=-1)"), stage="weights")
    yield fault("indexer-weights-in-bf16", "head weights in the model's 16 bit, not in float32",
                Edit(weights, "self.weights_proj(x.astype(mx.float32))",
                     "self.weights_proj(x).astype(mx.bfloat16).astype(mx.float32)"), stage="weights", shows="near ties")
    yield fault("indexer-no-relu", "score without the ReLU", Edit(score, "mx.maximum(per_head, 0)", "per_head"), stage="scores",
                origin="transformers 44360")
    yield fault("indexer-relu-after-sum", "ReLU on the sum over heads, not on each head",
                Edit(score, "mx.maximum(per_head, 0)", "per_head"),
                Edit(score, "(w[:, :, None] @ per_head)[:, :, 0]", "mx.maximum((w[:, :, None] @ per_head)[:, :, 0], 0)"),
                stage="scores")
    yield fault("indexer-per-head-topk", "no sum over heads: one head selects for all",
                Edit(score, "(w[:, :, None] @ per_head)[:, :, 0]", "w[:, :, :1] * per_head[:, :, 0]"), stage="scores",
                origin="mlx-lm 531")
    yield fault("indexer-unweighted", "heads are summed without their weights",
                Edit(score, "(w[:, :, None] @ per_head)[:, :, 0]", "per_head.sum(axis=2)"), stage="scores")
    yield fault("indexer-queries-in-bf16", "scores in 16 bit",
                Edit(score, "q = q.astype(mx.float32)", "q = q.astype(mx.bfloat16).astype(mx.float32)"), stage="scores",
                shows="near ties")
    yield fault("indexer-selects-padding", "a masked key scores 0, which beats a negative score",
                Edit(score, masked, "scores if mask is None else mx.where(mask, scores, 0.0)"), stage="scores",
                shows="early or padded rows", origin="pypto-lib 368")
    yield fault("indexer-ignores-mask", "keys of the future and pads are scored too", Edit(score, masked, "scores"),
                stage="scores")
    yield Fault("bool-mask-added", "mask", "a boolean mask is added to the scores",
                (Edit(score, masked, "scores if mask is None else scores + mask"),), INDEXER, "self_attn.indexer.scores",
                "padded or chunked prefill", "transformers 48363")
    yield fault("indexer-topk-off-by-one", "selects index_topk - 1 keys",
                Edit(best, "rest = every.shape[-1] - self.topk", "rest = every.shape[-1] - self.topk + 1"),
                stage="topk")
    yield fault("indexer-selects-worst", "the lowest scores are selected",
                Edit("indexer.ranks", "(scores + 0.0)", "(0.0 - scores)"), stage="topk")
    yield fault("indexer-selects-recent", "the most recent keys, as a sliding window has them",
                Edit("indexer.ranks", "(scores + 0.0)",
                     "mx.where(mx.isinf(scores), scores, mx.arange(columns.start, columns.stop))"), stage="topk")
    yield fault("indexer-dense-up-to-twice-topk", "selection begins at 2 index_topk only",
                Edit("indexer.Indexer.__call__", "keys.shape[1] <= self.topk", "keys.shape[1] <= 2 * self.topk"), stage="topk",
                shows="index_topk < T <= 2 index_topk")
    yield fault("indexer-blocks-share-a-mask", "each block of queries is masked as the last one",
                Edit("indexer.Indexer.select_tiled", "mask.tile(rows, columns)",
                     "mask.tile(range(length - len(rows), length), columns)"),
                stage="topk", shows="prompts in blocks")
    yield fault("indexer-tiles-forget", "each tile of keys that is wide enough drops the best of those before it",
                Edit("indexer.Indexer.select_tiled", "[*best, ranks(scores, columns)]",
                     "[ranks(scores, columns)] if len(columns) >= self.topk else [*best, ranks(scores, columns)]"),
                stage="topk", shows="contexts in tiles")
    yield fault("indexer-tiles-count-from-zero", "each tile of keys counts its columns from 0",
                Edit("indexer.Indexer.select_tiled", "ranks(scores, columns)", "ranks(scores, range(len(columns)))"),
                stage="topk", shows="contexts in tiles")
    yield Fault("indexer-caches-zeros", "cache", "stores zeros instead of indexer keys",
                (Edit("cache.LayerCache.append_index_keys", "self.index_keys.append(keys)",
                      "before = self.index_keys.length; self.index_keys.append(mx.zeros_like(keys))"),
                 Edit("cache.LayerCache.append_index_keys", "return self.index_keys.read()[0]",
                      "return mx.concatenate([self.index_keys.read()[0][:, :before], keys], axis=1)")),
                CACHES, "self_attn.indexer.topk", "decode beyond index_topk", "mlx-lm 664",
                corrected="logits; since then a chunked run that differs is asked once more, choice by choice")


def _index_share() -> Iterator[Fault]:
    layer = "block.DecoderLayer.__call__"
    yield Fault("indexer-on-shared-layers", "IndexShare", "every layer builds and runs an indexer",
                (Edit("config.ModelArgs.runs_indexer", "self.indexer_types[layer] == FULL", "True"),), CONFIG, "indexer schedule",
                "load, or T > index_topk", "mlx-lm 1418, exo 2208, omlx 2020")
    yield Fault("shared-layer-goes-dense", "IndexShare", "a shared layer attends to everything",
                (Edit(layer, "mask, cache, selection)", "mask, cache, selection if self.runs_indexer else None)"),), LAYERS,
                "self_attn.selection", SPARSE, "ROCm/ATOM 1379")
    yield Fault("shared-from-wrong-layer", "IndexShare", "a full layer hands on what it was handed, not what it selected",
                (Edit("model.Backbone.__call__", "x, selection = layer(x, rotation, mask, layer_cache, selection)",
                     "x, own = layer(x, rotation, mask, layer_cache, selection); "
                     "selection = own if selection is None else selection"),), LOGITS, "self_attn.selection", SPARSE)
    yield Fault("schedule-offset-ignored", "IndexShare", "full layers are 0, freq, 2 freq, whatever the offset",
                (Edit("config._schedule", "max(i - offset + 1, 0) % frequency", "i % frequency"),), CONFIG, "indexer schedule",
                SPARSE, "transformers 5.6-5.10",
                corrected="a checkpoint that does not load came first, until schedules by rule alone were tried")


def _rope() -> Iterator[Fault]:
    init, call = "rope.RotaryEmbedding.__init__", "rope.RotaryEmbedding.__call__"

    def fault(
        name: str, what: str, *edits: Edit, stage: str = "position", claim: str = ROPE, shows: str = ALWAYS, **more: str
    ):
        return Fault(name, "rope", what, edits, claim, stage, shows, **more)

    yield fault("rope-theta-default", "theta not read from rope_parameters", Edit(init, "args.rope_theta", "10000.0"),
                origin="sglang-jax 1384")
    yield fault("rope-dim-from-head-dim", "frequencies spread over head_dim, not over the rotary width",
                Edit(init, "rope_frequencies(args.qk_rope_head_dim,", "rope_frequencies(args.qk_head_dim,"),
                Edit(init, "mx.array(frequencies,", "mx.array(frequencies[: args.qk_rope_head_dim // 2],"),
                shows="GLM-5.2 configs", origin="transformers 5.4-5.9")
    yield fault("rope-backwards", "turns by minus the angle, queries and keys alike",
                Edit(call, "mx.sin(angles) * self.magnitude", "-mx.sin(angles) * self.magnitude"))
    yield fault("rope-positions-in-bf16", "positions in 16 bit before they meet the frequencies",
                Edit(call, "positions.astype(mx.float32)", "positions.astype(mx.bfloat16).astype(mx.float32)"), shows="T > 256")
    yield fault("rope-angles-in-fp16", "angles in half precision",
                Edit(call, "* self.frequencies", "* self.frequencies.astype(mx.float16).astype(mx.float32)"),
                shows="far positions")
    yield fault("rope-frequencies-of-half-the-width", "exponent -i / D in the place of -2 i / D",
                Edit("rope.rope_frequencies", "-2 * i / width", "-i / width"))
    yield fault("yarn-ramp-reversed", "fast pairs are stretched and slow ones kept",
                Edit("rope.rope_frequencies", "p * (1 - r) + s * r", "s * (1 - r) + p * r"), stage="frequencies", shows="YaRN")
    yield fault("yarn-magnitude-forgotten", "cos and sin without YaRN's factor",
                Edit(call, "mx.cos(angles) * self.magnitude, mx.sin(angles) * self.magnitude", "mx.cos(angles), mx.sin(angles)" ),
                stage="magnitude", shows="YaRN")
    yield fault("yarn-scale-forgotten", "softmax scale without mscale squared",
                Edit("rope.softmax_scale", "if args.rope_scaling and all_dim else scale", "if False else scale"),
                stage="softmax scale", shows="YaRN")
    yield fault("yarn-scale-not-squared", "softmax scale with mscale once",
                Edit("rope.softmax_scale", "all_dim) ** 2", "all_dim)"), stage="softmax scale", shows="YaRN")
    yield fault("rope-offset-after-cache", "position restarts at 0 with each call",
                Edit("model.positions", "offset: Any = cache.offset", "offset: Any = cache.start"), claim=ATTENTION,
                stage="self_attn.q_rope", shows="chunked prefill, decode", origin="several")


def _attention() -> Iterator[Fault]:
    init, call = "attention.MultiHeadLatentAttention.__init__", "attention.MultiHeadLatentAttention.__call__"
    absorbed, gathered = (f"attention.MultiHeadLatentAttention.attend_{form}" for form in ("absorbed", "gathered"))

    def fault(name: str, what: str, *edits: Edit, stage: str, claim: str = ATTENTION, shows: str = ALWAYS, **more: str):
        return Fault(name, "MLA", what, edits, claim, f"self_attn.{stage}", shows, **more)

    yield fault("latent-eps", "the query latent's eps is rms_norm_eps",
                Edit(init, "self.q_a_layernorm = nn.RMSNorm(args.q_lora_rank, eps=args.latent_norm_eps)",
                     "self.q_a_layernorm = nn.RMSNorm(args.q_lora_rank, eps=args.rms_norm_eps)"), stage="q_latent",
                shows="always, slightly", origin="transformers 48762, vllm 35515")
    yield fault("kv-latent-eps", "the KV latent's eps is rms_norm_eps",
                Edit(init, "self.kv_a_layernorm = nn.RMSNorm(self.latent, eps=args.latent_norm_eps)",
                     "self.kv_a_layernorm = nn.RMSNorm(self.latent, eps=args.rms_norm_eps)"), stage="kv_latent",
                shows="always, slightly", origin="transformers 48762, vllm 35515")
    yield fault("kv-latent-unnormed", "the cache keeps the latent before its norm, and nobody norms it later",
                Edit(call, "self.kv_a_layernorm(latent))", "latent)"), stage="kv_latent")
    yield fault("kv-split-swapped", "rotary key first, latent after it",
                Edit(call, "latent, k_rope = mx.split(self.kv_a_proj_with_mqa(x), [self.latent], axis=-1)",
                     "k_rope, latent = mx.split(self.kv_a_proj_with_mqa(x), [self.rope], axis=-1)"), stage="kv_latent")
    yield fault("mla-rope-half", "main RoPE half-split", Edit(init, "args.main_rope,", "'half-split',"), stage="q_rope",
                origin="transformers 5.2-5.10")
    yield fault("q-split-swapped", "a head's rotary part first",
                Edit(call, "q_nope, q_rope = mx.split(q, [self.nope], axis=-1)",
                     "q_rope, q_nope = mx.split(q, [self.rope], axis=-1)"), stage="q_rope")
    yield fault("q-heads-transposed", "q_b_proj's rows are read as [width, heads]",
                Edit(call, "(batch, length, self.heads, self.nope + self.rope)",
                     "(batch, length, self.nope + self.rope, self.heads).swapaxes(2, 3)"), stage="q_rope")
    yield fault("k-rope-unrotated", "the rotary key is cached before RoPE",
                Edit(call, "rotate(k_rope[:, :, None], rotation, self.layout)[:, :, 0]", "k_rope"), stage="k_rope")
    yield fault("softmax-scale-of-nope", "1 / sqrt(qk_nope_head_dim)",
                Edit("rope.softmax_scale", "args.qk_head_dim**-0.5", "args.qk_nope_head_dim**-0.5"), stage="heads")
    yield fault("absorbed-scale-of-latent", "the absorbed form scales by the width of what it multiplies",
                Edit(absorbed, "(queries * self.scale)", "(queries * (self.latent + self.rope) ** -0.5)"), stage="heads",
                shows="few queries")
    yield fault("gathered-unscaled", "the gathered form does not scale",
                Edit(gathered, "(queries[:, part] * self.scale)", "queries[:, part]"), stage="heads",
                shows="decode beyond index_topk")
    yield fault("absorbed-value-from-the-end", "the value is the last R of [latent | rotary key]",
                Edit(absorbed, "[..., : self.latent]", "[..., self.rope :]"), stage="heads", shows="few queries")
    yield fault("heads-transposed", "heads are joined before they are moved behind the tokens",
                Edit(call, "heads.swapaxes(1, 2).reshape(batch, length, -1)", "heads.reshape(batch, length, -1)"), stage="heads")
    yield fault("latent-in-bf16", "the expanded form rebuilds keys and values from a latent in 16 bit",
                Edit("attention.MultiHeadLatentAttention.attend_expanded", "tokens.read()[:, None]",
                     "tokens.read()[:, None].astype(mx.bfloat16).astype(q_nope.dtype)"), stage="heads", shows="prefill, slightly")
    yield fault("one-rows-selection-for-all", "every row of a batch attends by the first row's selection",
                Edit("attention.selection_mask", "selection, mx.array(True)",
                     "mx.broadcast_to(selection[:1], selection.shape), mx.array(True)"), stage="heads",
                shows="batches beyond index_topk")
    yield fault("selection-beats-mask", "a selected key is attended to though it is masked",
                Edit("attention.selection_mask", "chosen if mask is None else chosen & mask", "chosen"), stage="heads",
                shows="early rows beyond index_topk")
    yield Fault("topk-unmasked-decode", "mask", "sparse decode drops the padding mask",
                (Edit(gathered, "if allowed is not None:", "if allowed is not None and length > 1:"),), CACHES, "logits",
                "left-padded batch beyond index_topk", "mlx-lm 885")
    yield Fault("mask-one-too-far", "mask", "each query sees the key after its own",
                (Edit("mask.CausalMask.sees", "self.first + rows.start, self.first + rows.stop",
                      "self.first + 1 + rows.start, self.first + 1 + rows.stop"),),
                INDEXER, "self_attn.indexer.scores")
    yield Fault("pads-are-seen", "mask", "left padding is not masked",
                (Edit("mask.CausalMask.sees", "else seen & (columns >= mx.array(self.pads)[:, None, None])", "else seen"),),
                INDEXER, "self_attn.indexer.topk", "padded batches")


def _block() -> Iterator[Fault]:
    layer = "block.DecoderLayer.__call__"

    def fault(name: str, what: str, *edits: Edit, stage: str, claim: str = LAYERS, **more: str):
        return Fault(name, "decoder layer", what, edits, claim, stage, **more)

    yield fault("residual-from-norm", "the residual is the normed hidden",
                Edit(layer, "x = x + self.self_attn(", "x = normed + self.self_attn("), stage="post_attention_layernorm")
    yield fault("mlp-reads-raw-hidden", "the feed-forward is fed before its norm", Edit(layer, "self.mlp(normed)", "self.mlp(x)"),
                stage="mlp_output")
    yield fault("norms-swapped", "post_attention_layernorm's weight before attention",
                Edit(layer, "self.input_layernorm(x)", "self.post_attention_layernorm(x)"), stage="input_layernorm")
    yield fault("rms-eps-1e-6", "the latents' eps for the layer's norms",
                Edit("block.DecoderLayer.__init__", "self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)",
                     "self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=1e-6)"), stage="input_layernorm",
                shows="slightly; plainly where rms_norm_eps is large")
    yield fault("final-norm-skipped", "the head reads the last layer's output",
                Edit("model.Backbone.__call__", 'tap(self, "norm", self.norm(x))', 'tap(self, "norm", x)'), stage="norm",
                claim=LOGITS)
    yield fault("embedding-scaled", "the embedding times sqrt(hidden), as Gemma has it",
                Edit("model.Backbone.__call__", "self.embed_tokens(tokens) if",
                     "self.embed_tokens(tokens) * self.embed_tokens.weight.shape[-1] ** 0.5 if"), stage="embed", claim=LOGITS)


def _moe() -> Iterator[Fault]:
    call, choose, experts = "moe.Router.__call__", "moe.Router.choose", "moe.Experts.__call__"
    mixture = "moe.MixtureOfExperts.__call__"
    shared = 'tap(self, "shared_experts", self.shared_experts(x))'

    def fault(name: str, component: str, what: str, *edits: Edit, stage: str, shows: str = ALWAYS, **more: str):
        return Fault(name, component, what, edits, ROUTER, f"mlp.{stage}", shows, **more)

    yield fault("router-bias-in-weights", "router", "the correction bias leaks into the weights",
                Edit(call, "mx.take_along_axis(scores,", "mx.take_along_axis(scores + self.e_score_correction_bias,"),
                stage="gate.weights", shows="non-zero bias", origin="vllm 12002, transformers 41647")
    yield fault("router-bias-ignored", "router", "experts are chosen without the correction bias",
                Edit(choose, "scores + self.e_score_correction_bias.astype(mx.float32)", "scores"), stage="gate.topk",
                shows="non-zero bias")
    yield fault("router-group-fill-zero", "router", "losing groups filled with 0 instead of -inf",
                Edit(choose, "mx.array(-mx.inf)", "mx.array(0.0)"), stage="gate.topk", shows="negative biased scores, groups > 1",
                origin="vllm 13474, mlx-lm today")
    yield fault("router-group-by-best", "router", "a group counts by its best expert, not by its two best",
                Edit(choose, "mx.topk(grouped, 2, axis=-1).sum(axis=-1)", "grouped.max(axis=-1)"), stage="gate.topk",
                shows="groups > 1", origin="DeepSeek-V2's rule")
    yield fault("router-groups-ignored", "router", "experts are chosen from all groups",
                Edit(choose, "if self.groups > 1:", "if False:"), stage="gate.topk", shows="groups > 1")
    yield fault("router-one-expert-less", "router", "top k - 1 experts",
                Edit(choose, "kth=self.topk - 1, axis=-1)[..., : self.topk]", "kth=self.topk - 2, axis=-1)[..., : self.topk - 1]"),
                stage="gate.topk")
    yield fault("router-no-norm", "router", "norm_topk_prob ignored", Edit(call, "if self.normalize:", "if False:"),
                stage="gate.weights", origin="several")
    yield fault("router-always-norm", "router", "weights are normalized where the config says not to",
                Edit(call, "if self.normalize:", "if True:"), stage="gate.weights", shows="norm_topk_prob = false")
    yield fault("router-norm-over-all", "router", "normalized by all experts' scores, not by the chosen ones'",
                Edit(call, "weights.sum(axis=-1, keepdims=True)", "scores.sum(axis=-1, keepdims=True)"), stage="gate.weights")
    yield fault("router-no-scale", "router", "routed_scaling_factor ignored", Edit(call, "weights * self.scale", "weights"),
                stage="gate.weights", origin="several")
    yield fault("router-softmax", "router", "softmax in the place of the sigmoid",
                Edit(call, "mx.sigmoid(logits)", "mx.softmax(logits, axis=-1)"), stage="gate.weights")
    yield fault("router-bf16", "router", "logits in low precision",
                Edit(call, "x.astype(mx.float32) @ self.weight.astype(mx.float32).T",
                     "(x.astype(mx.bfloat16) @ self.weight.astype(mx.bfloat16).T).astype(mx.float32)"), stage="gate.logits",
                shows="near ties", origin="several")
    yield fault("routing-weights-in-bf16", "MoE", "experts are summed under weights in 16 bit",
                Edit(mixture, "weights[..., None]", "weights[..., None].astype(mx.bfloat16).astype(mx.float32)"), stage="experts",
                shows="always, slightly")
    yield fault("experts-gate-up-swapped", "MoE", "silu on up, not on gate",
                Edit(experts, "nn.silu(self.gate_proj(x, flat, is_sorted)) * self.up_proj(x, flat, is_sorted)",
                     "nn.silu(self.up_proj(x, flat, is_sorted)) * self.gate_proj(x, flat, is_sorted)"), stage="experts")
    yield fault("experts-gelu", "MoE", "GELU in the place of SiLU", Edit(experts, "nn.silu(", "nn.gelu("), stage="experts")
    yield fault("experts-left-sorted", "MoE", "answers are not put back in the tokens' order",
                Edit(experts, "out = out[mx.argsort(order)]", "pass"), stage="experts", shows="64 pairs or more")
    yield fault("experts-of-another-token", "MoE", "the i-th pair reads token i mod S, not i div k",
                Edit(experts, "x[order // k]", "x[order % (flat.size // k)]"), stage="experts")
    yield fault("shared-expert-missing", "MoE", "shared expert dropped", Edit(mixture, shared, f"0 * {shared}"), stage="output",
                origin="conversions")
    yield fault("shared-expert-scaled", "MoE", "routed_scaling_factor on the shared expert too",
                Edit(mixture, shared, f"self.gate.scale * {shared}"), stage="output")
    yield fault("mlp-gate-up-swapped", "MoE", "silu on up, not on gate, in the shared expert and the dense MLP",
                Edit("moe.MLP.__call__", "nn.silu(self.gate_proj(x)) * self.up_proj(x)",
                     "nn.silu(self.up_proj(x)) * self.gate_proj(x)"), stage="shared_experts")


def _weights() -> Iterator[Fault]:
    split = "weights._split_kv_b"

    def fault(name: str, what: str, *edits: Edit, stage: str, claim: str = WEIGHTS, **more: str):
        return Fault(name, "weights", what, edits, claim, stage, **more)

    yield fault("fp8-scale-missed", "cast without weight_scale_inv",
                Edit("weights.dequantize_fp8", "(mx.from_fp8(weight, dtype=mx.float32) * scale)",
                     "mx.from_fp8(weight, dtype=mx.float32)"), stage="weight", shows="FP8 checkpoints", origin="abliterix 94")
    yield fault("fp8-scale-inverted", "weight_scale_inv is divided by, as its name suggests",
                Edit("weights.dequantize_fp8", "dtype=mx.float32) * scale)", "dtype=mx.float32) / scale)"), stage="weight",
                shows="FP8 checkpoints")
    yield fault("kv-b-halves-swapped", "kv_b_proj read as [W_uv; W_uk]",
                Edit(split, "w_uk, w_uv = mx.split(weight.reshape(heads), [args.qk_nope_head_dim], axis=1)",
                     "w_uv, w_uk = mx.split(weight.reshape(heads), [args.v_head_dim], axis=1)"),
                stage="self_attn.embed_q.weight")
    yield fault("kv-b-heads-last", "kv_b_proj's rows are read as [width, heads]",
                Edit(split, "weight.reshape(heads)", "weight.reshape(heads[1], heads[0], heads[2]).swapaxes(0, 1)"),
                stage="self_attn.embed_q.weight")
    yield fault("experts-in-text-order", "experts are stacked in the order of their names: 0, 1, 10, 11, ..., 2",
                Edit("weights._stack_experts", "tensors.pop(n) for n in names", "tensors.pop(n) for n in sorted(names)"),
                stage="mlp.switch_mlp", shows="more than 10 experts")
    yield Fault("mtp-dropped", "MTP", "the MTP layer silently discarded",
                (Edit("weights.to_modules", "if not args.num_nextn_predict_layers:", "if True:"), Edit("model.Model.sanitize",
                     "if not weights.has_mtp(self.args, tensors):", "if True:")), CONFIG, "parameters", "conversion",
                "ds4 458, every MLX build")


def _cache() -> Iterator[Fault]:
    def fault(
        name: str, what: str, *edits: Edit, claim: str = OPERATIONS, stage: str, shows: str = CACHED, **more: str
    ):
        return Fault(name, "cache", what, edits, claim, stage, shows, **more)

    yield fault("trim-main-only", "rewind trims the latent but not the indexer keys",
                Edit("cache.LayerCache.trim", "self.index_keys.trim(max(self.index_keys.length - self.latents.length, 0))",
                     "pass"),
                Edit("cache.LayerCache.append_index_keys", "self.index_keys.read()[0]",
                     "self.index_keys.read()[0][:, : self.length + keys.shape[1]]"),
                Edit("model.Model.__call__", "if cache is not None:", "if False:"), claim=CACHES,
                stage="self_attn.indexer.topk", shows="prompt reuse", origin="Rapid-MLX 1469",
                corrected="logits; since then a rewound run that differs is asked once more, choice by choice")
    yield fault("trim-one-too-few", "rewind leaves one token too many",
                Edit("cache.LayerCache.trim", "self.latents.trim(tokens)", "self.latents.trim(max(tokens - 1, 0))"), claim=CACHES,
                stage="logits", shows="prompt reuse")
    yield fault("growth-loses-a-token", "the first token is lost as a buffer grows",
                Edit("store.Columns.append", "buffer[:, : self.length] = old", "buffer[:, 1 : self.length] = old[:, 1:]"),
                claim=CACHES, stage="logits", shows="T > 256")
    yield fault("take-one-further", "the gathered form reads the token after the selected one",
                Edit("store.LatentStore.take", "return self.plain.take(tokens)[0]",
                     "return self.plain.take(mx.minimum(tokens + 1, self.length - 1))[0]"), claim=ATTENTION,
                stage="self_attn.heads", shows="decode beyond index_topk")
    yield fault("take-from-the-first-row", "the gathered form reads every row's tokens from the first row",
                Edit("store.Columns.take",
                     "columns if batch == 1 else columns + mx.arange(0, batch * size, size, dtype=columns.dtype)[:, None, None]",
                     "columns"), claim=ATTENTION, stage="self_attn.heads", shows="batches beyond index_topk")
    yield fault("positions-count-pads", "in a batch, positions start at the pads",
                Edit("cache.LayerCache.offset", "offset - mx.array(self.left_padding)",
                     "offset + 0 * mx.array(self.left_padding)"), stage="self_attn.indexer.topk",
                shows="rows merged after they began", corrected="logits; since then what was chosen in the batch is held first")
    yield fault("extract-takes-a-pad", "a row leaves the batch with one pad",
                Edit("cache.LayerCache.extract", "single = self._rows([row])",
                     "self.left_padding = self.left_padding and [max(pads - 1, 0) for pads in self.left_padding]; "
                     "single = self._rows([row])"), stage="batch", shows="batches of unequal length")
    yield fault("filter-forgets-index-keys", "rows are reordered, their indexer keys are not",
                Edit("cache.LayerCache._rows", "self.index_keys.rows(mx.array(rows))",
                     "self.index_keys.rows(mx.array(sorted(rows)))"), stage="batch", shows="batches whose rows are reordered")
    yield fault("right-padding-stays", "right padding is not rolled to the left",
                Edit("cache.LayerCache.finalize", "if self.right_padding is None:",
                     "if setattr(self, 'right_padding', None) is None:"), stage="batch",
                shows="chunks of unequal length in a batch")
    yield fault("rows-packed-from-one-column", "every row of a batch is packed from the same column on",
                Edit("cache.LayerCache._first", "start + pads for pads in", "start + max(self.left_padding or [0]) for _ in"),
                stage="batch", shows="packed from a later token on, unequal rows")
    yield fault("saved-without-its-start", "a saved cache forgets from which token on it is packed",
                Edit("cache.LayerCache.state", "[q.bits, q.group_size, q.start]", "[q.bits, q.group_size, 0]"),
                stage="raises CacheError",
                shows="saved, packed from a later token on")
    yield fault("start-forgotten-in-a-batch", "a merged cache starts at position 0",
                Edit("cache.LayerCache._twin", "list(left_padding), self.start,", "list(left_padding), 0,"),
                stage="raises CacheError", shows="far positions in a batch",
                corrected="logits; it was missed, until caches of a batch began far off too: then rows no longer go together")


def _int8() -> Iterator[Fault]:
    append, pack, unpack = "store.LatentStore.append", "store.KvQuantization.pack", "store.KvQuantization.unpack"
    packing = "mx.quantize(values, group_size=self.group_size, bits=self.bits)"

    def fault(name: str, what: str, *edits: Edit, stage: str, shows: str = "--kv-bits", **more: str):
        return Fault(name, "int8 cache", what, edits, INT8, stage, shows, **more)

    yield fault("kv-bits-no-op", "KV quantization asked for and silently not done",
                Edit(append, "if self.quantization is None:", "if True:"), stage="cache", origin="mlx-lm 1558, 1323")
    yield fault("kv-quantizes-indexer", "the indexer's keys are quantized too",
                Edit("cache.LayerCache.append_index_keys", "self.index_keys.append(keys)",
                     "self.index_keys.append(keys if self.quantization is None else KvQuantization(8, 32).rounded("
                     "mx.pad(keys, [(0, 0), (0, 0), (0, -keys.shape[-1] % 32)]))[..., : keys.shape[-1]])"),
                stage="cache.index_keys", shows="selection flips", origin="other GLM-5.2 builds")
    yield fault("kv-own-tokens-in-float", "a call's tokens are packed after they have been attended to",
                Edit("cache.LayerCache.append", "return self.latents",
                     "return LatentStore.of(mx.concatenate([self.latents.read()[:, : -joined.shape[1]], joined], axis=1))"),
                stage="self_attn.heads", origin="mlx-lm's switch after each chunk")
    yield fault("kv-biases-forgotten", "unpacked without biases",
                Edit(unpack, "(words, scales, biases,", "(words, scales, mx.zeros_like(biases),"), stage="cache")
    yield fault("kv-scales-in-16-bit", "scales and biases in 16 bit in a float32 model",
                Edit(pack, f"return {packing}",
                     f"return [a.astype(mx.bfloat16).astype(a.dtype) if i else a for i, a in enumerate({packing})]"),
                stage="cache.scales")
    yield fault("kv-four-bits-for-eight", "packed to 4 bits whatever is asked for", Edit(pack, "bits=self.bits", "bits=4"),
                Edit(unpack, "bits=self.bits", "bits=4"), stage="cache.words")
    yield fault("kv-starts-late", "the first token to be packed is not",
                Edit("cache.LayerCache._first", "start + pads", "start + 1 + pads"), stage="cache", shows="--quantized-kv-start")
    yield fault("kv-takes-the-next-token", "unpacking what was selected reads one further",
                Edit("store.LatentStore.take", "mx.maximum(tokens - begin, 0)",
                     "mx.minimum(mx.maximum(tokens + 1 - begin, 0), self.packed.length - 1)"), stage="cache",
                shows="--kv-bits, decode beyond index_topk")


def _mtp() -> Iterator[Fault]:
    step, draft = "mtp.MtpLayer.step", "model.Model.draft"
    joined = "[self.enorm(embeddings), self.hnorm(hidden)]"
    run = "x, selection = self(x, rotation, mask, cache, reuse, reuse=reuse is not None)"

    def fault(name: str, what: str, *edits: Edit, stage: str, shows: str = ALWAYS, **more: str):
        return Fault(name, "MTP", what, edits, MTP, stage, shows, **more)

    yield fault("mtp-concat-order", "hidden first instead of embedding first",
                Edit(step, joined, "[self.hnorm(hidden), self.enorm(embeddings)]"), stage="mtp step 0 hidden",
                origin="sglang 6423")
    yield fault("mtp-norms-swapped", "enorm on the hidden, hnorm on the embedding",
                Edit(step, joined, "[self.hnorm(embeddings), self.enorm(hidden)]"), stage="mtp step 0 hidden")
    yield fault("mtp-head-norm-skipped", "no norm before the shared head", Edit(step, "self.shared_head.norm(x)", "x"),
                stage="mtp step 0 hidden")
    yield fault("mtp-uses-main-selection", "the first step reuses a selection that is not its own (here: the oldest keys)",
                Edit(step, run, "reuse = mx.broadcast_to(mx.arange(min(self.self_attn.indexer.topk, cache.length + x.shape[1])), "
                     "(*x.shape[:2], min(self.self_attn.indexer.topk, cache.length + x.shape[1]))) "
                     f"if reuse is None and self.runs_indexer else reuse; {run}"), stage="mtp step 3 hidden", shows=SPARSE,
                origin="ROCm/ATOM 1362",
                corrected="mtp step 0 hidden; the short prompt is asked first, whose drafts pass index_topk at step 3")
    yield fault("mtp-reuse-skips-key-write", "steps that reuse a selection do not append their indexer key",
                Edit("block.DecoderLayer.__call__", "if self.runs_indexer:", "if self.runs_indexer and not reuse:"),
                stage="mtp cache, indexer keys", shows="second draft on", origin="xllm 2339")
    yield fault("mtp-selects-anew", "later steps make their own selection where the first one's is due",
                Edit(draft, "if reuse is None and self.args.mtp_reuses_selection:", "if False:"), stage="mtp step 1 hidden",
                shows=SPARSE)
    yield fault("mtp-reuses-the-first-query", "the selection reused is the first query's, not the last one's",
                Edit("mtp.last_selection", "selection[:, -1:]", "selection[:, :1]"), stage="mtp step 1 hidden", shows=SPARSE)
    yield fault("mtp-hidden-before-norm", "the next step is fed the hidden before the shared-head norm",
                Edit(step, "return tap(", "self._raw = x; return tap("),
                Edit(draft, "hidden = out[:, -1:]", "hidden = mtp._raw[:, -1:]"), stage="mtp step 1 hidden")
    yield fault("mtp-keeps-the-first-hidden", "each step is fed the main model's hidden",
                Edit(draft, "hidden = out[:, -1:]", "hidden = hidden[:, -1:]"), stage="mtp step 1 hidden")
    yield fault("mtp-feeds-the-same-token", "each step is fed the first step's token",
                Edit(draft, "tokens = choose(step, logits[:, -1])[:, None]", "tokens = tokens[:, -1:]"),
                stage="mtp step 1 tokens",
                corrected="mtp step 1 hidden, until the tokens that a step was fed were compared before it")
    yield fault("mtp-first-embedding-kept", "the embedding at position 0 is kept where it is to be zero",
                Edit("model.Model._draft_embeddings", "if not self.args.mtp_zero_first_embedding:", "if True:"),
                stage="mtp step 0 hidden", shows="mtp_zero_first_embedding")
    yield fault("mtp-own-embedding-ignored", "the main embedding, where the MTP layer has one of its own",
                Edit("model.Model._draft_embeddings", "self._mtp_layer().embed_tokens if", "self.model.embed_tokens if"),
                stage="mtp step 0 hidden", shows="GLM-4.7-Flash")
    yield fault("mtp-own-head-ignored", "the main head, where the MTP layer has one of its own",
                Edit(draft, "mtp.shared_head.head(out) if self.args.mtp_owns_embeddings else self.logits(out)",
                     "self.logits(out)"), stage="mtp step 0 logits", shows="GLM-4.7-Flash")


def _pairs() -> Iterator[Fault]:
    """Two mistakes whose effects partly cancel."""
    call, init = "attention.MultiHeadLatentAttention.__call__", "attention.MultiHeadLatentAttention.__init__"
    yield Fault("pair-scale-doubled-nope-halved", "MLA", "twice the softmax scale, half the queries but for their rotary part",
                (Edit("rope.softmax_scale", "scale = args.qk_head_dim**-0.5", "scale = 2 * args.qk_head_dim**-0.5"), Edit(call,
                     "q_nope = q_nope.swapaxes(1, 2)", "q_nope = 0.5 * q_nope.swapaxes(1, 2)")), ROPE, "softmax scale")
    yield Fault("pair-eps-up-and-down", "MLA", "the query latent's eps ten times too large, the KV latent's ten times too small",
                (Edit(init, "self.q_a_layernorm = nn.RMSNorm(args.q_lora_rank, eps=args.latent_norm_eps)",
                     "self.q_a_layernorm = nn.RMSNorm(args.q_lora_rank, eps=10 * args.latent_norm_eps)"), Edit(init,
                     "self.kv_a_layernorm = nn.RMSNorm(self.latent, eps=args.latent_norm_eps)",
                     "self.kv_a_layernorm = nn.RMSNorm(self.latent, eps=0.1 * args.latent_norm_eps)")), ATTENTION,
                "self_attn.q_latent", "always, slightly")
    yield Fault("pair-no-norm-mean-scale", "router", "weights not normalized, the factor divided by what their sum usually is",
                (Edit("moe.Router.__call__", "if self.normalize:", "if False:"), Edit("moe.Router.__call__",
                     "weights * self.scale", "weights * self.scale / (0.6 * self.topk)")), ROUTER, "mlp.gate.weights")
    yield Fault("pair-no-relu-positive-weights", "indexer", "no ReLU on the heads' products, only positive head weights",
                (Edit("indexer.Indexer.score", "mx.maximum(per_head, 0)", "per_head"), Edit("indexer.Indexer.head_weights",
                     "self.weights_proj(x.astype(mx.float32))", "mx.maximum(self.weights_proj(x.astype(mx.float32)), 0)")),
                INDEXER, "self_attn.indexer.weights", SPARSE)
    yield Fault("pair-experts-stronger-shared-weaker", "MoE", "routed experts 1.1 times, the shared one 0.9 times",
                (Edit("moe.MixtureOfExperts.__call__", "weights[..., None]", "weights[..., None] * 1.1"),
                Edit("moe.MixtureOfExperts.__call__", 'tap(self, "shared_experts", self.shared_experts(x))',
                     '0.9 * tap(self, "shared_experts", self.shared_experts(x))')), ROUTER, "mlp.experts")


def _equivalent() -> Iterator[Fault]:
    """Changes that no output can show."""
    order = "index scores are compared with each other only, and a positive factor keeps their order"
    shift = "rotations are orthogonal: R(p) q . R(s) k = q . R(s - p) k, so that a shift of all positions cancels in each score"
    yield Fault("indexer-width-not-scaled", "indexer", "scores without 1 / sqrt(D)",
                (Edit("indexer.Indexer.score", " * width**-0.5", ""),), INDEXER, "self_attn.indexer.scores", SPARSE,
                equivalent=order)
    yield Fault("indexer-heads-not-scaled", "indexer", "head weights without 1 / sqrt(H)",
                (Edit("indexer.Indexer.head_weights", " * self.heads**-0.5", ""),), INDEXER, "self_attn.indexer.weights", SPARSE,
                equivalent=order)
    yield Fault("indexer-mirrored", "indexer", "queries and keys both negated",
                (Edit("indexer.Indexer._rotate_first", "return mx.concatenate(", "return -mx.concatenate("),), INDEXER,
                "self_attn.indexer.k", SPARSE,
                equivalent="(-q) . (-k) = q . k; so for any orthogonal matrix, DeepSeek's Hadamard too")
    yield Fault("indexer-selection-reversed", "indexer", "selected keys in another order",
                (Edit("indexer.Indexer.best", "[..., rest:]", "[..., rest:][..., ::-1]"),
                 Edit("indexer.Indexer.select_tiled", "mx.sort(LAST - best[0].astype(mx.uint32), axis=-1)",
                      "LAST - best[0].astype(mx.uint32)")), INDEXER, "self_attn.indexer.topk", SPARSE,
                equivalent="attention sums over the selected set; its order changes rounding only")
    yield Fault("router-choice-reversed", "router", "chosen experts in another order",
                (Edit("moe.Router.choose", "axis=-1)[..., : self.topk]", "axis=-1)[..., : self.topk][..., ::-1]"),), "", "",
                equivalent="experts and their weights are permuted alike, and summed; the order changes rounding only")
    yield Fault("rope-positions-from-one", "rope", "positions count from 1",
                (Edit("rope.RotaryEmbedding.__call__", "positions.astype(mx.float32)", "(positions + 1).astype(mx.float32)"),),
                ROPE, "position", equivalent=shift)
    yield Fault("mtp-position-of-the-next-token", "MTP", "token t+1 is fed at position t+1, not t",
                (Edit("model.Model.draft", "rotation, mask = self.model.rotation_and_mask(tokens.shape[1], cache)",
                      "length = tokens.shape[1]; "
                      "rotation, mask = self.model._rotary(positions(length, cache) + 1), cache.mask(length)"),),
                MTP, "mtp cache", equivalent=shift + "; the MTP layer's keys are all its own",
                corrected="nowhere; the keys that are written show it")
    yield Fault("latent-doubled-scale-halved", "MLA", "query latent times 2, softmax scale divided by 2",
                (Edit("attention.MultiHeadLatentAttention.query_latent", "self.q_a_layernorm(self.q_a_proj(x))",
                      "2 * self.q_a_layernorm(self.q_a_proj(x))"),
                 Edit("attention.MultiHeadLatentAttention.__init__", "softmax_scale(args)", "softmax_scale(args) / 2")),
                ATTENTION, "self_attn.q_latent",
                equivalent="W_uq is linear and 2 is exact: attention's scores keep every bit; index scores double in order")


def _later() -> Iterator[Fault]:
    """Those that came afterwards, at the end: the diagnosis withholds each fifth of the catalogue by its order."""
    yield Fault("filter-drops-announced-padding", "cache", "rows are filtered before the pads have come, and come without them",
                (Edit("cache.LayerCache._rows", "min(self.length, *(padding[row] for row in rows))",
                      "min(padding[row] for row in rows)"),), OPERATIONS, "batch", "left padding, filtered before the first token")
    yield from _lossy_choices()
    yield from _uneven_norms()
    yield from _sixteen_bit()


def _lossy_choices() -> Iterator[Fault]:
    """A choice that loses some of the best, and weights that lose digits: seen only where scores lie close, or biases are large."""
    best, every = "indexer.Indexer.best", "every.shape[-1]"
    far = "T well above index_topk, clustered scores"

    def overflow(name: str, what: str, room: str, **more: str) -> Fault:
        """Sought among the keys whose upper bits (sign, exponent, two of the fraction) rank first; of equal ones, the earlier."""
        kept = (f"size = {every}; room = min({room}, size); coarse = (every >> 53 << 32) | (every & LAST); "
                "every = mx.take_along_axis(every, mx.argpartition(coarse, kth=size - room, axis=-1)[..., size - room :], "
                f"axis=-1); rest = {every} - self.topk")
        edit = Edit(best, f"rest = {every} - self.topk", kept)
        return Fault(name, "indexer", what, (edit,), INDEXER, "self_attn.indexer.topk", far, **more)

    sglang = "sglang 37591"
    yield overflow("topk-bucket-overflow", "winners are lost when the bucket of their upper bits overflows: room for 2 index_topk",
                   "2 * self.topk", origin=sglang)
    yield overflow("topk-bucket-overflow-at-8", "as above, with room for 8 index_topk", "8 * self.topk", origin=sglang)
    yield overflow("topk-bucket-overflow-at-31", "as above, with room for 31 index_topk", "31 * self.topk", origin=sglang)
    yield overflow("topk-bucket-overflow-by-one", "as above, with room for all keys but one", f"{every} - 1")
    yield Fault("indexer-tiles-overflow", "indexer", "a tile of keys behind the first hands on half of index_topk at most",
                (Edit("indexer.Indexer.select_tiled", "[*best, ranks(scores, columns)]",
                      "[*best, mx.sort(ranks(scores, columns), axis=-1)[..., -max(self.topk // 2, 1) :]] if best "
                      "else [ranks(scores, columns)]"),), INDEXER, "self_attn.indexer.topk", "contexts in tiles")
    yield Fault("indexer-eps-zero", "indexer", "LayerNorm eps never set: 0 (mlx refuses 0 itself)",
                (Edit("indexer.Indexer.__init__", "eps=args.indexer_norm_eps", "eps=1e-30"),), INDEXER, "self_attn.indexer.k",
                "keys of small variance", "llama.cpp today")
    yield Fault("indexer-sink-forced", "indexer", "the first token is forced into every selection",
                (Edit("indexer.ranks", "(scores + 0.0)",
                      "mx.where(mx.arange(columns.start, columns.stop) == 0, mx.array(mx.inf), scores + 0.0)"),), INDEXER,
                "self_attn.indexer.topk", SPARSE, "ik_llama.cpp --dsa")
    yield Fault("router-weights-from-biased", "router", "weights recovered as (score + bias) - bias",
                (Edit("moe.Router.__call__", "mx.take_along_axis(scores, experts, axis=-1)",
                      "mx.take_along_axis(scores + self.e_score_correction_bias, experts, axis=-1) "
                      "- self.e_score_correction_bias[experts]"),), ROUTER, "mlp.gate.weights", "large biases; slightly",
                "flashinfer 3875")


def _uneven_norms() -> Iterator[Fault]:
    """Mistakes about norm weights that are near 0 or negative."""
    layer, negative = "block.DecoderLayer.__call__", "negative norm weights"

    def fault(name: str, component: str, what: str, edit: Edit, claim: str, stage: str, shows: str = negative) -> Fault:
        return Fault(name, component, what, (edit,), claim, stage, shows)

    def normed(norm: str, x: str, weight: str) -> str:
        return f"mx.fast.rms_norm({x}, {weight.format(f'{norm}.weight')}, {norm}.eps)"

    yield fault("norm-weight-magnitude", "decoder layer", "the magnitude of input_layernorm's weight counts, not its sign",
                Edit(layer, "self.input_layernorm(x)", normed("self.input_layernorm", "x", "mx.abs({})")), LAYERS,
                "input_layernorm")
    yield fault("norm-one-plus-weight", "decoder layer", "post_attention_layernorm times 1 + weight, as Gemma has it",
                Edit(layer, "self.post_attention_layernorm(x)", normed("self.post_attention_layernorm", "x", "1 + {}")), LAYERS,
                "post_attention_layernorm", ALWAYS)
    yield fault("norm-weight-floored", "decoder layer", "a final norm's weight below 0.01 counts as 0.01",
                Edit("model.Backbone.__call__", "self.norm(x)", normed("self.norm", "x", "mx.maximum({}, 0.01)")), LOGITS, "norm",
                "norm weights near 0 or below")
    yield fault("q-latent-norm-clamped", "MLA", "negative weights of q_a_layernorm count as 0",
                Edit("attention.MultiHeadLatentAttention.query_latent", "self.q_a_layernorm(self.q_a_proj(x))",
                     normed("self.q_a_layernorm", "self.q_a_proj(x)", "mx.maximum({}, 0)")), ATTENTION, "self_attn.q_latent")
    yield fault("kv-latent-norm-magnitude", "MLA", "the magnitude of kv_a_layernorm's weight counts",
                Edit("attention.MultiHeadLatentAttention.__call__", "self.kv_a_layernorm(latent))",
                     f"{normed('self.kv_a_layernorm', 'latent', 'mx.abs({})')})"), ATTENTION, "self_attn.kv_latent")
    yield fault("indexer-norm-magnitude", "indexer", "the magnitude of k_norm's weight counts",
                Edit("indexer.Indexer.keys_so_far", "self.k_norm(self.wk(x))",
                     "mx.fast.layer_norm(self.wk(x), mx.abs(self.k_norm.weight), self.k_norm.bias, self.k_norm.eps)"), INDEXER,
                "self_attn.indexer.k")
    for norm, x in (("enorm", "embeddings"), ("hnorm", "hidden"), ("shared_head.norm", "x")):
        name = "mtp-head-norm-magnitude" if "." in norm else f"mtp-{norm}-magnitude"
        yield fault(name, "MTP", f"the magnitude of {norm}'s weight counts",
                    Edit("mtp.MtpLayer.step", f"self.{norm}({x})", normed(f"self.{norm}", x, "mx.abs({})")), MTP,
                    "mtp step 0 hidden")


def _sixteen_bit() -> Iterator[Fault]:
    """Casts removed: what is float32 by design is the model's dtype, which in a float32 model is no mistake."""
    route, score, shows = "moe.Router.__call__", "indexer.Indexer.score", "models in 16 bit"

    def fault(name: str, component: str, what: str, *edits: Edit, claim: str, stage: str) -> Fault:
        return Fault(name, component, what, edits, claim, stage, shows)

    yield fault("router-logits-in-the-models-dtype", "router", "logits in 16 bit",
                Edit(route, "x.astype(mx.float32) @ self.weight.astype(mx.float32).T", "x @ self.weight.T"), claim=ROUTER,
                stage="mlp.gate.logits")
    yield fault("correction-bias-in-the-models-dtype", "router", "the correction bias is cast with the weights",
                Edit("checkpoint._cast", ' or name.endswith("e_score_correction_bias")', ""), claim=ROUTER,
                stage="mlp.gate.e_score_correction_bias")
    yield fault("router-chooses-in-the-models-dtype", "router", "experts are chosen by score + bias in 16 bit",
                Edit("moe.Router.choose", "scores + self.e_score_correction_bias.astype(mx.float32)",
                     "(scores + self.e_score_correction_bias).astype(self.weight.dtype)"), claim=ROUTER, stage="mlp.gate.topk")
    yield fault("routing-weights-in-the-models-dtype", "router", "weights in 16 bit",
                Edit(route, 'tap(self, "weights", weights * self.scale)',
                     'tap(self, "weights", (weights * self.scale).astype(x.dtype))'), claim=ROUTER, stage="mlp.gate.weights")
    yield fault("experts-summed-in-the-models-dtype", "MoE", "experts are weighted and summed in 16 bit",
                Edit("moe.MixtureOfExperts.__call__", "weights[..., None]", "weights[..., None].astype(x.dtype)"), claim=ROUTER,
                stage="mlp.experts")
    yield fault("head-weights-in-the-models-dtype", "indexer", "head weights in 16 bit",
                Edit("indexer.Indexer.head_weights", "x.astype(mx.float32)", "x"), claim=INDEXER, stage="self_attn.indexer.weights")
    yield fault("indexer-scores-in-the-models-dtype", "indexer", "products of queries and keys in 16 bit",
                Edit(score, "q = q.astype(mx.float32).reshape", "q = q.reshape"),
                Edit(score, "k.astype(mx.float32)", "k"), claim=INDEXER, stage="self_attn.indexer.scores")
    yield fault("rope-angles-in-the-models-dtype", "rope", "cos and sin in 16 bit",
                Edit("rope.rotate", "rotation.cos[..., None, :], rotation.sin[..., None, :]",
                     "rotation.cos[..., None, :].astype(x.dtype), rotation.sin[..., None, :].astype(x.dtype)"), claim=ROPE,
                stage="position")



def _sizes() -> Iterator[Fault]:
    """Right up to some size within use, wrong from there on."""

    def fault(name: str, component: str, what: str, *edits: Edit, shows: str, stage: str = "logits", **more: str):
        return Fault(name, component, what, edits, SIZES, stage, shows, **more)

    yield fault("experts-unordered-from-8192-pairs", "MoE", "from 8192 token-expert pairs on, answers stay in their experts' order",
                Edit("moe.Experts.__call__", "    if is_sorted:\n", "    if is_sorted and flat.size < 8192:\n"),
                shows="1024 tokens at top 8")
    yield fault("own-chunk-unseen-from-513-queries", "mask", "more than 512 queries behind a cache do not see their own chunk",
                Edit("mask.CausalMask.sees", "[:, None]\n    seen", "[:, None]\n    own = mx.minimum(own, self.first - 1) "
                     "if self.first and self.queries > 512 else own\n    seen"),
                stage="self_attn.indexer.topk", shows="chunks of more than 512 behind a cache",
                corrected="logits; under the reference's choices no key of the own chunk needs a mask")
    yield fault("tiles-forget-at-64-index-topk", "indexer", "the best of the tiles before are forgotten from key 64 index_topk on",
                Edit("indexer.Indexer.select_tiled", "[*best, ranks(scores, columns)]",
                     "[*(best if columns.start < 64 * self.topk else []), ranks(scores, columns)]"),
                stage="self_attn.indexer.topk", shows="contexts of 64 index_topk")
    yield fault("ninth-row-takes-the-eighth-s-keys", "attention", "rows from the ninth on attend to what the eighth selected",
                Edit("attention.MultiHeadLatentAttention.attend_gathered", "picked = selection[:, part]",
                     "picked = selection[mx.minimum(mx.arange(batch), 7), part]"), shows="batches of more than 8")
    yield fault("router-unnormalized-from-1024-tokens", "router", "from 1024 tokens on weights are not normalized",
                Edit("moe.Router.__call__", "if self.normalize:", "if self.normalize and x.shape[1] < 1024:"),
                shows="chunks of 1024")
    yield fault("expanded-unmasked-from-1024-queries", "attention", "from 1024 queries on the expanded form is not causal",
                Edit("attention.MultiHeadLatentAttention.attend_expanded", "mask=mask",
                     "mask=mask if q_nope.shape[2] < 1024 else None"), shows="chunks of 1024 within index_topk")
    yield fault("absorbed-zeros-from-100000-keys", "attention", "from 100,000 keys on the absorbed form reads zeros for the first",
                Edit("attention.MultiHeadLatentAttention.attend_absorbed", "keys = tokens.read()",
                     "keys = tokens.read(); "
                     "keys = keys if keys.shape[1] < 100_000 else keys * (mx.arange(keys.shape[1]) > 9999)[:, None]"),
                stage="self_attn.heads", shows="contexts of 100,000, no indexer: a twentieth of the keys, slightly")
    yield fault("drafts-joined-with-the-first-of-1024-tokens", "MTP", "from 1024 hiddens on each is joined with the first token",
                Edit("mtp.MtpLayer.step", "self.enorm(embeddings)", "self.enorm(embeddings if embeddings.shape[1] < 1024 "
                     "else mx.broadcast_to(embeddings[:, :1], embeddings.shape))"),
                stage="mtp step 0 hidden", shows="prompts of 1024 handed in at once")


def _cache_sizes() -> Iterator[Fault]:
    """The same of caches, ids and packed weights."""

    def fault(name: str, component: str, what: str, *edits: Edit, stage: str, shows: str, **more: str):
        return Fault(name, component, what, edits, SIZES, stage, shows, **more)

    yield fault("gather-columns-in-16-bit", "cache", "columns to be gathered are cut to 16 bit",
                Edit("store.Columns.take", "rows = columns if batch", "rows = columns.astype(mx.uint16) if batch"),
                stage="self_attn.heads", shows="contexts of 65,536: some of many keys, slightly",
                corrected="gather; the whole model's contexts are asked before the caches alone")
    yield fault("growth-beyond-16k-loses-a-token", "cache", "growing beyond 16,384 tokens, the last one is lost",
                Edit("store.Columns.append", "buffer[:, : self.length] = old",
                     "keep = self.length - (self.length > 16_384); buffer[:, :keep] = old[:, :keep]"),
                stage="self_attn.indexer.topk", shows="contexts of 16,384",
                corrected="cache growth; the whole model's contexts are asked before the caches alone")
    yield fault("trim-of-packed-in-16-bit", "cache", "no more than 65,535 packed tokens are forgotten at once",
                Edit("store.LatentStore.trim", "min(self.packed.length, tokens)", "min(self.packed.length, tokens, 65_535)"),
                stage="trim", shows="rewinding by 65,536 under --kv-bits")
    yield fault("ninth-row-filtered-as-the-eighth", "cache", "rows from the ninth on are the eighth once a batch was filtered",
                Edit("store.Columns.rows", "part[indices]", "part[mx.minimum(indices, 7)]"), stage="batch",
                shows="batches of more than 8")
    yield fault("saved-cache-ends-at-131072", "cache", "a cache is saved up to token 131,072",
                Edit("cache._parts", "list(columns.read())", "[part[:, :131_072] for part in columns.read()]"),
                stage="cache growth", shows="prompt caches of more")
    yield fault("pads-in-16-bit", "mask", "a row's padding counts in 16 bit", Edit("mask.CausalMask.sees", "mx.array(self.pads)",
                     "mx.array(self.pads).astype(mx.uint16)"), stage="mask", shows="rows behind 65,536 pads")
    yield fault("token-ids-in-16-bit", "embedding", "token ids are cut to 16 bit",
                Edit("model.Backbone.__call__", "self.embed_tokens(tokens)", "self.embed_tokens(tokens.astype(mx.uint16))"),
                stage="embedding", shows="ids beyond 65,535")
    yield fault("draft-choice-in-16-bit", "MTP", "the token that a draft chooses is cut to 16 bit",
                Edit("model.Model.draft", "mx.argmax(logits, axis=-1))", "mx.argmax(logits, axis=-1).astype(mx.uint16))"),
                stage="draft's tokens", shows="drafts of ids beyond 65,535")
    yield fault("packed-experts-in-7-bit", "MoE", "packed experts from the 129th on are those from the first on",
                Edit("linear.QuantizedSwitchLinear.__call__", "rhs_indices=experts", "rhs_indices=experts & 127"), stage="experts",
                shows="256 packed experts")
    yield fault("embeddings-of-long-chunks-ignored", "embedding", "of more than 1024 tokens, the tokens count, not the embeddings",
                Edit("model.Backbone.__call__", "if input_embeddings is None else",
                     "if input_embeddings is None or tokens.size > 1024 else"),
                stage="logits", shows="embeddings for more than 1024 tokens",
                corrected="input_embeddings; the whole model against HF is asked before")


PARTS = (
    _indexer, _index_share, _rope, _attention, _block, _moe, _weights, _cache, _int8, _mtp, _pairs, _equivalent, _later, _sizes,
    _cache_sizes,
)  # fmt: skip
CATALOGUE = {fault.name: fault for part in PARTS for fault in part()}
