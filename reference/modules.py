"""What each of HF's modules gives in one run of the whole model, by its path: `layers.3.self_attn.indexer.wk`.

Inputs of modules and the model's choices can be put in place, so that the same run in float64 is each layer's truth on
float32's input of that layer, under float32's choices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

Outputs = dict[str, np.ndarray]


def path_of(name: str) -> str:
    """The name of a module (HF's or mlx-lm's) without the backbone's prefix."""
    return name.removeprefix("model.")


@contextmanager
def outputs(
    model: Any, inputs: Mapping[str, np.ndarray] | None = None, choices: Mapping[str, np.ndarray] | None = None
) -> Iterator[Outputs]:
    """Collects {path: float array} of whatever runs inside.

    inputs: {path: what it is given in the place of its first argument}. choices: {path of an indexer or a router: int
    [B, S, k], what it chooses}; a router's weights follow.
    """
    seen: Outputs = {}
    with choosing(model, choices or {}), ExitStack() as stack:
        for name, module in model.named_modules():
            path = path_of(name)
            if path in (inputs or {}):
                given = torch.as_tensor(inputs[path])  # type: ignore[index]
                stack.callback(module.register_forward_pre_hook(_Feed(given), with_kwargs=True).remove)
            if path and path != "model":
                stack.callback(module.register_forward_hook(_See(path, seen)).remove)
        yield seen


@contextmanager
def choosing(model: Any, choices: Mapping[str, np.ndarray]) -> Iterator[None]:
    """Puts choices in the place of the model's own, as in `outputs`; hooks that are registered inside see these."""
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if (path := path_of(name)) in choices:
                stack.callback(module.register_forward_hook(_Choose(torch.as_tensor(choices[path]))).remove)
        yield


class _Feed:
    def __init__(self, given: torch.Tensor) -> None:
        self.given = given

    def __call__(self, module: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if args:
            return (self.given.to(args[0].dtype), *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, kwargs | {first: self.given.to(kwargs[first].dtype)}


class _Choose:
    def __init__(self, chosen: torch.Tensor) -> None:
        self.chosen = chosen

    def __call__(self, module: Any, args: Any, out: Any) -> Any:
        if not isinstance(out, tuple):
            return self.chosen.to(out.dtype)
        logits, _, experts = out
        chosen = self.chosen.reshape(experts.shape).long()
        weights = logits.sigmoid().gather(1, chosen)
        if module.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return logits, weights * module.routed_scaling_factor, chosen


class _See:
    def __init__(self, path: str, seen: Outputs) -> None:
        self.path, self.seen = path, seen

    def __call__(self, module: Any, args: Any, out: Any) -> None:
        value = out[0] if isinstance(out, tuple) else out
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            self.seen[self.path] = value.detach().cpu().numpy().copy()
