"""The checkpoints that the gate runs on, each written by HF itself, and what the oracles say of them.

Over 400 lines, in one file: a spec, the case that is made of it and its reference are one thing in three states."""

from __future__ import annotations

import math
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from glm_dsa import ModelArgs, layouts, weights
from glm_dsa.checkpoint import assemble, check_values
from glm_dsa.config_reader import read_json
from glm_dsa.storage import INDEX
from reference import checkpoints, corpus, hf
from reference.capture import capture
from reference.equations import Conventions, Equations, causal
from reference.kept import TRAINED, check_kept, probes
from reference.stored import weights_of

from ..core import bounds, stages
from ..core.choices import Decision, of_stage
from ..engines.conventions import conventions_of
from ..engines.definition import Ours

Array = np.ndarray
HALF_SPLIT_CLAIMS = (
    "the references agree",
    "indexer scores and selections",
    "final logits",
    "a trained model's behaviour",
)
CLUSTERED_CLAIMS = (
    "the references agree",
    "indexer scores and selections",
    "each layer on the reference's input",
    "final logits",
    "caches: chunks, decode, rewind, padding",
)
TOPK = 16  # index_topk of the tiny checkpoints: prompts of 80 are five times as long
MOST_TOPK = 64  # beyond it prompts grow too long for MLX on a CPU
HF_LOADS = frozenset({layouts.STACKED, layouts.UNREAD})  # of the layouts that are neither its own nor mlx-lm's
LARGEST = 1 << 29  # parameters of a checkpoint that is judged in memory


@dataclass(frozen=True)
class Spec:
    """What to write, and the conventions to hold it to."""

    name: str
    config: Mapping[str, Any] = field(hash=False)
    overrides: Mapping[str, Any] = field(default_factory=dict, hash=False)
    bias_mean: float = 0.0
    key_mean: float = 0.0  # of the indexer's keys: a large one makes scores that lie close to each other
    times: int = 3  # how many times index_topk a long prompt has at least
    folder: Path | None = None  # a checkpoint that is there already
    # what its prompts are cut from, a byte a token; random tokens where there are none
    texts: tuple[str, ...] = ()
    claims: tuple[str, ...] = ()  # judged in these alone, where another case stands for it in the others
    prompts: str = (
        "random"  # tokens of a prompt; or "repeated": one of them at every third position; "constant": one alone
    )
    has_mtp: bool = True  # False where a checkpoint has no tensors for the MTP layer that its config names

    @property
    def args(self) -> ModelArgs:
        if self.folder is not None:
            return ModelArgs.from_file(self.folder, **self.overrides)
        return ModelArgs.from_dict(self.config, **self.overrides)

    @property
    def family(self) -> str:
        """The architecture: the name without its RoPE layout; what was trained is a small GLM-5.2."""
        return "glm-5.2" if self.texts else self.name.removesuffix("-interleaved").removesuffix("-half-split")

    @property
    def has(self) -> set[str]:
        """What a test can need: an indexer, shared layers, MTP, a cache that can be packed, weights that were trained."""
        args = self.args
        parts = {
            "indexer": args.has_indexer,
            "shared": "shared" in args.indexer_types,
            "mtp": args.num_nextn_predict_layers > 0 and self.has_mtp,
            "packable": bool(group_size(args)),
            "trained": bool(self.texts),
        }
        return {part for part, there in parts.items() if there}


