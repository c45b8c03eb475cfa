"""The optimizer of the small checkpoint's training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class Muon:
    """Muon (with AdamW's RMS) for matrices and stacks of them, Adam for the rest.

    torch.optim.Muon orthogonalizes in bfloat16, which this CPU emulates (15 times slower), and refuses experts' stacks.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        rest = ("embed_tokens", "lm_head", "mlp.gate.")
        self.matrices: dict[str, Any] = {
            n: p for n, p in parameters.items() if p.dim() >= 2 and not any(r in n for r in rest)
        }
        self.others = {n: p for n, p in parameters.items() if n not in self.matrices}
        self.momentum = {n: torch.zeros_like(p) for n, p in self.matrices.items()}
        self.first = {n: torch.zeros_like(p) for n, p in self.others.items()}
        self.second = {n: torch.zeros_like(p) for n, p in self.others.items()}
        self.steps = {n: torch.zeros((), dtype=torch.int64) for n in self.others}

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        return {"momentum": self.momentum, "first": self.first, "second": self.second, "steps": self.steps}

    @torch.no_grad()
    def step(self, lr: float, decay: float = 0.05) -> None:
        shapes: dict[tuple[int, ...], list[str]] = {}
        for name, p in self.matrices.items():
            if p.grad is not None:
                shapes.setdefault(tuple(p.shape), []).append(name)
        for names in shapes.values():
            for n in names:
                self.momentum[n].lerp_(self.matrices[n].grad, 0.05)
            step = orthogonal(torch.stack([torch.lerp(self.matrices[n].grad, self.momentum[n], 0.95) for n in names]))
            for n, update in zip(names, step, strict=True):
                p = self.matrices[n]
                p.mul_(1 - lr * decay).sub_(update, alpha=0.2 * lr * max(p.shape[-2:]) ** 0.5)
        for name, p in self.others.items():
            if p.grad is None:
                continue
            self.steps[name] += 1
            first, second, t = self.first[name], self.second[name], int(self.steps[name])
            first.lerp_(p.grad, 0.1)
            second.lerp_(p.grad.square(), 0.05)
            p.sub_(first / (1 - 0.9**t) / ((second / (1 - 0.95**t)).sqrt() + 1e-8), alpha=lr)


def orthogonal(g: torch.Tensor) -> torch.Tensor:
    """The nearest orthogonal matrices, by five quintic Newton-Schulz steps (Jordan 2024). [..., m, n]"""
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x
