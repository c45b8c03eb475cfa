"""What stages are held against: a case's reference, a layer's of a release, a module's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from glm_dsa import ModelArgs

from .bounds import Bound
from .choices import Decision


class Named(Protocol):
    """Where a comparison was made, as the report has it."""

    @property
    def name(self) -> str: ...
    @property
    def args(self) -> ModelArgs: ...


class Reference(Protocol):
    """local: what is judged ran on the reference's own input, and owes nothing to what came before."""

    hf: Mapping[str, Any]  # stages by name

    @property
    def case(self) -> Named: ...
    @property
    def is_sparse(self) -> bool: ...
    def bound(self, stage: str, local: bool) -> Bound: ...
    def decision(self, stage: str, local: bool) -> Decision: ...
