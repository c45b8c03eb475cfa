"""A side's runner."""

from __future__ import annotations

from collections.abc import Callable

from .run_definition import OurRunner
from .run_equations import EquationsRunner
from .run_hf import HfRunner
from .run_third_party import TheirRunner
from .runner import Runner
from .spec import EQUATIONS, HF, OURS, Side


def runner_of(side: Side) -> Runner:
    kinds: dict[str, Callable[[Side], Runner]] = {OURS: OurRunner, HF: HfRunner, EQUATIONS: EquationsRunner}
    return kinds.get(side.implementation, TheirRunner)(side)
