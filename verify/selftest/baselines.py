"""The pass rules that others release by, applied to the same faults on the same checkpoints, at their published thresholds.

Each is asked at its usual prompt, under the published index_topk of 2048, and at 0.5 and 4 times index_topk: a rule that misses
a fault may do so for want of a longer prompt, and that is to be told apart. A rule looks at what it looks at in the field:
our logits, modules or text beside HF's, free-running, in float32.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import numpy as np
import torch

from reference import hf
from reference.capture import capture
from reference.training.measure import greedy

from .. import cases, faults
from ..cases import Case
from ..cases.random_specs import random_specs
from ..core import compare
from ..engines.definition import to_numpy
from ..release import cost
from .judging import recorded

Array = np.ndarray
PUBLISHED_TOPK = 2048
TEXT = 20  # tokens said greedily
SETTINGS = USUAL, HALF, FOUR = "usual prompt", "0.5 index_topk", "4 index_topk"
CAUGHT, MISSED, NOT_ASKED = "+", ".", "-"  # not asked: none of its runs, at any prompt, runs what a fault changes
CASES = ("glm-5.2-interleaved", "grouped-half-split", "glm-5.1-interleaved", "glm-4.7", "trained-interleaved")
MODULES = ("self_attn.output", "mlp_output", "output", "norm", "logits")


@dataclass(frozen=True)
class Run:
    """What a rule can look at. logits [1, T, V]; modules: outputs by stage; text [20]: what is said next, greedily."""

    tokens: Array
    logits: Array
    modules: Mapping[str, Array]
    text: Array


@dataclass(frozen=True)
class Rule:
    """passes(ours, ref); usual: the prompt's length in tokens where people apply it."""

    name: str
    usual: int
    passes: Callable[[Run, Run], bool]


def cosine(a: Array, b: Array) -> float:
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def relative_difference(ours: Run, ref: Run) -> bool:
    return bool(np.abs(ours.logits - ref.logits).max() / np.abs(ref.logits).max() < 0.01)


def cosine_of_logits(ours: Run, ref: Run) -> bool:
    return cosine(ours.logits, ref.logits) >= 0.99


def cosine_of_modules(ours: Run, ref: Run) -> bool:
    return all(
        cosine(ours.modules[m], ref.modules[m]) >= 0.99 and np.abs(ours.modules[m] - ref.modules[m]).max() <= 1e-3
        for m in ref.modules
    )


def nmse(ours: Run, ref: Run) -> bool:
    return bool(((ours.logits - ref.logits) ** 2).sum() / (ref.logits**2).sum() < 1e-2)


def same_text(ours: Run, ref: Run) -> bool:
    return np.array_equal(ours.text, ref.text)


def top_1_in_top_5(ours: Run, ref: Run) -> bool:
    best = [np.argsort(-run.logits, axis=-1)[..., :5] for run in (ours, ref)]
    return bool(((best[0][..., :1] == best[1]).any(-1) & (best[1][..., :1] == best[0]).any(-1)).all())


def same_perplexity(ours: Run, ref: Run) -> bool:
    said = cost.of_logits(ours.logits[0, :-1], ref.logits[0, :-1], ref.tokens[0, 1:])
    return abs(said.perplexity - 1) <= 0.01


def small_kl(ours: Run, ref: Run) -> bool:
    return compare.distributions(ours.logits, ref.logits).kl_mean < 0.01


RULES = (
    Rule("logits' largest difference < 1 %", 80, relative_difference),
    Rule("logits' cosine >= 0.99", 16, cosine_of_logits),
    Rule("modules' cosine >= 0.99, max-abs <= 1e-3", 16, cosine_of_modules),
    Rule("logits' NMSE < 1e-2", 16, nmse),
    Rule("20 greedy tokens equal", 16, same_text),
    Rule("top-1 in the other's top 5", 16, top_1_in_top_5),
    Rule("perplexity within 1 %", 512, same_perplexity),
    Rule("mean KL < 0.01", 512, small_kl),
)


