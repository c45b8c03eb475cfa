"""Engines by the names that command lines take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .base import Engine, Layered
from .run_definition import DefinitionEngine
from .run_equations import EquationsEngine
from .run_hf import HfEngine
from .run_third_party import ThirdPartyEngine
from .spec import EQUATIONS, HF, OURS, Side

LAYERED: dict[str, Callable[[Side], Layered[Any]]] = {
    OURS: DefinitionEngine,
    HF: HfEngine,
    EQUATIONS: EquationsEngine,
}


def engine_of(side: Side) -> Engine:
    """Any other name is somebody's MODULE or FILE.py."""
    kinds: dict[str, Callable[[Side], Engine]] = {**LAYERED}
    return kinds.get(side.implementation, ThirdPartyEngine)(side)
