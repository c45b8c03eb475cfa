"""What is wrong, told by making it wrong: conventions switched and catalogued mistakes made in this project's definition, one
after another, until it gives what the candidate gives.

Each is tried on the first layer that differs, up to the stage that differs; whatever fits there is held against all layers. Of
several mistakes the first is found first, and the others beside it. What nothing reproduces stays unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from glm_dsa import ModelArgs
from glm_dsa.errors import GlmDsaError
from glm_dsa.store import GROUP_SIZES

from .. import compare, faults, stages
from ..judge import biased_scores
from ..judging import recorded
from ..report import AGREES, FAULT
from .comparing import CHOICES, LOCAL, Compared, Yardstick, component, roots, same_experts
from .recording import Enough, Hearing, Recording, is_given
from .runners import OurRunner
from .sides import OURS, Side

Array = np.ndarray
EXACT = (
    4.0  # how many bounds a mistake made here may lie from the candidate's: each errs, and the mistake may amplify it
)
STEPS_APART = 0.01  # of a stage's entries, the share that may be a rounding step apart
UNEXPLAINED = 0.25  # of a mistake's effect (its square), what those may leave
FLIPS = 0.01  # of choices, the share that may differ: near ties under scores that the mistake has changed
MOST = 3  # mistakes that are looked for beside each other
# what a convention at this value (None: any) is called in the catalogue
KNOWN_AS = {
    ("indexer_rope", None): "indexer-rope-layout",
    ("indexer_norm_eps", 1e-5): "indexer-eps",
    ("main_rope", "half-split"): "mla-rope-half",
}
VERIFIED = 6  # suspects of a kind that are held against all layers


@dataclass(frozen=True)
class Suspect:
    """how: "convention", "catalogue" or "option". overrides: of `ModelArgs`; options: of a `Side`; fault: of the catalogue;
    known_as: the fault that a convention at this value is."""

    how: str
    name: str
    text: str
    overrides: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    fault: str = ""
    kind: str = ""  # where the catalogue says that it shows first
    where: tuple[str, ...] = ()  # the functions that it changes
    known_as: str = ""


@dataclass
class Cause:
    """A mistake that reproduces the candidate. exact: the worst remaining error at the stages that it explains, in bounds.
    alike: others that give the same on this prompt. left: kinds of stages that it leaves unexplained."""

    suspect: Suspect
    stages: tuple[str, ...]
    layers: tuple[int, ...]
    exact: float
    alike: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


@dataclass
class Diagnosis:
    """component: to blame by the stages that differ by themselves; unknown: stages that no suspect explains."""

    causes: list[Cause]
    component: str
    unknown: list[Compared]
    tried: int


def conventions(args: ModelArgs) -> Iterator[Suspect]:
    """Each convention, at every other value that implementations have."""
    other = {"interleaved": "half-split", "half-split": "interleaved"}
    values: dict[str, list[Any]] = {
        "main_rope": [other[args.main_rope]],
        "latent_norm_eps": [1e-5, 1e-6, args.rms_norm_eps],
    }
    if args.has_indexer:
        values |= {
            "indexer_rope": [other[args.indexer_rope]],
            "indexer_norm_eps": [1e-5, 1e-6, args.rms_norm_eps, 1e-12],
            "index_topk": [2048, 2 * args.index_topk, args.index_topk // 2],
        }
    if args.num_nextn_predict_layers:
        values["mtp_zero_first_embedding"] = [not args.mtp_zero_first_embedding]
    for name, others in values.items():
        own = getattr(args, name)
        for value in dict.fromkeys(others):
            if value != own and value:
                known = KNOWN_AS.get((name, value), KNOWN_AS.get((name, None), ""))
                text = f"{name} = {own} is in force on the reference's side"
                yield Suspect("convention", f"{name} = {value}", text, {name: value}, kind=name, known_as=known)


def packed_caches(args: ModelArgs) -> Iterator[Suspect]:
    """A KV cache in few bits, in every group size that fits: no mistake, but it shows."""
    for size in (g for g in GROUP_SIZES if args.kv_lora_rank % g == 0 and args.qk_rope_head_dim % g == 0):
        for bits in (8, 4):
            text = "latents and rotary keys are packed, and read back before they are attended to"
            options = {"kv_bits": bits, "kv_group_size": size}
            yield Suspect(
                "option", f"KV cache in {bits} bit, groups of {size}", text, options=options, kind="self_attn.heads"
            )


def catalogue(without: Sequence[str] = ()) -> Iterator[Suspect]:
    for f in faults.CATALOGUE.values():
        if not f.equivalent and f.name not in without:
            yield Suspect(
                "catalogue", f.name, f.what, fault=f.name, kind=f.stage, where=tuple(e.where for e in f.edits)
            )


class Lineup:
    """The suspects, beside a candidate's local recording. `reference`: the side whose weights and inputs that ran on."""

    def __init__(
        self, reference: Side, tokens: Array, at: Array, recordings: tuple[Recording, Recording], yard: Yardstick,
        without: Sequence[str] = (), thorough: bool = True, hands_weights: bool = False,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:  # fmt: skip
        """recordings: (the reference's, the candidate's on its inputs). without: faults that are not to be suspected.
        thorough: suspect also what is said to show at other stages than those that differ. hands_weights: the candidate
        was handed experts with their weights."""
        self.side, self.tokens, self.at, self.yard, self.tell = reference.on(OURS), tokens, at, yard, tell
        self.reference, self.theirs = recordings
        self.without, self.thorough, self.hands_weights = without, thorough, hands_weights
        self.tried = 0

    # -- the search

    def diagnose(self, found: list[Compared]) -> Diagnosis:
        """found: the candidate's local comparisons."""
        left = roots(found)
        blamed = component({c.kind for c in left})
        causes: list[Cause] = []
        suspects = self._suspects() if left else []
        while left and len(causes) < MOST:
            best = self._best([c.suspect for c in causes], left, suspects)
            if best is None:
                break
            cause, left = best
            causes.append(cause)
            self.tell(f"cause: {cause.suspect.name}")
        return Diagnosis(causes, blamed, left, self.tried)

    def _suspects(self) -> list[Suspect]:
        """Whatever runs at all on such a prompt."""
        with recorded() as ran:
            self.whole([])
        running = [s for s in catalogue(self.without) if all(w in ran for w in s.where)]
        return [*conventions(self.side.args), *packed_caches(self.side.args), *running]

    def _best(
        self, known: list[Suspect], left: list[Compared], suspects: list[Suspect]
    ) -> tuple[Cause, list[Compared]] | None:
        kinds = {c.kind for c in left}
        likely = [s for s in suspects if s.how == "convention" or s.kind in kinds]
        for group in (likely, [s for s in suspects if s not in likely] if self.thorough else []):
            fitting = sorted(self._fitting(known, left, group), key=lambda item: -item[1])
            judged = [v for s, _ in fitting[:VERIFIED] if (v := self._verified(known, s, left)) is not None]
            if judged:
                judged.sort(key=lambda v: len({c.kind for c in v[1]}))
                least = len({c.kind for c in judged[0][1]})
                cause, rest = judged[0]
                alike = [v[0].suspect.name for v in judged[1:] if len({c.kind for c in v[1]}) == least]
                return replace(cause, alike=tuple(alike)), rest
        return None

    def _fitting(
        self, known: list[Suspect], left: list[Compared], group: list[Suspect]
    ) -> Iterator[tuple[Suspect, int]]:
        """(suspect, how many of the first layer's differences it reproduces), and contradicts nothing."""
        first = [c for c in left if c.layer == left[0].layer]
        for suspect in group:
            if any(suspect is k or set(suspect.overrides) & set(k.overrides) for k in known):
                continue  # a convention has one value
            if first[0].layer is None and not _is_global(suspect):
                continue
            self.tried += 1
            self.tell(f"suspect: {suspect.name}")
            seen = self.alone(first, [*known, suspect])
            if seen is None:
                continue
            fits = sum(self.share(c.stage, seen) <= EXACT for c in first)
            if fits and not self._contradicts(seen, {c.stage for c in first}):
                yield suspect, fits

    def _contradicts(self, seen: Recording, wanted: set[str]) -> bool:
        """Whether a mistake shows where the candidate is sound. (Behind a difference that is left, nothing can be told.)"""
        at_fault = set(wanted)
        for stage in seen:
            if stage not in self.theirs or stage in at_fault:
                continue
            if self._sound(stage) and self.share(stage, seen) > EXACT:
                return True
        return False

    def _sound(self, stage: str) -> bool:
        return self.share(stage, self.reference) <= EXACT

    def _verified(
        self, known: list[Suspect], suspect: Suspect, left: list[Compared]
    ) -> tuple[Cause, list[Compared]] | None:
        """(the cause, what it leaves) where the kinds of stages that it explains are explained in every layer."""
        seen = self.whole([*known, suspect])
        if seen is None or (known and self._first_changed(known, seen) not in {c.kind for c in left}):
            return None
        rest = roots([self._told(stage, seen) for stage in self.theirs if stage in seen])
        kinds, remaining = {c.kind for c in left}, {c.kind for c in rest}
        explained = sorted(kinds - remaining, key=lambda kind: [c.kind for c in left].index(kind))
        if not explained or left[0].kind not in explained:
            return None
        mine = [c for c in left if c.kind in explained]
        exact = max(self.share(c.stage, seen) for c in mine)
        layers = sorted({c.layer for c in mine if c.layer is not None})
        return Cause(suspect, tuple(explained), tuple(layers), exact, left=tuple(sorted(remaining))), rest

    def _first_changed(self, known: list[Suspect], seen: Recording) -> str:
        """The kind of stage at which one mistake more shows first. (What is left behind others may be noise that they amplify:
        anything that stirs it would pass for its cause.)"""
        before = self.whole(known)
        assert before is not None
        for stage in self.theirs:
            pair = [run.get(stage) for run in (before, seen)]
            if stage in seen and not _same(*pair):
                return stages.kind(stage)
        return ""

    # -- held against the candidate

    def _told(self, stage: str, seen: Recording) -> Compared:
        share = self.share(stage, seen)
        return Compared(
            stage, LOCAL, FAULT if share > EXACT else AGREES, share, 1.0, handed=stage in self.theirs.handed
        )

    def share(self, stage: str, seen: Recording) -> float:
        """How far another run's stage is from the candidate's, in bounds; of choices, 0 or infinite."""
        mine, theirs, kind = seen.get(stage), self.theirs.get(stage), stages.kind(stage)
        if kind in CHOICES:
            return self._choice(stage, mine, theirs, seen)
        if mine is None or theirs is None or stage not in self.yard.errors:
            return 0.0 if mine is None and theirs is None else np.inf
        if kind == stages.ROUTING_WEIGHTS:
            rows = same_experts(mine, theirs)
            if not rows.any():
                return 0.0
            mine, theirs = mine[rows], theirs[rows]
        bound, found = self.yard.bound(stage).value, compare.values(mine, theirs)
        share = found.error / bound
        if share <= EXACT or found.problem:
            return share
        return self._rounded(stage, mine, theirs, bound, share)

    def _rounded(self, stage: str, mine: Array, theirs: Array, bound: float, share: float) -> float:
        """A mistake that rounds to 16 bit rounds a value between two neighbours either way: a few entries are a step apart,
        the others are as they should be."""
        ref = self.reference.get(stage)
        if ref is None or ref.shape != theirs.shape:
            return share
        finite = np.isfinite(theirs) & (np.abs(theirs) < 1e38) & np.isfinite(ref)
        gap, effect = (np.where(finite, a - theirs, 0).astype(np.float64) for a in (mine, ref))
        scale = np.sqrt(np.mean(theirs[finite].astype(np.float64) ** 2))
        apart = (np.abs(gap) > EXACT * bound * scale).mean()
        is_small = (gap**2).sum() <= UNEXPLAINED * (effect**2).sum()
        return EXACT if apart <= STEPS_APART and is_small else share

    def _choice(self, stage: str, mine: Array | None, theirs: Array | None, seen: Recording) -> float:
        """By the scores of the run that makes the mistake, where it shows them: under them the ties are."""
        scored = self.yard.scored(stage)
        if mine is None or theirs is None:  # every key
            mine, theirs = None, mine if theirs is None else theirs
        if scored is None or theirs is None:
            return 0.0 if mine is None and theirs is None else np.inf
        scores, topk, noise = scored
        own = self._scores(stage, seen)
        if own is not None:
            ratio = _rms(own) / (_rms(scores) or 1.0)
            scores, noise = own, noise * max(ratio, 1.0)
        found = compare.selections(
            None if mine is None else mine[None], theirs[None], scores[None], topk, EXACT * noise
        )
        return 0.0 if found.faults <= FLIPS * found.queries else np.inf

    def _scores(self, stage: str, seen: Recording) -> Array | None:
        """What another run chose by."""
        if stages.kind(stage) != stages.ROUTING:
            return seen.get(stage.removesuffix("topk") + "scores")
        logits, args = seen.get(stage.removesuffix("topk") + "logits"), self.side.args
        if logits is None:
            return None
        bias = self.yard.read(f"model.{stage.removesuffix('topk')}e_score_correction_bias")
        return biased_scores(logits, bias, args.n_group, args.topk_group)

    # -- runs

    def _is_given(self, stage: str) -> bool:
        """What the candidate was handed, and took: where it selects nothing at all, nothing can be put in its place."""
        is_choice = stages.kind(stage) in CHOICES and stage in self.theirs
        return is_given(stage, self.yard.is_sparse) and (not is_choice or stage in self.theirs.handed)

    def _runner(self, suspects: Sequence[Suspect]) -> tuple[OurRunner, AbstractContextManager[None]]:
        overrides, options = dict(self.side.overrides), dict(self.side.options)
        for suspect in suspects:
            overrides |= suspect.overrides
            options |= suspect.options
        seeded = [s.fault for s in suspects if s.fault]
        runner = OurRunner(replace(self.side, overrides=overrides, options=options))
        return runner, faults.seeded(*seeded) if seeded else nullcontext()

    def whole(self, suspects: Sequence[Suspect]) -> Recording | None:
        """The definition with these mistakes, every layer on the reference's input; None where it does not run."""
        into = Recording()
        hearing = Hearing(into, self.reference, self._is_given)
        hearing.hands_weights = self.hands_weights
        try:
            runner, within = self._runner(suspects)
            with within:
                runner.run(self.tokens, self.at, hearing)
        except (
            GlmDsaError,
            LookupError,
            ValueError,
            TypeError,
            AttributeError,
            RuntimeError,
            AssertionError,
            IndexError,
        ):
            return None
        return into

    def alone(self, wanted: list[Compared], suspects: Sequence[Suspect]) -> Recording | None:
        """As `whole`, of the layer of `wanted`, up to the last of its stages."""
        layer = wanted[0].layer
        if layer is None or any(_is_global(s) for s in suspects):
            return self.whole(suspects)
        into = Recording()
        last = max((c.stage for c in wanted), key=stages.order)
        hearing = _Until(into, self.reference, self._is_given, last)
        hearing.hands_weights = self.hands_weights
        try:
            runner, within = self._runner(suspects)
            with within:
                runner.run_layer(layer, self.tokens, hearing)
        except Enough:
            pass
        except (
            GlmDsaError,
            LookupError,
            ValueError,
            TypeError,
            AttributeError,
            RuntimeError,
            AssertionError,
            IndexError,
        ):
            return None
        return into


def _is_global(suspect: Suspect) -> bool:
    """Whether it changes what joins the layers."""
    return any(where.startswith("model.Backbone") for where in suspect.where)


def _same(one: Array | None, other: Array | None) -> bool:
    return one is other if one is None or other is None else np.array_equal(one, other)


def _rms(values: Array) -> float:
    finite = values[np.isfinite(values) & (np.abs(values) < 1e38)].astype(np.float64)
    return float(np.sqrt(np.mean(finite**2))) if finite.size else 0.0


class _Until(Hearing):
    def __init__(self, into: Recording, reference: Recording, wanted: Callable[[str], bool], last: str) -> None:
        super().__init__(into, reference, wanted)
        self.last = last

    def note(self, stage: str, value: Array | None) -> None:
        super().note(stage, value)
        if stages.order(stage) >= stages.order(self.last):
            raise Enough