class Subject:
    """A case as the rules see it: HF's runs, kept, and ours, made anew."""

    def __init__(self, case: Case) -> None:
        own = replace(case.spec, folder=case.folder)
        published = {**own.overrides, "index_topk": PUBLISHED_TOPK} if case.args.has_indexer else own.overrides
        self.name, self.own = case.name, Case(own, case.folder, case.seed)
        self.published = Case(replace(own, overrides=published), case.folder, case.seed)
        self.ran: dict[tuple[str, int], set[str]] = {}
        self._refs: dict[tuple[str, int], Run] = {}

    @cached_property
    def settings(self) -> dict[tuple[str, int], Case]:
        """{(what, prompt length): the case to run}."""
        usual = {(USUAL, rule.usual): self.published for rule in RULES}
        return usual | dict.fromkeys(self.own_settings, self.own)

    @property
    def own_settings(self) -> tuple[tuple[str, int], ...]:
        return (HALF, self.own.topk // 2), (FOUR, 4 * self.own.topk)

    def reference(self, setting: tuple[str, int]) -> Run:
        if setting not in self._refs:
            case = self.settings[setting]
            tokens = case.tokens(setting[1])
            with capture(case.hf) as seen:
                hf.forward(case.hf, tokens)
            text = greedy(case.hf, tokens[0], TEXT if is_said(setting) else 0)
            self._refs[setting] = Run(tokens, seen["logits"], of_modules(seen), text)
        return self._refs[setting]

    def ours(self, setting: tuple[str, int]) -> Run:
        case = self.settings[setting]
        tokens, model = self.reference(setting).tokens, case.ours.model
        cache = model.make_cache()
        with case.ours.captured() as seen:
            logits = model(mx.array(tokens), cache)
        said: list[int] = []
        for _ in range(TEXT if is_said(setting) else 0):
            said.append(int(mx.argmax(logits[0, -1])))
            logits = model(mx.array([said[-1:]]), cache)
        stages = {stage: to_numpy(value) for stage, value in seen.items()}
        return Run(tokens, stages["logits"], of_modules(stages), np.array(said, dtype=np.int64))  # type: ignore[arg-type]

    def rejects(
        self, known: Collection[tuple[str, str]] = (), changed: Collection[str] | None = None
    ) -> Iterator[tuple[str, str]]:
        """(rule, setting) of each rejection that is not known yet. What ran none of the `changed` functions without a fault
        comes out as it did then, and is left out."""
        for case in (self.own, self.published):
            case.__dict__.pop("ours", None)
        for setting in self.settings:
            asked = [
                r
                for r in RULES
                if setting in ((USUAL, r.usual), *self.own_settings) and (r.name, setting[0]) not in known
            ]
            if not asked or (changed is not None and not self.ran[setting] & set(changed)):
                continue
            ours, ref = self.ours(setting), self.reference(setting)
            is_finite = bool(np.isfinite(ours.logits).all())
            yield from ((rule.name, setting[0]) for rule in asked if not (is_finite and rule.passes(ours, ref)))

    def runs(self, changed: Collection[str]) -> bool:
        return any(ran & set(changed) for ran in self.ran.values())

    def note_what_runs(self) -> None:
        """Before the first fault: the definition's functions that each setting runs, building the model included."""
        for setting, case in self.settings.items():
            with recorded() as ran:
                case.__dict__.pop("ours", None)
                self.ours(setting)
            self.ran[setting] = set(ran)


def is_said(setting: tuple[str, int]) -> bool:
    usual = next(rule.usual for rule in RULES if rule.passes is same_text)
    return setting[0] != USUAL or setting[1] == usual


def of_modules(stages: Mapping[str, Any]) -> dict[str, Array]:
    return {s: v for s, v in stages.items() if s.split(".", 2)[-1] in MODULES and v is not None}


def outcome(subjects: list[Subject], changed: Collection[str] | None = None) -> dict[str, str]:
    """{rule: a sign for each of SETTINGS}: whether it rejects any of the subjects there."""
    if changed is not None and not any(subject.runs(changed) for subject in subjects):
        return {rule.name: NOT_ASKED * len(SETTINGS) for rule in RULES}
    rejected: set[tuple[str, str]] = set()
    for subject in subjects:
        rejected |= set(subject.rejects(rejected, changed))
    return {r.name: "".join(CAUGHT if (r.name, s) in rejected else MISSED for s in SETTINGS) for r in RULES}


def judge(names: list[str], scratch: Path, others: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """What the rules say of each fault, and of the definition without one: on these cases and on `others` random ones."""
    specs = {spec.name: spec for spec in cases.default_specs()}
    subjects = [Subject(Case(specs[name], scratch, seed=0)) for name in CASES]
    for subject in subjects:
        subject.note_what_runs()
    clean = outcome(subjects)
    tell(f"without a fault: {notice(clean)}")
    caught: dict[str, dict[str, str]] = {}
    for name in names:
        caught[name] = under(name, subjects)
        tell(f"{name}: {notice(caught[name])}")
    alarms = [outcome([Subject(Case(spec, scratch, seed))]) for seed, spec in enumerate(random_specs(others))]
    return {"faults": caught, "clean": [clean, *alarms], "cases": list(CASES)}


def notice(signs: Mapping[str, str]) -> str:
    return f"{sum(CAUGHT in row for row in signs.values())} of {len(signs)} rules notice"


def under(name: str, subjects: list[Subject]) -> dict[str, str]:
    """A model that no longer loads or runs is noticed by everyone."""
    with faults.seeded(name):
        try:
            return outcome(subjects, {edit.where for edit in faults.named(name).edits})
        except Exception:
            return {rule.name: CAUGHT * len(SETTINGS) for rule in RULES}


def main() -> None:
    """`python -m verify.selftest.baselines OUT`: a part of `python -m verify judge`, in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m verify.selftest.baselines")
    parser.add_argument("out", metavar="FILE")
    parser.add_argument("--faults", metavar="NAMES", default=",".join(faults.CATALOGUE), help="separated by commas")
    parser.add_argument("--random", metavar="N", type=int, default=50, help="sound checkpoints of random shape besides")
    asked = parser.parse_args()
    torch.set_num_threads(1)  # as in conftest.py: on tiny tensors two wait for each other more than they work
    with TemporaryDirectory() as scratch:
        found = judge(asked.faults.split(","), Path(scratch), asked.random, lambda line: print(line, flush=True))
    Path(asked.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
