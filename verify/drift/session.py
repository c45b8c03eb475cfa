"""The course of a comparison: what is run, in which order, and what is left out of a model too large for it.

Over 400 lines, in one file: each step goes on with what those before it found, and the course is read from top to bottom."""

from __future__ import annotations

import datetime
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from glm_dsa import ModelArgs, memory
from reference import layout
from reference.stored import read_tensors

from ..core import compare, stages
from ..core.report import FAULT
from ..engines import base, layout_evidence, pruning
from ..engines.recording import HIDDEN, Hearing, Recording, is_given
from ..engines.registry import engine_of
from ..engines.spec import EQUATIONS, HF, ORACLES, OURS, Side
from ..engines.third_party import Failed
from ..release import cost
from . import sensitivity
from .bit_allocation import Choice, recipe
from .build import Build
from .cache_check import examine
from .checks import Wanted, check_shapes, config_differences, numbered, on_device, same_weights
from .diagnosis import Lineup
from .hypotheses import Diagnosis
from .patching import repair
from .prompts import Prompt
from .remaining import remaining
from .result import Choices, Drift, Growth, Token
from .stagewise import LOCAL, OWN, Compared, Yardstick, compared, roots

Array = np.ndarray
LOGITS = 1 << 28  # bytes of logits that are kept: of longer prompts with large vocabularies, evenly spread positions
TOO_LARGE = "larger than 1 GiB: --thorough runs the model some 20 times more for it"
NEEDS_PACKED = "for a packed candidate beside a reference that is not"
OTHER_EXPERTS = "the candidate's experts are not the reference's, in its order: nothing can be exchanged one for one"


