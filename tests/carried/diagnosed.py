"""`python -m verify drift` on the carried faults: is the first divergence at its stage, and the cause named?

A candidate is HF, or mlx-lm, with one of the catalogue's mistakes in it, on other weights, prompts and in another precision than
the gate's; the reference is HF without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from verify import drift
from verify.core import stages
from verify.drift.stagewise import PARENTS
from verify.engines.spec import Side
from verify.faults import CATALOGUE

from .compared import Trial
from .in_hf import IN_HF, patched
from .in_stock import IN_STOCK, write_stock

HF, STOCK = "hf", "stock"
ROTATED = {"self_attn.indexer.k", "self_attn.indexer.q", "self_attn.q_rope", "self_attn.k_rope"}
# What RoPE as such changes; other declarations without a stage of a layer are of what attention computes with.
SHOWN_BY = dict.fromkeys(("position", "frequencies", "magnitude"), ROTATED) | {"mlp.switch_mlp": {"mlp.experts"}}


@dataclass(frozen=True)
class Diagnosed:
    """named: the causes that were given, each with what is the same on the prompt; left: kinds that stayed unexplained."""

    names: tuple[str, ...]
    stage: str
    due: str
    named: tuple[tuple[str, ...], ...]
    component: str
    left: tuple[str, ...]
    seconds: float

    @property
    def is_named(self) -> bool:
        """The one mistake, and nothing besides."""
        return len(self.named) == 1 and not self.left and self.names[0] in self.named[0]

    @property
    def at_its_stage(self) -> bool:
        return stages.kind(self.stage) == self.due


def due_stage(name: str, shown: Sequence[str]) -> str:
    """The stage at which the catalogue says that a fault is met; where a layer does not show it, the first one behind."""
    declared = CATALOGUE[name].stage
    if declared in ("embed", "norm", "logits"):
        return declared if declared in shown else "logits"
    changed = {declared} if declared in stages.IN_LAYER else SHOWN_BY.get(declared, {"self_attn.heads"})
    kinds = {stages.kind(s) for s in shown}

    def comes_of(kind: str) -> bool:
        parents = (p for p in PARENTS.get(kind, ()) if p not in kinds)
        return kind in changed or any(comes_of(p) for p in parents)

    return next(kind for kind in stages.IN_LAYER if kind in kinds and comes_of(kind))


def shown_in(found: drift.Drift, shown: set[str]) -> list[str]:
    """Of the stages that a candidate shows, those of the layer where it diverges."""
    layer = found.divergence.layer if found.divergence else None
    return [s for s in shown if layer is None or stages.layer_of(s) in (layer, None)]


def diagnose(
    trial: Trial, names: Sequence[str], where: str = HF, dtype: str = "float32", without: Sequence[str] = ()
) -> Diagnosed:
    """One or several faults together, in one candidate (on the first one's case)."""
    table: Any = IN_HF if where == HF else IN_STOCK
    first = table[names[0]]
    case = trial.case_of(IN_HF[names[0]]) if where == HF else trial.stock_case(IN_STOCK[names[0]].case)
    tokens = case.tokens(first.length or case.long)[0].tolist()
    overrides = dict(case.spec.overrides)
    reference = Side("hf", "hf", str(case.folder), overrides=overrides)
    if where == HF:
        changes = sum((IN_HF[name].changes for name in names), ())
        within: Callable[[Any], Any] = partial(patched, changes=changes)
        candidate = Side("patched hf", "hf", str(case.folder), {"dtype": dtype}, overrides, within)
    else:
        file = write_stock(Path(trial.scratch) / f"stock_{names[0].replace('-', '_')}.py", names[0])
        candidate = Side(str(file), str(file), str(case.folder), {"dtype": dtype})
    shown: set[str] = set()
    found = drift.compare(
        candidate,
        reference,
        tokens=tokens,
        without=without,
        repair=False,
        keep=lambda r: shown.update(r["candidate local"]),
    )
    causes = [(c.suspect.name, *((c.suspect.known_as,) if c.suspect.known_as else ()), *c.alike) for c in found.causes]
    diagnosis, due = found.diagnosis, due_stage(names[0], shown_in(found, shown))
    return Diagnosed(
        tuple(names), found.divergence.stage if found.divergence else "", due, tuple(causes),
        diagnosis.component if diagnosis else "", tuple(sorted({c.kind for c in diagnosis.unknown})) if diagnosis else (),
        found.seconds,
    )  # fmt: skip
