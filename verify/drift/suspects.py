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

from .. import compare, faults, stages
from ..judging import recorded
from ..report import AGREES, FAULT
from .comparing import CHOICES, LOCAL, Compared, Yardstick, component, roots, same_rows, stages_routing
from .recording import Enough, Hearing, Recording, is_given
from .runners import OurRunner
from .sides import OURS, Side

Array = np.ndarray
EXACT = (
    4.0  # how many bounds a mistake made here may lie from the candidate's: each errs, and the mistake may amplify it
)
FLIPS = 0.01  # of choices, the share that may differ: near ties under scores that the mistake has changed
MOST = 3  # mistakes that are looked for beside each other
VERIFIED = 6  # suspects of a kind that are held against all layers


@dataclass(frozen=True)
class Suspect:
    """how: "convention" or "catalogue". overrides: of `ModelArgs`; fault: of the catalogue."""

    how: str
    name: str
    text: str
    overrides: dict[str, Any] = field(default_factory=dict)
    fault: str = ""
    kind: str = ""  # where the catalogue says that it shows first
    where: tuple[str, ...] = ()  # the functions that it changes


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
                yield Suspect("convention", f"{name} = {value}", f"{name} is {own} here", {name: value}, kind=name)


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
        without: Sequence[str] = (), thorough: bool = True, tell: Callable[[str], None] = lambda _: None,
    ) -> None:  # fmt: skip
        """recordings: (the reference's, the candidate's on its inputs). without: faults that are not to be suspected.
        thorough: suspect also what is said to show at other stages than those that differ."""
        self.side, self.tokens, self.at, self.yard, self.tell = reference.on(OURS), tokens, at, yard, tell
        self.reference, self.theirs = recordings
        self.without, self.thorough = without, thorough
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
        return [*conventions(self.side.args), *running]

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
            if suspect in known or (first[0].layer is None and not _is_global(suspect)):
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
        if seen is None:
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

    # -- held against the candidate

    def _told(self, stage: str, seen: Recording) -> Compared:
        share = self.share(stage, seen)
        return Compared(stage, LOCAL, FAULT if share > EXACT else AGREES, share, 1.0)

    def share(self, stage: str, seen: Recording) -> float:
        """How far another run's stage is from the candidate's, in bounds; of choices, 0 or infinite."""
        mine, theirs, kind = seen.get(stage), self.theirs.get(stage), stages.kind(stage)
        if kind in CHOICES:
            return self._choice(stage, mine, theirs, seen)
        if mine is None or theirs is None or stage not in self.yard.errors:
            return 0.0 if mine is None and theirs is None else np.inf
        if kind == stages.ROUTING_WEIGHTS:
            rows = same_rows(self.routed(stage, seen), self.routed(stage, self.theirs))
            if not rows.any():
                return 0.0
            mine, theirs = mine[rows], theirs[rows]
        found = compare.values(mine, theirs)
        return found.error / self.yard.bound(stage).value

    def routed(self, stage: str, seen: Recording) -> Array | None:
        return seen.get(stages_routing(stage))

    def _choice(self, stage: str, mine: Array | None, theirs: Array | None, seen: Recording) -> float:
        scored = self.yard.scored(stage)
        if scored is None:
            return 0.0 if (mine is None) == (theirs is None) else np.inf
        scores, topk, noise = scored
        own = seen.get(stage.removesuffix("topk") + "scores")
        if own is not None and stages.kind(stage) != stages.ROUTING:
            finite = np.isfinite(own) & (np.abs(own) < 1e38)
            before = np.isfinite(scores) & (np.abs(scores) < 1e38)
            ratio = np.sqrt(np.mean(own[finite] ** 2)) / (np.sqrt(np.mean(scores[before] ** 2)) or 1.0)
            scores, noise = own, noise * float(max(ratio, 1e-6))
        if theirs is None and mine is None:
            return 0.0
        if theirs is None:
            return np.inf
        found = compare.selections(None if mine is None else mine[None], theirs[None], scores[None], topk, noise)
        return 0.0 if found.faults <= FLIPS * found.queries else np.inf

    # -- runs

    def _runner(self, suspects: Sequence[Suspect]) -> tuple[OurRunner, AbstractContextManager[None]]:
        overrides = dict(self.side.overrides)
        for suspect in suspects:
            overrides |= suspect.overrides
        seeded = [s.fault for s in suspects if s.fault]
        return OurRunner(replace(self.side, overrides=overrides)), faults.seeded(*seeded) if seeded else nullcontext()

    def whole(self, suspects: Sequence[Suspect]) -> Recording | None:
        """The definition with these mistakes, every layer on the reference's input; None where it does not run."""
        into = Recording()
        hearing = Hearing(into, self.reference, lambda stage: is_given(stage, self.yard.is_sparse))
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
        hearing = _Until(into, self.reference, lambda stage: is_given(stage, self.yard.is_sparse), last)
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


class _Until(Hearing):
    def __init__(self, into: Recording, reference: Recording, wanted: Callable[[str], bool], last: str) -> None:
        super().__init__(into, reference, wanted)
        self.last = last

    def note(self, stage: str, value: Array | None) -> None:
        super().note(stage, value)
        if stages.order(stage) >= stages.order(self.last):
            raise Enough
