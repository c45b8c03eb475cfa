"""A release and its streams, in the form in which `Judge` holds stages against a reference."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from glm_dsa import ModelArgs
from reference.equations import Conventions, rms_norm

from . import compare, stages, tolerances
from .candidate import to_numpy
from .compare import Distributions
from .release import Release
from .stream import Pass, Ran

Array = np.ndarray
HEAD_ROWS = 8192  # tokens of the vocabulary whose logits are computed at once
HEAD_POSITIONS = 64  # of a prompt, evenly spread: a head of 154,880 x 6144 costs as much as ten layers


@dataclass(frozen=True)
class OnTrial:
    """What the command line asks for. `layers`: those that are run; the others are passed over."""

    headers: Release
    overrides: dict[str, Any]
    tokens: int
    layers: list[int]

    @classmethod
    def of(cls, headers: Release, topk: int | None, tokens: int | None, layers: set[int] | None) -> OnTrial:
        """Raises ValueError, in one line, for what cannot be judged here."""
        if headers.folder is None:
            raise ValueError(f"{headers.origin}: not downloaded; its headers can be audited, its weights are due here")
        overrides = {} if topk is None else {"index_topk": topk}
        args = ModelArgs.from_dict(headers.config, **overrides)
        if args.has_indexer and args.main_rope != "interleaved":
            raise ValueError(f"{headers.origin}: rope_interleave = false, which HF's glm_moe_dsa has no form of")
        length = tokens or max(80, 4 * args.index_topk)
        if length < 2:
            raise ValueError(f"--tokens {tokens}: at least 2 are due")
        chosen = sorted(layers) if layers is not None else list(range(args.num_hidden_layers))
        if chosen[-1] >= args.num_hidden_layers:
            raise ValueError(f"--layers: {headers.origin} has {args.num_hidden_layers} layers, from 0 on")
        return cls(headers, overrides, length, chosen)

    @property
    def folder(self) -> Path:
        assert self.headers.folder is not None
        return self.headers.folder

    @property
    def name(self) -> str:
        return self.headers.origin.rstrip("/").rpartition("/")[2]

    @property
    def args(self) -> ModelArgs:
        return ModelArgs.from_dict(self.headers.config, **self.overrides)


@dataclass(frozen=True)
class Drift:
    """How far the release, run on its own, has come from HF after a layer; in units of the output's rms."""

    error: float
    selection: float | None  # share of HF's selected keys that it selects too
    routing: float | None  # share of experts

    def __str__(self) -> str:
        parts = [f"drift {self.error:.2g}"]
        parts += [f"selection {self.selection:.2%} the same"] if self.selection is not None else []
        parts += [f"experts {self.routing:.2%} the same"] if self.routing is not None else []
        return ", ".join(parts)


@dataclass
class LayerReference:
    """One layer (or the head): HF's stages, how far each lies from the equations, and what full layers left behind."""

    case: Case
    hf: dict[str, Array]
    errors: dict[str, float]
    is_sparse: bool
    length: int

    @property
    def injections(self) -> dict[str, Array]:
        given = {s: v for s, v in self.hf.items() if s.endswith(".topk")}
        return {s: v for s, v in given.items() if self.is_sparse or s.endswith(stages.ROUTING)}

    def bound(self, stage: str, local: bool) -> tolerances.Bound:
        kind = stages.kind(stage)
        norm = self.hf[stage].shape[-1] if kind in stages.NORMS else 0
        longest = max(self.case.longest, self.length)
        return tolerances.bound(self.errors[stage], self.hf[stage], longest, kind == stages.ROUTING_WEIGHTS, norm)


@dataclass
class Case:
    name: str
    args: ModelArgs
    weights: Any

    @property
    def longest(self) -> int:
        """The longest reduction inside the model."""
        a = self.args
        return max(a.hidden_size, a.intermediate_size, a.q_lora_rank, a.num_attention_heads * a.v_head_dim)