@dataclass
class Session:
    """`thorough`: a large model too is run again for counterfactuals beyond the likely ones, repair and sensitivity."""

    candidate: Side
    reference: Side
    prompt: Prompt
    wanted: Wanted = field(default_factory=Wanted)
    thorough: bool = False
    repair: bool = True
    suggest: float | None = None
    without: Sequence[str] = ()  # faults that are not to be suspected
    tell: Callable[[str], None] = lambda _: None
    keep: Callable[[dict[str, Recording]], None] | None = None
    recordings: dict[str, Recording] = field(default_factory=dict)
    blanks: int = 0

    def run(self) -> Drift:
        """Raises ValueError, GlmDsaError and Failed, each in one line, for what cannot be compared."""
        begun = time.monotonic()
        check_shapes(self.candidate, self.reference)
        self.candidate = numbered(self.candidate, self.reference)
        self._check_wanted()
        for side in (self.candidate, self.reference):
            if not side.is_small:
                size = memory.gib(sum(t.nbytes for t in side.release.tensors.values()))
                memory.log.info("%s: weights take %s; they are read a layer at a time", side.checkpoint, size)
        with ExitStack() as stack:
            self.scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="drift-")))
            found = self._run()
            if self.keep is not None:
                self.keep(self.recordings)
        found.seconds = time.monotonic() - begun
        found.date = datetime.date.today().isoformat()
        return found

    def _check_wanted(self) -> None:
        """What nothing would come of, before anything runs."""
        args, wanted = self.reference.args, self.wanted
        count = args.num_hidden_layers + args.num_nextn_predict_layers
        if wanted.layers is not None and (beyond := [n for n in wanted.layers if not 0 <= n < count]):
            raise ValueError(f"--layers {beyond[0]}: the model has {count} layers, from 0 on")
        every = ["embed", "norm", "logits", *(f"layers.{n}.{kind}" for n in range(count) for kind in stages.IN_LAYER)]
        if not any(map(wanted, every)):
            raise ValueError(f"--stages {wanted.stages}: no stage of this name; self_attn.indexer.*, say")
        if self.suggest is not None and not 2 <= self.suggest <= 16:
            raise ValueError(f"--suggest-bits {self.suggest:g}: expected 2 to 16 bits")
        if self.suggest is not None and (not self.candidate.release.is_packed or self.reference.release.is_packed):
            raise ValueError(f"--suggest-bits {self.suggest:g}: {NEEDS_PACKED}")
        if self.suggest is not None and self.candidate.numberings:
            raise ValueError(f"--suggest-bits {self.suggest:g}: {OTHER_EXPERTS}")
        if self.suggest is not None and not self.in_full:
            raise ValueError(f"--suggest-bits {self.suggest:g}: the model is {TOO_LARGE}")
        if self.suggest is not None:
            Choice(self.build).check(self.suggest)
        if self.is_measured and self.thorough:
            both = memory.taken(self.build.model) + memory.taken(self.build.whole)
            memory.check(f"--thorough: {self.candidate.checkpoint} and {self.reference.checkpoint}, both in full,", both,
                         "without --thorough drift goes through them a layer at a time")  # fmt: skip

    @property
    def is_measured(self) -> bool:
        """What the bits cost: both models are in memory for that."""
        return self.in_full and self.candidate.release.is_packed and not self.reference.release.is_packed

    @cached_property
    def build(self) -> Build:
        """Lazy: it holds nothing yet."""
        return Build(self.candidate, self.reference)

    @property
    def in_full(self) -> bool:
        return self.thorough or (self.candidate.is_small and self.reference.is_small)

    def _run(self) -> Drift:
        args, tokens = self.reference.args, self.prompt.tokens
        self.at = compare.spread(tokens.shape[1], max(2, LOGITS // (4 * args.vocab_size)))
        same = same_weights(self.candidate, self.reference)
        found = Drift(self.candidate, self.reference, tokens.shape[1], self.prompt.source, same)
        found.labels = {"layers": _layers(args), "layout": self.candidate.args.indexer_rope}
        if args.has_indexer and not self.is_sparse:
            found.reasons["selection"] = (
                f"{tokens.shape[1]} tokens are within index_topk = {args.index_topk}: all keys are selected"
            )
        if self.prompt.note:
            found.notes.append(self.prompt.note)
        reference = self._recorded("reference", self.reference)
        yard = self._yardstick(self.reference, reference, self.candidate)
        self._check_reference(reference, yard, found)
        local, own = self._candidate(reference)
        both = [*compared(LOCAL, local, reference, yard, same), *compared(OWN, own, reference, yard, False)]
        is_pruned = pruning.is_pruned(self.candidate.args, self.reference.args)
        if not (same or is_pruned or any(c.verdict == FAULT for c in compared(LOCAL, local, reference, yard))):
            found.same_weights = same = True  # stored otherwise, and meant alike
            both = [*compared(LOCAL, local, reference, yard), *compared(OWN, own, reference, yard, False)]
        found.comparisons = [c for c in both if self.wanted(c.stage)]
        every = [c for c in both if c.run == LOCAL]
        faults = [c for c in every if c.verdict == FAULT]
        found.divergence = next((c for c in faults if self.wanted(c.stage)), None)
        found.elsewhere = faults[0] if faults and found.divergence is None else None
        found.unseen = _unseen(args, every)
        found.config = config_differences(self.candidate.args, self.reference.args)
        found.experts = self._experts(reference)
        found.experts += [remaining(local, reference, yard)] if is_pruned else []
        self._figures(found, reference, own)
        if same:
            found.diagnosis = self._diagnosed(self.reference, (reference, local), yard, every)
        else:
            self._of_own_weights(found)
        self._explain(found, (reference, local, own))
        self._cached(found, own, yard)
        if not same:
            self._sensitivity(found, reference)
        self._mass(found)
        return found

    # -- runs

    def _recorded(
        self, name: str, side: Side, beside: Recording | None = None, given: Callable[[str], bool] | None = None
    ) -> Recording:
        """A run of its own, or beside another: what is `given` is the other's (by default input and choices)."""
        self.tell(f"{name}: {side.runs}")
        into = self._blank()
        given = given or (lambda stage: beside is not None and is_given(stage, self.is_sparse))
        with on_device(side.device):
            base.run(engine_of(side), self.prompt.tokens, self.at, Hearing(into, beside, given))
        self.recordings[name] = into
        return into

    def _blank(self) -> Recording:
        """In memory, or of a large model on disk."""
        if self.candidate.is_small and self.reference.is_small:
            return Recording()
        self.blanks += 1
        return Recording(self.scratch / str(self.blanks))

    @property
    def is_sparse(self) -> bool:
        return 0 < self.reference.args.index_topk < self.prompt.tokens.shape[1]

    def _candidate(self, reference: Recording) -> tuple[Recording, Recording]:
        """(on the reference's inputs, on its own)."""
        local = self._recorded("candidate local", self.candidate, reference)
        return local, self._recorded("candidate own", self.candidate)

    def _yardstick(self, side: Side, reference: Recording, candidate: Side) -> Yardstick:
        """What arithmetic explains, in the coarser precision of both sides."""
        dtype = next((s.dtype for s in (candidate, side) if s.dtype in ("bfloat16", "float16")), "float32")
        truth = self._recorded(f"truth of {side.checkpoint}", side.on(EQUATIONS, overrides=side.overrides), reference)
        oracle = side.on(HF, overrides=side.overrides)
        is_it = side.implementation == HF and side.dtype == "float32" == dtype
        hf = reference if is_it else self._recorded(
            f"HF in {dtype} beside it", replace(oracle, options={**oracle.options, "dtype": dtype}), reference)  # fmt: skip
        return Yardstick(side.args, read_tensors(side.folder), hf, truth, dtype != "float32")

    def _check_reference(self, reference: Recording, yard: Yardstick, found: Drift) -> None:
        """A reference that is none."""
        if self.reference.implementation in ORACLES:
            return
        wrong = next((c for c in compared(LOCAL, reference, yard.truth, yard) if c.verdict == FAULT), None)
        if wrong is not None:
            found.notes.append(
                f"the reference itself differs from the equations at {wrong.stage}: hold it to hf@ first"
            )

    # -- what it says

    def _experts(self, reference: Recording) -> list[str]:
        """Where the candidate's experts are not the reference's, in its order: which are there, and what the others did."""
        found = self.candidate.numberings
        shares = {}
        for layer, numbering in found.items():
            chosen, weights = (reference.get(f"layers.{layer}.{s}") for s in (stages.ROUTING, stages.ROUTING_WEIGHTS))
            if numbering.dropped.size and chosen is not None and weights is not None:
                of_chosen = np.take_along_axis(weights, chosen.astype(np.int64), -1)
                shares[layer] = cost.of_dropped(chosen, of_chosen, numbering)
        told = [*pruning.lines(found), *pruning.groups(self.candidate.args, self.reference.args)]
        others = pruning.strangers(found)
        more = [f"and so in {len(others) - pruning.SHOWN} layers more"] if others[pruning.SHOWN :] else []
        return [*told, *([cost.dropped_line(shares)] if shares else []), *others[: pruning.SHOWN], *more]

    def _figures(self, found: Drift, reference: Recording, own: Recording) -> None:
        """Growth and choices: each layer on the reference's input, under choices of its own, beside the candidate alone."""
        args, sparse = self.reference.args, self.is_sparse
        local = self._recorded(
            "candidate, layer by layer", self.candidate, reference, lambda s: stages.kind(s) in HIDDEN
        )
        before: float | None = None
        for layer in range(args.num_hidden_layers):
            stage = f"layers.{layer}.output"
            if stage not in own:
                continue
            errors = [_relative(r[stage], reference[stage]) for r in (local, own)]
            gain = errors[1] / before if before else None
            before = errors[1]
            found.growth.append(Growth(layer, errors[0], errors[1], gain))
        allowed = np.tril(np.ones((self.prompt.tokens.shape[1],) * 2, bool))
        for layer in range(args.num_hidden_layers):
            parts: list[float | None] = []
            for kind, only in (("self_attn.indexer.topk", allowed), (stages.ROUTING, None)):
                stage = f"layers.{layer}.{kind}"
                parts += [_same(r.get(stage), reference.get(stage), only, sparse) for r in (local, own)]
            found.choices.append(Choices(layer, parts[0], parts[1], parts[2], parts[3]))
        self._tokens(found, reference.get("logits"), own.get("logits"))

    def _tokens(self, found: Drift, due: Array | None, mine: Array | None) -> None:
        if due is None or mine is None or due.shape != mine.shape or not np.isfinite(mine).all():
            found.reasons["tokens"] = "the candidate gives no logits of the whole prompt that are finite"
            return
        ids = self.prompt.tokens[0]
        kl = compare.kl_by_position(mine, due)
        follows = [i for i, at in enumerate(self.at) if at + 1 < len(ids)]
        d = compare.distributions(mine, due)
        said = cost.of_logits(mine[follows], due[follows], ids[self.at[follows] + 1])
        found.distributions = {
            "kl_mean": d.kl_mean, "kl_p95": d.kl_p95, "kl_max": d.kl_max, "top1": d.top1,
            "reference_perplexity": said.original_perplexity, "candidate_perplexity": said.release_perplexity,
        }  # fmt: skip
        best = np.argmax(due, -1), np.argmax(mine, -1)
        for i, position in enumerate(self.at):
            word = self.prompt.word
            found.tokens.append(Token(int(position), int(ids[position]), word(ids[position]), float(kl[i]),
                                      bool(best[0][i] == best[1][i]), word(best[0][i]), word(best[1][i])))  # fmt: skip

    def _diagnosed(
        self, side: Side, recordings: tuple[Recording, Recording], yard: Yardstick, every: list[Compared]
    ) -> Diagnosis | None:
        if not roots(every):
            return None
        handed = self.candidate.implementation not in (OURS, EQUATIONS)  # weights with its experts
        lineup = Lineup(
            side, self.prompt.tokens, self.at, recordings, yard, self.without, self.in_full, handed, self.tell,
            self._blank, self.candidate,
        )  # fmt: skip
        return lineup.diagnose(every)

    def _of_own_weights(self, found: Drift) -> None:
        """Other weights: is the code right on them?"""
        candidate = replace(self.candidate, numberings={}) if self.candidate.numberings else self.candidate
        side = candidate.on(HF, overrides=candidate.overrides)
        if candidate.implementation == HF:
            return
        reference = self._recorded("HF on the candidate's weights", side)
        yard = self._yardstick(side, reference, candidate)
        local = self._recorded("candidate on its own weights local", candidate, reference)
        own = Drift(self.candidate, side, found.length, found.prompt, True, labels=found.labels)
        own.comparisons = list(compared(LOCAL, local, reference, yard))
        own.unseen = _unseen(side.args, own.comparisons)
        own.divergence = next((c for c in own.comparisons if c.verdict == FAULT), None)
        own.diagnosis = self._diagnosed(side, (reference, local), yard, own.comparisons)
        found.own_weights = own

    def _explain(self, found: Drift, recordings: tuple[Recording, Recording, Recording]) -> None:
        is_packed = self.candidate.release.is_packed and not self.reference.release.is_packed
        is_sound = found.divergence is None and found.elsewhere is None and found.same_weights
        if is_sound or (is_packed and not found.same_weights):
            return  # nothing to explain; or `_sensitivity` tells more
        if not self.repair:
            found.reasons["repair"] = "not asked for"
            return
        if not self.in_full:
            found.reasons["repair"] = TOO_LARGE
            return
        try:
            with on_device(self.candidate.device):
                found.repair = repair(engine_of(self.candidate), self.prompt.tokens, self.at, recordings, self.tell)
        except (Failed, RuntimeError, ValueError) as error:
            found.reasons["repair"] = f"the candidate does not go on with the reference's outputs: {error}"

    def _cached(self, found: Drift, own: Recording, yard: Yardstick) -> None:
        """In several calls, where it is right in one."""
        without, length = own.get("logits"), self.prompt.tokens.shape[1]
        if self.candidate.implementation in ORACLES or not found.same_weights:
            return
        if found.divergence is not None or found.elsewhere is not None:
            return  # one thing after the other
        if not self.in_full:
            found.reasons["cache"] = TOO_LARGE
        elif without is None or len(without) < length:
            found.reasons["cache"] = "expected logits of the whole prompt"
        else:
            self.tell("candidate in several calls, with a cache")
            with on_device(self.candidate.device):
                bound = yard.bound("logits").value
                found.cached = examine(self.candidate, self.prompt.tokens, without, bound, self.without, self.tell)

    def _sensitivity(self, found: Drift, reference: Recording) -> None:
        packed, original = self.candidate.release.is_packed, self.reference.release.is_packed
        if not packed or original:
            found.reasons["sensitivity"] = NEEDS_PACKED
        elif self.candidate.numberings:
            found.reasons["sensitivity"] = OTHER_EXPERTS
        elif not self.in_full:
            found.reasons["sensitivity"] = TOO_LARGE
        else:
            due = reference["logits"]
            assert due is not None
            found.sensitivity = sensitivity.measure(self.build, self.prompt.tokens, due, self.tell)
        if self.suggest is not None and found.sensitivity is not None:
            found.sensitivity.recipe = recipe(found.sensitivity, self.build, self.suggest)

    def _mass(self, found: Drift) -> None:
        """What the candidate's weights tell of the layout that its indexers were trained under."""
        side, args = self.candidate, self.candidate.args
        if not args.has_indexer:
            return
        if self.prompt.note:
            found.reasons["mass"] = (
                f"needs a text of at least {layout.TEXTS} times {layout_evidence.TIMES} index_topk tokens"
            )
            return
        try:
            texts = layout_evidence.pieces(self.prompt.every, layout_evidence.length_of(args))
        except ValueError as error:
            found.reasons["mass"] = str(error)
            return
        if not side.is_small and not self.thorough:
            found.reasons["mass"] = TOO_LARGE
            return
        self.tell("attention mass of both RoPE layouts")
        try:
            found.mass = layout_evidence.measure(side.folder, dict(side.release.config) | side.changes, args, texts)
        except (ValueError, MemoryError) as error:
            found.reasons["mass"] = str(error)
            return
        found.mass_by_layer = [
            {"layer": i, "interleaved": mass["interleaved"], "half_split": mass["half-split"], "chance": mass["chance"]}
            for i, mass in found.mass.by_layer.items()
        ]


# -- figures


def _unseen(args: ModelArgs, found: list[Compared]) -> list[str]:
    """Outputs that the candidate does not show: there nothing was compared."""
    seen = {c.stage for c in found}
    due = [*(f"layers.{i}.output" for i in range(args.num_hidden_layers)), "logits"]
    return [stage for stage in due if stage not in seen]


def _layers(args: ModelArgs) -> list[dict[str, Any]]:
    count = args.num_hidden_layers + args.num_nextn_predict_layers
    indexers = ["none" if not args.has_indexer else "full" if args.runs_indexer(i) else "shared" for i in range(count)]
    return [
        {"layer": i, "indexer": indexers[i], "mlp": "sparse" if args.is_sparse(i) else "dense",
         "mtp": i >= args.num_hidden_layers}
        for i in range(count)
    ]  # fmt: skip


def _relative(ours: Array | None, ref: Array | None) -> float:
    assert ref is not None
    return np.inf if ours is None else compare.relative(ours, ref)


def _same(ours: Array | None, ref: Array | None, allowed: Array | None, sparse: bool) -> float | None:
    if allowed is not None and not sparse:
        return None
    return None if ours is None or ref is None else compare.same(ours, ref, allowed)