def default_specs() -> list[Spec]:
    """Each architecture under both indexer layouts; conventions, groups, biases and schedules varied among them."""
    grouped = checkpoints.tiny(
        indexer_types=["full", "shared", "full", "shared", "shared"], num_hidden_layers=5, first_k_dense_replace=1,
        n_group=4, topk_group=2, norm_topk_prob=False, attention_bias=True, n_shared_experts=2,
        rms_norm_eps=0.05, qk_nope_head_dim=32, qk_head_dim=48,
    )  # fmt: skip
    yarn = {"rope_theta": 1000000, "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096,
            "beta_fast": 16.0, "mscale": 1.0, "mscale_all_dim": 0.7}  # fmt: skip
    scaled = checkpoints.tiny(num_hidden_layers=3, first_k_dense_replace=1, rope_parameters=yarn)
    # latents and rotary keys that groups of 32 divide: their cache can be packed
    packable = {"kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_head_dim": 44}
    bases: list[tuple[str, Mapping[str, Any], float, dict[str, Any]]] = [
        ("glm-5.2", checkpoints.glm_5_2(index_head_dim=40, **packable), 0.0, {}),
        ("glm-5.1", scaled, 0.0, {"latent_norm_eps": 1e-5}),
        ("grouped", grouped, -1.2, {}),  # every biased score negative: a losing group filled with 0 would win
    ]
    specs = [
        Spec(f"{name}-{layout}", config, {"indexer_rope": layout, **overrides}, bias)
        for name, config, bias, overrides in bases
        for layout in ("interleaved", "half-split")
    ]
    flash = checkpoints.glm_4_7(**packable | {"qk_head_dim": None})
    flashes = [
        Spec("glm-4.7", flash),
        Spec("glm-4.7-half-split", {**flash, "tie_word_embeddings": True}, {"main_rope": "half-split"}),
    ]
    # 32 times index_topk, where most keys score within a few percent of each other: a selection by the upper bits loses some
    close = checkpoints.tiny(index_topk=4, num_hidden_layers=3, first_k_dense_replace=1, index_topk_freq=2)
    rope = {"indexer_rope": "interleaved"}
    clustered = Spec("clustered", close, rope, key_mean=200.0, times=32, claims=CLUSTERED_CLAIMS)
    return [*specs, clustered, *flashes, *trained_specs()]


def trained_specs() -> list[Spec]:
    """The small checkpoints that have really been trained (reference/training), on text that they were not trained on.

    The half-split one is the same recipe: to save time it is judged in some claims only.
    """
    folders, texts = [TRAINED / "interleaved", TRAINED / "half-split"], tuple(probes()["texts"])
    for folder in folders:
        check_kept(folder)
    return [
        Spec(
            f"trained-{f.name}",
            {},
            folder=f,
            texts=texts,
            claims=() if f.name == "interleaved" else HALF_SPLIT_CLAIMS,
        )
        for f in folders
    ]


def group_size(args: ModelArgs) -> int:
    """The largest group that MLX packs and that divides latent and rotary key; 0 where none does."""
    fitting = (g for g in (64, 32) if args.kv_lora_rank % g == 0 and args.qk_rope_head_dim % g == 0)
    return next(fitting, 0)


def spec_of(folder: Path, index_topk: int | None) -> Spec:
    """A checkpoint of the user's. Raises ValueError, in one line, where it cannot be judged here."""
    if not folder.is_dir():
        raise ValueError(f"--checkpoint {folder}: no such folder")
    overrides: dict[str, Any] = {} if index_topk is None else {"index_topk": index_topk}
    model, stored = assemble(folder, **overrides)
    args = model.args
    if not weights.is_hf_layout(stored) or any(name.endswith("_scale_inv") for name in stored):
        raise ValueError(
            f"--checkpoint {folder}: HF loads bf16, fp16 or fp32 in HF layout; this one is in MLX's, or packed"
        )
    if unknown := stored.kinds - HF_LOADS:
        raise ValueError(
            f"--checkpoint {folder}: HF does not load this layout ({', '.join(sorted(unknown))}); it is judged layer by layer"
        )
    kept_in = {s.dtype for name, s in stored.items() if not name.endswith("e_score_correction_bias")}
    if len(kept_in) > 1:
        raise ValueError(
            f"--checkpoint {folder}: HF rounds all tensors to one dtype, and these are in {', '.join(sorted(kept_in))}; it is "
            "judged layer by layer"
        )
    parameters = sum(math.prod(s.shape) for s in stored.values())
    if parameters > LARGEST:
        raise ValueError(
            f"--checkpoint {folder}: {parameters:,} parameters; at most {LARGEST:,} fit here in float32, twice"
        )
    if args.index_topk > MOST_TOPK:
        raise ValueError(
            f"--checkpoint {folder}: index_topk = {args.index_topk} needs prompts of more than {3 * MOST_TOPK} tokens; "
            f"add --index-topk {TOPK}"
        )
    if args.has_indexer and args.main_rope != "interleaved":
        raise ValueError(f"--checkpoint {folder}: rope_interleave = false, which HF's glm_moe_dsa has no form of")
    if len({s.file for s in stored.values()}) > 1 and not (folder / INDEX).exists():
        raise ValueError(f"--checkpoint {folder}: HF finds several shards by {INDEX} only, which is not there")
    check_vocabulary(str(folder), args)
    check_values(stored)
    return Spec(folder.resolve().name, {}, overrides, folder=folder.resolve(), has_mtp=model.mtp is not None)