@dataclass
class Trial:
    """The pass over a release, advanced as its layers are asked for, in order."""

    release: OnTrial
    seed: int
    worst: dict[str, float] = field(default_factory=dict)  # HF's largest error by kind of stage, so far
    scores: dict[str, Array] = field(default_factory=dict)  # of the last full layer

    def __post_init__(self) -> None:
        release = self.release
        random = np.random.default_rng(self.seed)
        tokens = random.integers(3, release.args.vocab_size, (1, release.tokens))
        conventions = Conventions.of(release.headers.config)
        self.run = Pass(release.folder, conventions, release.overrides, tokens)
        self.case = Case(self.name, self.run.args, self.run.theirs.read)

    @property
    def name(self) -> str:
        return self.release.name

    def layer(self, index: int) -> tuple[LayerReference, dict[str, Any], Drift]:
        """(reference, our stages on HF's input, what has come of the layers before)."""
        ran = self.run.layer(index)
        scores = {s: v for s, v in ran.hf.items() if s.endswith("indexer.scores")}
        self.scores = scores or self.scores
        reference = self._reference(ran.hf | self.scores, ran.truth)
        local: dict[str, Any] = {s: v if v is None else v[:1] for s, v in ran.ours.items()}
        return reference, local, self._drift(index, ran)

    def _reference(self, hf: dict[str, Array], truth: dict[str, Array]) -> LayerReference:
        for stage, error in tolerances.reference_errors(hf, truth).items():
            self.worst[stages.kind(stage)] = max(self.worst.get(stages.kind(stage), 0.0), error)
        errors = {stage: self.worst.get(stages.kind(stage), 0.0) for stage in hf}
        return LayerReference(self.case, hf, errors, self.run.is_sparse, self.run.tokens.shape[1])

    def _drift(self, index: int, ran: Ran) -> Drift:
        error = compare.values(np.array(self.run.own[1:]), self.run.hf.numpy()).error
        keys, experts = (f"layers.{index}.{s}" for s in ("self_attn.indexer.topk", stages.ROUTING))
        allowed = np.tril(np.ones((self.run.tokens.shape[1],) * 2, bool))
        selection = same(ran.ours.get(keys), ran.hf.get(keys), allowed) if self.run.is_sparse else None
        return Drift(error, selection, same(ran.ours.get(experts), ran.hf.get(experts)))

    def logits(self) -> tuple[LayerReference, dict[str, Array], Distributions]:
        run, args = self.run, self.run.args
        length = run.tokens.shape[1]
        at = np.unique(np.linspace(0, length - 1, min(length, HEAD_POSITIONS)).round().astype(int))
        hidden, own = run.theirs.norm(run.hf[:, at]), run.ours.norm(run.own[:, mx.array(at)])
        weight = run.theirs.read("model.norm.weight").astype(np.float64)
        exact = rms_norm(run.hf[:, at].double().numpy(), weight, args.rms_norm_eps)
        parts: dict[str, list[Array]] = {"hf": [], "truth": [], "ours": []}
        for start in range(0, args.vocab_size, HEAD_ROWS):
            rows = slice(start, min(start + HEAD_ROWS, args.vocab_size))
            head = run.theirs.head(rows)
            parts["hf"].append((hidden @ head.T).numpy())
            parts["truth"].append((exact @ head.double().numpy().T).astype(np.float32))
            logits = run.ours.head(own, rows)
            mx.eval(logits)
            parts["ours"].append(np.array(logits))
        hf, truth, ours = (np.concatenate(p, -1) for p in parts.values())
        mine = to_numpy(own)
        assert mine is not None
        reference = self._reference({"norm": hidden.numpy(), "logits": hf}, {"norm": exact, "logits": truth})
        return reference, {"norm": mine[:1], "logits": ours[:1]}, compare.distributions(ours[1:], hf)


def same(ours: Array | None, ref: Array | None, allowed: Array | None = None) -> float | None:
    """The share of ref's choices that ours makes too, in its second row; choices of masked keys left out."""
    if ours is None or ref is None:
        return None
    size = int(max(ours.max(), ref.max())) + 1
    mine, theirs = compare.as_sets(ours[1:], size), compare.as_sets(ref, size)
    if allowed is not None:
        theirs = theirs & allowed[None, :, :size]
    return float((mine & theirs).sum() / theirs.sum())
