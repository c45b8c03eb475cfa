"""What is wrong, told by making it wrong: conventions switched and catalogued mistakes made in this project's definition, one
after another, until it gives what the candidate gives.

Each is tried on the first layer that differs, up to the stage that differs; whatever fits there is held against all layers. Of
several mistakes the first is found first, and the others beside it. What nothing reproduces stays unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np

from glm_dsa.errors import GlmDsaError

from .. import faults
from ..core import stages
from ..core.report import AGREES, FAULT
from ..engines.recording import Enough, Hearing, Recording, is_given
from ..engines.run_definition import OurRunner
from ..engines.spec import OURS, Side
from ..faults.coverage import recorded
from .hypotheses import Cause, Diagnosis, Suspect, catalogue, conventions, other_config, packed_caches
from .similarity import EXACT, Likeness
from .stagewise import LOCAL, Compared, Yardstick, roots

Array = np.ndarray
NEARER = 0.5  # to the candidate, with a mistake than without, where it is beyond the bound
MOST = 3  # mistakes that are looked for beside each other
# what a mistake may end in, where it does not fit the model
BREAKS = (GlmDsaError, LookupError, ValueError, TypeError, AttributeError, RuntimeError, AssertionError)
VERIFIED = 6  # suspects of a kind that are held against all layers


class Lineup:
    """The suspects, beside a candidate's local recording. `reference`: the side whose weights and inputs that ran on."""

    def __init__(
        self, reference: Side, tokens: Array, at: Array, recordings: tuple[Recording, Recording], yard: Yardstick,
        without: Sequence[str] = (), thorough: bool = True, hands_weights: bool = False,
        tell: Callable[[str], None] = lambda _: None, blank: Callable[[], Recording] = Recording,
        candidate: Side | None = None,
    ) -> None:  # fmt: skip
        """recordings: (the reference's, the candidate's on its inputs). without: faults that are not to be suspected.
        thorough: suspect also what is said to show at other stages than those that differ. hands_weights: the candidate
        was handed experts with their weights. blank: what a run of the whole model is recorded in.
        candidate: the side that is diagnosed, whose config may be to blame."""
        self.side, self.tokens, self.at, self.yard, self.tell = reference.on(OURS), tokens, at, yard, tell
        self.reference, self.theirs = recordings
        self.share = Likeness(self.side.args, self.reference, self.theirs, yard).share
        self._distances: dict[str, float] = {}
        self._without_any: set[str] = set()  # what this definition shows of it where no mistake is made
        self.without, self.thorough, self.hands_weights = without, thorough, hands_weights
        self.blank, self.candidate, self.tried = blank, None if candidate is None else candidate.on(OURS), 0

    # -- the search

    def diagnose(self, found: list[Compared]) -> Diagnosis:
        """found: the candidate's local comparisons."""
        left = roots(found)
        blamed = stages.component({c.kind for c in left})
        causes: list[Cause] = []
        suspects = self._suspects(left) if left else []
        while left and len(causes) < MOST:
            best = self._best([c.suspect for c in causes], left, suspects)
            if best is None:
                break
            cause, left = best
            causes.append(cause)
            self.tell(f"cause: {cause.suspect.name}")
        return Diagnosis(causes, blamed, left, self.tried)

    def _suspects(self, left: list[Compared]) -> list[Suspect]:
        """Whatever runs at all on such a prompt. What this definition shows too where no mistake is made, none explains."""
        with recorded() as ran:
            clean = self.whole([])
        if clean is not None:
            self._without_any = {c.stage for c in left if c.stage in clean and self.share(c.stage, clean) <= 1}
            clean.drop()
        running = [s for s in catalogue(self.without) if all(w in ran for w in s.where)]
        configs = other_config(self.candidate, self.side) if self.candidate is not None else ()
        return [*conventions(self.side.args), *configs, *packed_caches(self.side.args), *running]

    def _best(
        self, known: list[Suspect], left: list[Compared], suspects: list[Suspect]
    ) -> tuple[Cause, list[Compared]] | None:
        kinds = {c.kind for c in left}
        likely = [s for s in suspects if s.how in ("config", "convention") or s.kind in kinds]
        for group in (likely, [s for s in suspects if s not in likely] if self.thorough else []):
            fitting = sorted(self._fitting(known, left, group), key=lambda item: -item[1])
            judged = [v for s, _ in fitting[:VERIFIED] if (v := self._verified(known, s, left)) is not None]
            if judged:
                judged.sort(key=lambda v: (len({c.kind for c in v[1]}), v[0].exact))
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
            fits = sum(self._explained(c.stage, seen) for c in first)
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
        return self._before(stage) <= EXACT

    def _before(self, stage: str) -> float:
        """How far the candidate is from the reference, where no mistake is made: in bounds."""
        if stage not in self._distances:
            self._distances[stage] = self.share(stage, self.reference)
        return self._distances[stage]

    def _explained(self, stage: str, seen: Recording) -> bool:
        """Within the bound; or within a few, where that is far nearer than without the mistake. (In 16 bit bounds are wide: what
        is a little beyond them is no nearer to any mistake than to none.)"""
        share, before = self.share(stage, seen), self._before(stage)
        return share <= 1 or (share <= EXACT and (before <= 1 or share <= NEARER * before))

    def _verified(
        self, known: list[Suspect], suspect: Suspect, left: list[Compared]
    ) -> tuple[Cause, list[Compared]] | None:
        """(the cause, what it leaves) where the kinds of stages that it explains are explained in every layer."""
        seen = self.whole([*known, suspect])
        if seen is None:
            return None
        try:
            return self._explains(known, suspect, left, seen)
        finally:
            seen.drop()

    def _explains(
        self, known: list[Suspect], suspect: Suspect, left: list[Compared], seen: Recording
    ) -> tuple[Cause, list[Compared]] | None:
        if known and self._first_changed(known, seen) not in {c.kind for c in left}:
            return None
        rest = roots([self._told(stage, seen) for stage in self.theirs if stage in seen])
        kinds, remaining = {c.kind for c in left}, {c.kind for c in rest}
        explained = sorted(kinds - remaining, key=lambda kind: [c.kind for c in left].index(kind))
        if not explained or left[0].kind not in explained:
            return None
        mine = [c for c in left if c.kind in explained]
        if not known and all(c.stage in self._without_any for c in mine):
            return None
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
        verdict = AGREES if self._explained(stage, seen) else FAULT
        return Compared(stage, LOCAL, verdict, self.share(stage, seen), 1.0, handed=stage in self.theirs.handed)

    # -- runs

    def _is_given(self, stage: str) -> bool:
        """What the candidate was handed, and took: where it selects nothing at all, or skips a norm, nothing could be put in."""
        return is_given(stage, self.yard.is_sparse) and stage in self.theirs.handed

    def _runner(self, suspects: Sequence[Suspect]) -> tuple[OurRunner, AbstractContextManager[None]]:
        base = next((s.config for s in suspects if s.config is not None), self.side)
        overrides, options = dict(base.overrides), dict(base.options)
        for suspect in suspects:
            overrides |= suspect.overrides
            options |= suspect.options
        seeded = [s.fault for s in suspects if s.fault]
        runner = OurRunner(replace(base, overrides=overrides, options=options))
        return runner, faults.seeded(*seeded) if seeded else nullcontext()

    def whole(self, suspects: Sequence[Suspect]) -> Recording | None:
        """The definition with these mistakes, every layer on the reference's input; None where it does not run."""
        into = self.blank()
        hearing = Hearing(into, self.reference, self._is_given)
        hearing.hands_weights = self.hands_weights
        try:
            runner, within = self._runner(suspects)
            with within:
                runner.run(self.tokens, self.at, hearing)
        except BREAKS:
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
        except BREAKS:
            return None
        return into


def _is_global(suspect: Suspect) -> bool:
    """Whether it changes what joins the layers."""
    return any(where.startswith("model.Backbone") for where in suspect.where)


def _same(one: Array | None, other: Array | None) -> bool:
    return one is other if one is None or other is None else np.array_equal(one, other)


class _Until(Hearing):
    def __init__(self, into: Recording, reference: Recording, wanted: Callable[[str], bool], last: str) -> None:
        super().__init__(into, reference, wanted)
        self.last = last

    def note(self, stage: str, value: Array | None) -> None:
        super().note(stage, value)
        if stages.order(stage) >= stages.order(self.last):
            raise Enough