def check_vocabulary(origin: str, args: ModelArgs) -> None:
    """Prompts are drawn from token 3 on. Raises ValueError."""
    if args.vocab_size < 5:
        raise ValueError(f"{origin}: vocab_size = {args.vocab_size}: expected 5 or more, to draw prompts from")


class Case:
    """A checkpoint on disk with its candidate and its oracles, each built once."""

    def __init__(self, spec: Spec, scratch: Path, seed: int, shard_size: str = "300KB") -> None:
        self.spec, self.name, self.seed = spec, spec.name, seed
        self.folder = spec.folder or scratch / spec.name
        if spec.folder is None and not self.folder.exists():
            part = self.folder.with_name(f".{spec.name}.part")  # what HF did not finish must not be judged
            shutil.rmtree(part, ignore_errors=True)
            checkpoints.write(
                part, spec.config, seed=seed, shard_size=shard_size, bias_mean=spec.bias_mean, key_mean=spec.key_mean,
                uneven_norms=True,
            )  # fmt: skip
            part.rename(self.folder)
        self.config = read_json(self.folder / "config.json")
        if "index_topk" in spec.overrides:
            self.config["index_topk"] = spec.overrides["index_topk"]
        self.args = spec.args
        self._references: dict[tuple[int, int], Reference] = {}

    @property
    def conventions(self) -> Conventions:
        return conventions_of(self.args)

    @cached_property
    def ours(self) -> Ours:
        return Ours(self.folder, **self.spec.overrides)

    @cached_property
    def hf(self) -> Any:
        return hf.load(self.folder, self.conventions, with_mtp=False, **self.changes)

    @cached_property
    def hf_with_mtp(self) -> Any:
        return hf.load(self.folder, self.conventions, with_mtp=True, **self.changes)

    @property
    def changes(self) -> dict[str, Any]:
        return {"index_topk": self.config["index_topk"]} if "index_topk" in self.config else {}

    @cached_property
    def weights(self) -> Any:
        return weights_of(self.folder)

    @property
    def longest(self) -> int:
        """The longest reduction inside the model, for tolerances.primitive_ratio."""
        return bounds.longest(self.args)

    @property
    def lengths(self) -> list[int]:
        """Prompt lengths: within index_topk, and far beyond it. Without an indexer one will do."""
        topk = self.args.index_topk
        return [max(topk - 2, 1), self.long] if topk else [48]

    @property
    def explained_at_most(self) -> float:
        """How far HF may be off at all: further where training made attention sharp, if float32 explains it."""
        return bounds.EXPLAINED_AT_MOST if self.spec.texts else bounds.EXPLAINED

    @property
    def topk(self) -> int:
        """index_topk, for prompts that are to lie around it; without an indexer, that of the tiny checkpoints."""
        return self.args.index_topk or TOPK

    @property
    def long(self) -> int:
        """A prompt beyond index_topk: 80 tokens, or three times index_topk (`times`) where that is more."""
        return max(5 * TOPK, self.spec.times * self.args.index_topk)

    def scaled(self, cuts: list[int]) -> list[int]:
        """Cuts of a prompt of 80 tokens or less, for one of `long`: as many cuts, and few tokens stay few."""
        own = [cut * self.long // (5 * TOPK) if cut > 8 else cut for cut in cuts]
        own[own.index(max(own))] += sum(cuts) * self.long // (5 * TOPK) - sum(own)
        return own

    def tokens(self, length: int, batch: int = 1) -> Array:
        random = np.random.default_rng([self.seed, length, batch, zlib.crc32(self.spec.name.encode())])
        if not self.spec.texts:
            tokens = random.integers(3, self.args.vocab_size, (batch, length))
            if self.spec.prompts == "repeated":
                tokens[:, ::3] = tokens[0, 0]
            return np.full_like(tokens, tokens[0, 0]) if self.spec.prompts == "constant" else tokens
        texts = [corpus.encode(text) for text in self.spec.texts if len(text) > length]
        return np.stack([corpus.window(random, texts[int(random.integers(len(texts)))], length) for _ in range(batch)])

    def equations(self, given: Mapping[str, Array] | None = None, single: bool = False) -> Equations:
        """The oracle in float64; `single`: the same code in float32, which shows what float32 explains."""
        weights = (lambda name: self.weights(name).astype(np.float32)) if single else self.weights
        return Equations(self.config, weights, self.conventions, given)

    def reference(self, length: int, batch: int = 1) -> Reference:
        if (length, batch) not in self._references:
            self._references[length, batch] = Reference(self, self.tokens(length, batch))
        return self._references[length, batch]


class Reference:
    """HF's stages on a prompt, and how far each lies from the float64 equations under HF's own choices.

    `local` errors: each layer's truth is computed on HF's input of that layer. `accumulated`: from the tokens on.
    """

    def __init__(self, case: Case, tokens: Array) -> None:
        self.case, self.tokens = case, tokens
        with capture(case.hf) as self.hf:
            hf.forward(case.hf, tokens)
        self.given = {s: v for s, v in self.hf.items() if s.endswith(".topk")}

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    @property
    def end(self) -> int:
        """The position after the last."""
        return self.length

    @property
    def is_sparse(self) -> bool:
        return 0 < self.case.args.index_topk < self.end

    @property
    def injections(self) -> dict[str, Array]:
        """The reference's choices, for the candidate."""
        return stages.choices(self.given, self.is_sparse)

    @cached_property
    def truth(self) -> dict[str, Array]:
        equations = self.case.equations(self.given)
        equations.forward(self.tokens)
        return equations.stages

    @cached_property
    def local_truth(self) -> dict[str, Array]:
        return self._layer_by_layer(single=False)

    def _layer_by_layer(self, single: bool) -> dict[str, Array]:
        """The equations of each layer on HF's input of it, under HF's choices."""
        equations, config = self.case.equations(self.given, single), self.case.config
        shape = self.tokens.shape
        positions = np.broadcast_to(np.arange(shape[1]), shape)
        selection = None
        for layer in range(config["num_hidden_layers"]):
            x = self.layer_input(layer).astype(np.float32 if single else np.float64)
            _, selection = equations.layer(layer, x, positions, causal(shape, None), selection)
        return equations.stages

    def layer_input(self, layer: int) -> Array:
        return self.hf["embed" if layer == 0 else f"layers.{layer - 1}.output"]

    def layer_selection(self, layer: int) -> Array | None:
        """The selection of the layer below, as the candidate is to be handed it."""
        return self.hf.get(f"layers.{layer - 1}.self_attn.selection") if self.is_sparse and layer else None

    @cached_property
    def accumulated(self) -> dict[str, float]:
        return bounds.reference_errors(self.hf, self.truth)

    @cached_property
    def local(self) -> dict[str, float]:
        return bounds.reference_errors(self.hf, self.local_truth)

    @cached_property
    def single(self) -> dict[str, float]:
        """What float32 alone explains: the errors of the equations themselves, in float32 from the tokens on."""
        equations = self.case.equations(self.given, single=True)
        equations.forward(self.tokens)
        return bounds.reference_errors(equations.stages, self.truth)

    @cached_property
    def single_local(self) -> dict[str, float]:
        """As `single`, of each layer on its own."""
        return bounds.reference_errors(self._layer_by_layer(single=True), self.local_truth)

    def explained(self, stage: str, error: float, local: bool) -> float:
        """How far HF may be off. Sharp attention, as training makes it, amplifies rounding: then the equations are asked what
        float32 explains."""
        most, usual = self.case.explained_at_most, bounds.explained_at(self.end)
        if error <= usual or most == bounds.EXPLAINED:
            return usual
        own = (self.single_local if local else self.single)[stage]
        return bounds.explained_by(own, most)

    def bound(self, stage: str, local: bool) -> bounds.Bound:
        errors = self.local if local else self.accumulated
        kind = stages.kind(stage)
        norm = self.hf[stage].shape[-1] if kind in stages.NORMS else 0
        longest = max(self.case.longest, self.length)
        explained = self.explained(stage, errors[stage], local)
        return bounds.bound(errors[stage], self.hf[stage], longest, kind == stages.ROUTING_WEIGHTS, norm, explained)

    def decision(self, stage: str, local: bool) -> Decision:
        return of_stage(stage, self.case.args, self.hf.__getitem__, lambda s: self.bound(s, local), self.case.weights)

    @cached_property
    def untied(self) -> Array:
        """bool [B, S]: tokens that no possible tie comes before, in any layer: what a free run is to give there is certain."""
        torn = np.zeros(self.tokens.shape, bool)
        for stage in self.injections:
            torn |= self.decision(stage, local=False).torn
        return ~np.logical_or.accumulate(torn, axis=1)
