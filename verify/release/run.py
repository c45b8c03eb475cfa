"""A release's one pass, in the form in which `Judge` holds stages against a reference."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from glm_dsa import ModelArgs
from reference.equations import Weights

from ..audit.audit import Finding
from ..core import bounds, compare, report, stages
from ..core.checker import Discrepancy, Judge
from ..core.choices import Decision, of_stage
from ..core.compare import Distributions
from ..core.exits import NotJudged
from ..core.progress import peak_memory
from ..engines.base import vocabulary
from ..engines.definition import to_numpy
from ..engines.spec import HF, OURS, Side
from . import cost
from .baseline_timing import Bare
from .layerwise import Pass, Ran
from .request import OnTrial
from .resume import Saved
from .weights import Weighing

Array = np.ndarray
HEAD_POSITIONS = 64  # of a prompt, evenly spread: a head of 154,880 x 6144 costs as much as ten layers
COST_POSITIONS = 512  # of them where torch alone computes


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
    is_half: bool = False
    single: dict[str, float] = field(default_factory=dict)  # what the equations err in float32, where that was asked

    @property
    def injections(self) -> dict[str, Array]:
        return stages.choices(self.hf, self.is_sparse)

    def bound(self, stage: str, local: bool) -> bounds.Bound:
        kind, longest = stages.kind(stage), max(self.case.longest, self.length)
        if self.is_half:
            return bounds.bound_16(self.errors[stage], self.hf[stage], longest, self.case.packed)
        norm = self.hf[stage].shape[-1] if kind in stages.NORMS else 0
        explained = bounds.explained_by(self.single.get(kind, 0.0), bounds.EXPLAINED_AT_MOST)
        return bounds.bound(
            self.errors[stage], self.hf[stage], longest, kind == stages.ROUTING_WEIGHTS, norm, explained
        )

    def decision(self, stage: str, local: bool) -> Decision:
        return of_stage(stage, self.case.args, self.hf.__getitem__, lambda s: self.bound(s, local), self.case.weights)


@dataclass
class Case:
    name: str
    args: ModelArgs
    weights: Weights  # by HF's names
    packed: bool

    @property
    def longest(self) -> int:
        """The longest reduction inside the model."""
        return bounds.longest(self.args)


@dataclass
class Trial:
    """The pass over a release, advanced as its layers are asked for, in order; it can be taken up where it was interrupted.

    costs, findings: by layer, for as long as the run lasts. said: {what was judged: its comparisons, and its failure}.
    """

    release: OnTrial
    seed: int
    saved: Saved | None = None
    tell: Callable[[str], None] = lambda _: None
    passed: Callable[[int, float], None] = lambda *_: None  # a layer, and its seconds
    timed: bool = False
    broken: str = ""  # the layer at which it ended, between two layers: whatever failed there, none is run from then on
    times: dict[int, tuple[float, float]] = field(default_factory=dict)  # seconds, and those of its bare loops
    worst: dict[str, float] = field(default_factory=dict)  # HF's largest error by kind of stage, so far
    single: dict[str, float] = field(default_factory=dict)  # the equations' in float32, where HF's needed explaining
    scores: dict[str, Array] = field(default_factory=dict)  # of the last full layer
    finished: list[int] = field(default_factory=list)
    costs: dict[int, cost.LayerCost] = field(default_factory=dict)
    findings: dict[int, list[Finding]] = field(default_factory=dict)
    said: dict[str, dict[str, Any]] = field(default_factory=dict)
    perplexity: cost.Perplexity | None = None  # of a text, once all layers and the head were run

    def __post_init__(self) -> None:
        release = self.release
        options = {"dtype": "bfloat16" if release.is_half else "float32"}
        side = Side.of(release.headers, OURS, options=options, overrides=release.overrides)
        original = None
        if release.original is not None and release.original.folder is not None:
            original = Side.of(release.original, HF, overrides=release.overrides)
        self.run = Pass(
            side, release.tokens, original, self._beside, lambda s: self.tell(s), release.numberings,
        )  # fmt: skip
        theirs = None if self.run.original is None else self.run.original.layers.read
        layers = self.run.args.num_hidden_layers
        tensors, read = release.headers.tensors, self.run.theirs.layers.read
        self.weighing = Weighing(tensors, read, theirs, layers, release.numberings)
        self.case = Case(self.name, self.run.args, read, release.headers.is_packed)
        if not self._restore():
            self.run.embed()

    def _beside(self, *chunk: Any) -> None:
        self.weighing.experts(*chunk)

    @property
    def name(self) -> str:
        return self.release.name

    def upto(self, layer: int) -> None:
        """Runs what is missing of the layers before and this one; nobody judges them then."""
        for missing in [i for i in self.release.layers if i <= layer and i not in self.finished]:
            self.layer(missing)

    def layer(self, index: int) -> tuple[LayerReference, dict[str, Any], Drift]:
        """(reference, our stages on HF's input, what has come of the layers before)."""
        if self.broken:
            raise NotJudged(f"not run: {self.broken}")  # which has its own verdict
        if index in self.finished:
            raise NotJudged(f"layer {index} was run, and not judged, by the run that was interrupted: start anew")
        before = [i for i in self.release.layers if i < index]
        if before:
            self.upto(before[-1])
        begun = time.monotonic()
        self.tell(f"layer {index}")
        bare = Bare(self.run) if self.timed else None
        self.broken = f"layer {index} ended in an error"
        ran = self.run.layer(index)
        scores = {s: v for s, v in ran.hf.items() if s.endswith("indexer.scores")}
        self.scores = scores or self.scores
        reference = self._reference(ran.hf | self.scores, ran.truth, ran.half)
        if ran.half is None and max(self.worst.values()) > bounds.EXPLAINED:
            errors = bounds.reference_errors(self.run.in_float32(index, ran), ran.truth)
            for stage, error in errors.items():
                self.single[stages.kind(stage)] = max(self.single.get(stages.kind(stage), 0.0), error)
        local: dict[str, Any] = {s: v if v is None else v[:1] for s, v in ran.ours.items()}
        self.tell(f"layer {index}, weights")
        self.findings[index] = self.weighing.layer(index)
        if ran.original:
            numbering = self.release.numberings.get(index)
            self.costs[index] = cost.of_layer(index, ran.hf, ran.original, ran.attended, self.run.is_sparse, numbering)
        self.finished.append(index)
        self.broken = ""  # not before: the pass has moved on, and cannot run this layer again
        seconds = time.monotonic() - begun
        self.passed(index, seconds)
        if bare is not None:
            least = bare.seconds(index)
            self.times[index] = seconds, least
        return reference, local, self._drift(index, ran)

    def _reference(
        self, hf: dict[str, Array], truth: Mapping[str, Array], half: Mapping[str, Array] | None
    ) -> LayerReference:
        """Bounds are by HF's own errors: those of float32, or of bfloat16 where ours runs in it."""
        for stage, error in bounds.reference_errors(half or hf, truth).items():
            self.worst[stages.kind(stage)] = max(self.worst.get(stages.kind(stage), 0.0), error)
        errors = {stage: self.worst.get(stages.kind(stage), 0.0) for stage in hf}
        return LayerReference(
            self.case, hf, errors, self.run.is_sparse, self.run.tokens.shape[1], half is not None, self.single
        )

    def _drift(self, index: int, ran: Ran) -> Drift:
        hf_end, own_end = ran.ends
        error = compare.values(own_end, hf_end).error
        shares: list[float | None] = []
        allowed = np.tril(np.ones((self.run.tokens.shape[1],) * 2, bool))
        for stage, only in (("self_attn.indexer.topk", allowed), (stages.ROUTING, None)):
            ours, hf = ran.ours.get(f"layers.{index}.{stage}"), ran.hf.get(f"layers.{index}.{stage}")
            wanted = ours is not None and hf is not None and (only is None or self.run.is_sparse)
            shares.append(compare.same(ours[1], hf[0], only) if wanted else None)  # type: ignore[index]
        return Drift(error, *shares)

    def logits(self) -> tuple[LayerReference, dict[str, Array], Distributions, cost.Cost | None]:
        """(reference, ours on HF's last hidden, how far ours is on its own, what quantization cost)."""
        run, args = self.run, self.run.args
        self.upto(self.release.layers[-1])
        length = run.tokens.shape[1]
        at = compare.spread(length, HEAD_POSITIONS)
        asked = compare.spread(length - 1, COST_POSITIONS)  # those that a token follows
        theirs, ours = run.theirs.layers, run.ours.layers
        original = None if run.original is None else run.original.layers
        hidden, own = theirs.norm(run.hf[:, at]), ours.norm(run.own[:, mx.array(at)])
        exact = run.truth.norm(run.hf[:, at].double().numpy())
        half = run.half.layers.norm(run.hf[:, at].bfloat16()) if run.half is not None else None
        parts: dict[str, list[Array]] = {p: [] for p in ("hf", "truth", "ours", "half", "release", "original")}
        is_asked = original is not None or self._has_perplexity
        of_release = theirs.norm(run.hf[0, asked])
        if original is not None:
            of_original = original.norm(run.first[1, asked])
        for rows in vocabulary(args):
            self.tell(f"logits, token {rows.start:,} of {args.vocab_size:,}")
            head = theirs.head(rows)
            parts["hf"].append((hidden @ head.T).numpy())
            parts["truth"].append((exact @ head.double().numpy().T).astype(np.float32))
            logits = ours.head(own, rows)
            mx.eval(logits)
            parts["ours"].append(np.array(logits.astype(mx.float32)))
            if half is not None:
                parts["half"].append((half @ head.bfloat16().T).float().numpy())
            if is_asked:
                parts["release"].append((of_release @ head.T).numpy())
            if original is not None:
                parts["original"].append((of_original @ original.head(rows).T).numpy())
        whole = {name: np.concatenate(p, -1) for name, p in parts.items() if p}
        reference = self._reference(
            {"norm": hidden.numpy(), "logits": whole["hf"]},
            {"norm": exact, "logits": whole["truth"]},
            None if half is None else {"norm": half.float().numpy(), "logits": whole["half"]},
        )
        paid = None
        if original is not None:
            paid = cost.of_logits(whole["release"], whole["original"], run.tokens[0, asked + 1])
        if self._has_perplexity:
            self._measure_perplexity(whole["release"], paid, run.tokens[0, asked + 1])
        mine = whole["ours"]
        return reference, {"norm": to_numpy(own)[:1], "logits": mine[:1]}, compare.distributions(mine[1:], whole["hf"]), paid

    @property
    def _has_perplexity(self) -> bool:
        return self.release.prompt.is_text and self.release.is_whole

    def _measure_perplexity(self, logits: Array, paid: cost.Cost | None, following: Array) -> None:
        own = cost.perplexity(logits, following) if paid is None else paid.release_perplexity
        theirs = None if paid is None else paid.original_perplexity
        self.perplexity = cost.Perplexity(own, theirs, self.release.args.vocab_size, self.release.run_on)

    def dropped(self) -> str:
        """What share of the original's routing went to experts that a pruned build has not; empty where nothing was dropped."""
        shares = {i: (c.dropped, c.dropped_weight) for i, c in self.costs.items() if c.dropped is not None}
        return cost.dropped_line(shares) if shares else ""  # type: ignore[arg-type]

    def time_of(self, layers: Iterable[int]) -> str:
        spent, least = (sum(part) for part in zip(*(self.times[i] for i in layers), strict=True))
        return f"{spent:.1f} s, {spent / least:.2f} times the bare loops' {least:.1f} s; peak memory {peak_memory():.2f} GiB"

    # -- judged once, though the run be interrupted

    def once(self, judge: Judge, what: str, check: Callable[[], None]) -> None:
        """Judges, or says again what an interrupted run found. `check` raises `Discrepancy`."""
        if what in self.said:
            for record in self.said[what]["comparisons"]:
                judge.report.add(report.Comparison(**record))
            if (failure := self.said[what]["failure"]) is not None:
                raise Discrepancy(failure)
            return
        before = len(judge.report.comparisons)
        try:
            check()
        except Discrepancy as error:
            self._say(what, judge, before, str(error))
            raise
        self._say(what, judge, before, None)

    def _say(self, what: str, judge: Judge, before: int, failure: str | None) -> None:
        self.said[what] = {"comparisons": [asdict(c) for c in judge.report.comparisons[before:]], "failure": failure}
        self._save()

    def _save(self) -> None:
        if self.saved is None or self.broken:  # the streams are not those after the last finished layer
            return
        facts = {
            "worst": self.worst, "single": self.single, "finished": self.finished, "said": self.said,
            "costs": {i: asdict(c) for i, c in self.costs.items()},
            "findings": {i: [asdict(f) for f in found] for i, found in self.findings.items()},
        }  # fmt: skip
        scores = {f"scores.{stage}": value for stage, value in self.scores.items()}
        self.saved.save(self.run.state() | scores, facts)

    def _restore(self) -> bool:
        found = None if self.saved is None else self.saved.load()
        if found is None:
            return False
        state, facts = found
        self.run.restore(state)
        self.scores = {n.removeprefix("scores."): a for n, a in state.items() if n.startswith("scores.")}
        self.single = facts["single"]
        self.worst, self.finished, self.said = facts["worst"], facts["finished"], facts["said"]
        self.costs = {int(i): cost.LayerCost(**c) for i, c in facts["costs"].items()}
        self.findings = {int(i): [Finding(**f) for f in found] for i, found in facts["findings"].items()}
        return True
