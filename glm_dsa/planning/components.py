"""Tensors counted by component, as people talk about them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Any

from ..weights import TensorSpec

COMPONENTS = (
    "embedding", "head", "norms", "attention", "indexer", "dense mlp", "router", "experts", "shared experts", "mtp",
)  # fmt: skip


@dataclass
class Component:
    """Tensors as people talk about them. `formats`: {format: tensors}."""

    tensors: int = 0
    parameters: int = 0
    nbytes: int = 0
    formats: dict[str, int] = field(default_factory=dict)

    @property
    def bits(self) -> float:
        """Bits a weight, scales and biases of packed ones included."""
        return 8 * self.nbytes / self.parameters if self.parameters else 0.0

    def add(self, shape: tuple[int, ...], nbytes: int, kind: str) -> None:
        self.tensors += 1
        self.parameters += prod(shape)
        self.nbytes += nbytes
        self.formats[kind] = self.formats.get(kind, 0) + 1

    def told(self) -> str:
        return "; ".join(f"{kind} ({n})" for kind, n in sorted(self.formats.items(), key=lambda f: -f[1]))

    def as_dict(self) -> dict[str, Any]:
        return {
            "tensors": self.tensors, "parameters": self.parameters, "bytes": self.nbytes,
            "bits": round(self.bits, 6), "formats": self.formats,
        }  # fmt: skip

    @staticmethod
    def sum(parts: Iterable[Component]) -> Component:
        total = Component()
        for part in parts:
            total.tensors += part.tensors
            total.parameters += part.parameters
            total.nbytes += part.nbytes
        return total


def counted(rows: Iterable[tuple[TensorSpec, int, str]]) -> dict[str, Component]:
    out: dict[str, Component] = {}
    for spec, nbytes, kind in rows:
        out.setdefault(spec.component, Component()).add(spec.shape, nbytes, kind)
    return {name: out[name] for name in COMPONENTS if name in out}
