"""Runs unmodified HF modules and collects {stage: numpy array}, under the project's stage names.

Forward hooks see what modules take and give. What happens inside the indexer's forward (rotated q and k, weights,
scores) is seen by a torch function mode: HF's own operands, not a second computation. HF turns interleaved pairs into
half-split order as it rotates; arrays are put back into the input's order here, so that stages compare entry by entry.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

Stages = dict[str, np.ndarray]


class _IndexerMode(TorchFunctionMode):
    """Sees the indexer's two matmuls, relu(q k^T) and w @ that, and its topk. HF >= 5.18, both indexer classes."""

    def __init__(self, note: Callable[[str, Any], None]) -> None:
        super().__init__()
        self.note, self.matmuls = note, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.matmul:
            self.matmuls += 1
            if self.matmuls == 1:
                self.note("q", args[0])
                self.note("k", args[1][:, 0].transpose(-1, -2))
            else:
                self.note("weights", args[0][:, :, 0])
        elif func is torch.Tensor.topk:
            self.note("scores", args[0])
            self.note("topk", out.indices)
        return out


def _numpy(value: torch.Tensor) -> np.ndarray:
    value = value.detach()
    return (
        value.to(torch.float64 if value.dtype == torch.float64 else torch.float32).cpu().numpy().copy()
        if value.is_floating_point()
        else value.cpu().numpy().copy()
    )


def reinterleave(x: np.ndarray, width: int) -> np.ndarray:
    """The first `width` entries, [evens | odds] -> the order they came in."""
    out = x.copy()
    out[..., 0:width:2], out[..., 1:width:2] = x[..., : width // 2], x[..., width // 2 : width]
    return out


@contextmanager
def capture(model: torch.nn.Module, attended: Stages | None = None) -> Iterator[Stages]:
    """Collects the stages of every decoder layer that runs inside, and of norm and head. The last run wins.

    `attended` is given, by attention module, how much of its attention each key gets: the mean over heads, [B, S, T].
    """
    stages: Stages = {}
    with ExitStack() as stack:
        for name, module in model.named_modules():
            path = name.removeprefix("model").removeprefix(".")
            for hook in _hooks(path, module, stages, attended):
                stack.callback(hook.remove)
        yield stages


def _hooks(path: str, module: Any, stages: Stages, attended: Stages | None) -> Iterator[Any]:
    kind = type(module).__name__

    def put(stage: str, value: Any) -> None:
        stages[stage] = _numpy(value)

    def output(stage: str, pick: int | None = None):
        return module.register_forward_hook(lambda m, a, out: put(stage, out if pick is None else out[pick]))

    leaf = path.rsplit(".", 1)[-1]
    parent = path.rsplit(".", 1)[0]
    if leaf in ("input_layernorm", "post_attention_layernorm") or path in ("norm",):
        yield output(path)
    elif path == "embed_tokens":
        yield output("embed")
    elif path == "lm_head":
        yield output("logits")
    elif leaf == "q_a_layernorm":
        yield output(f"{parent}.q_latent")
    elif leaf == "kv_a_layernorm":
        yield output(f"{parent}.kv_latent")
    elif leaf == "o_proj":
        yield module.register_forward_pre_hook(lambda m, args: put(f"{parent}.heads", args[0]))
        yield output(f"{parent}.output")
    elif kind.endswith("TopkRouter"):

        def routed(m: Any, args: Any, out: Any) -> None:
            batch = args[0].shape[:-1] if args[0].dim() == 3 else (1, args[0].shape[0])
            for stage, value in zip(("logits", "weights", "topk"), out, strict=True):
                put(f"{path}.{stage}", value.reshape(*batch, -1))

        yield module.register_forward_hook(routed)
    elif kind.endswith("MoE"):
        yield output(f"{path}.output")
        yield module.register_forward_hook(
            lambda m, args, out: stages.update({f"{path}.experts": stages[f"{path}.experts"].reshape(args[0].shape)})
        )
        yield module.experts.register_forward_hook(lambda m, a, out: put(f"{path}.experts", out))
        yield module.shared_experts.register_forward_hook(lambda m, a, out: put(f"{path}.shared_experts", out))
        yield output(f"{parent}.mlp_output")
    elif kind.endswith("MLP") and leaf == "mlp":
        yield output(f"{parent}.mlp_output")
    elif kind.endswith("DecoderLayer"):
        yield module.register_forward_hook(
            lambda m, a, out: put(f"{path}.output", out[0] if isinstance(out, tuple) else out)
        )
    elif kind.endswith("Indexer"):
        yield from _indexer_hooks(path, module, put, stages)
    elif leaf == "self_attn":
        yield from _attention_hooks(path, module, put, stages, attended)


def _indexer_hooks(path: str, module: Any, put: Callable[[str, Any], None], stages: Stages) -> Iterator[Any]:
    running: list[_IndexerMode] = []

    def enter(m: Any, args: Any, kwargs: Any) -> None:
        mode = _IndexerMode(lambda stage, value: put(f"{path}.{stage}", value))
        mode.__enter__()
        running.append(mode)

    def leave(m: Any, args: Any, kwargs: Any, out: Any) -> None:
        running.pop().__exit__(None, None, None)
        if type(module).__name__.startswith("Glm"):  # interleaved; DeepseekV32Indexer is half-split
            for stage in ("q", "k") if out is not None else ():
                stages[f"{path}.{stage}"] = reinterleave(stages[f"{path}.{stage}"], module.qk_rope_head_dim)

    yield module.register_forward_pre_hook(enter, with_kwargs=True)
    yield module.register_forward_hook(leave, with_kwargs=True, always_call=True)


def _attention_hooks(
    path: str, module: Any, put: Callable[[str, Any], None], stages: Stages, attended: Stages | None
) -> Iterator[Any]:
    """q_rope and k_rope, seen as the rotary widths of what `expand_kv` and eager attention are handed."""

    class Undo:
        def __init__(self, undo: Callable[[], None]) -> None:
            self.remove = undo

    original = module.expand_kv

    def put_rotated(stage: str, value: Any) -> None:
        put(stage, value)
        if getattr(module.config, "rope_interleave", True):
            stages[stage] = reinterleave(stages[stage], module.qk_rope_head_dim)

    def expand_kv(latent: torch.Tensor, k_rot: torch.Tensor):
        put_rotated(f"{path}.k_rope", k_rot[:, 0])
        return original(latent, k_rot)

    module.expand_kv = expand_kv
    yield Undo(lambda: module.__dict__.pop("expand_kv"))

    modeling: Any = importlib.import_module(type(module).__module__)
    eager = modeling.eager_attention_forward

    def attend(m: Any, query: torch.Tensor, *args: Any, **kwargs: Any):
        out = eager(m, query, *args, **kwargs)
        if m is module:
            put_rotated(f"{path}.q_rope", query[..., -module.qk_rope_head_dim :].transpose(1, 2))
            if attended is not None:
                attended[path] = _numpy(out[1].mean(1))
        return out

    modeling.eager_attention_forward = attend
    yield Undo(lambda: setattr(modeling, "eager_attention_forward", eager))
    yield module.register_forward_hook(
        lambda m, a, out: put(f"{path}.selection", out[2]) if len(out) > 2 and out[2] is not None else None
    )
