"""The equations on a prompt, in float64."""

from __future__ import annotations

import numpy as np
import torch

from reference.equations import Equations, causal, rms_norm
from reference.layers import Layers

from ..core import stages
from ..core.choices import scatter
from .recording import Hearing
from .runner import Runner

Array = np.ndarray


class _Heard(Equations):
    """The equations, with somebody's values in the place of their own."""

    hearing: Hearing
    experts_count: int
    routed_to: Array

    def record(self, stage: str, value: Array) -> Array:
        return self._put(stage, value)

    def choose(self, stage: str, own: Array) -> Array:
        return self._put(stage, own)

    def _put(self, stage: str, value: Array) -> Array:
        noted, kind = value[0], stages.kind(stage)
        if kind == stages.ROUTING_WEIGHTS:
            noted = scatter(noted, self.routed_to, self.experts_count)
        self.hearing.note(stage, noted)
        due = None if kind == stages.ROUTING_WEIGHTS else self.hearing.due(stage)
        out = value if due is None else np.asarray(due, np.int64 if value.dtype.kind in "iu" else value.dtype)[None]
        if kind == stages.ROUTING:
            self.routed_to = out[0]
        return out


class EquationsRunner(Runner):
    def _run(self, tokens: Array, at: Array, hearing: Hearing) -> None:
        layers = Layers(self.side.folder, self.side.conventions, **self.side.changes)
        own = _Heard(
            layers.config, lambda name: layers.read(name, torch.float32).double().numpy(), self.side.conventions
        )
        own.hearing, own.experts_count = hearing, self.args.n_routed_experts
        shape, ids = tokens.shape, torch.as_tensor(tokens)
        positions = np.broadcast_to(np.arange(shape[1]), shape)
        x, selection = own.record("embed", layers.embed(ids).double().numpy()), None
        for layer in range(self.args.num_hidden_layers):
            x, selection = own.layer(layer, x, positions, causal(shape, None), selection)
        hidden = own.record("norm", rms_norm(x, own.weights("model.norm.weight"), self.args.rms_norm_eps))
        if layers.has_mtp:
            self._mtp(own, layers, ids, hidden)
        parts = [(hidden[0, at] @ layers.head(rows).double().numpy().T) for rows in self.vocabulary()]
        hearing.note("logits", np.concatenate(parts, -1))

    def _mtp(self, own: _Heard, layers: Layers, ids: torch.Tensor, hidden: Array) -> None:
        index, eps = self.args.num_hidden_layers, self.args.rms_norm_eps
        embedded = layers.mtp_embed(torch.roll(ids, -1, 1)).double().numpy()
        embedded[:, : int(self.args.mtp_zero_first_embedding)] = 0
        w = {
            n: own.weights(f"model.layers.{index}.{n}.weight")
            for n in ("enorm", "hnorm", "eh_proj", "shared_head.norm")
        }
        joined = np.concatenate([rms_norm(embedded, w["enorm"], eps), rms_norm(hidden, w["hnorm"], eps)], -1)
        x = own.record(f"layers.{index}.eh_proj", joined @ w["eh_proj"].T)
        positions = np.broadcast_to(np.arange(x.shape[1]), x.shape[:2])
        out, _ = own.layer(index, x, positions, causal(x.shape, None), None)
        own.record(f"layers.{index}.shared_head", rms_norm(out, w["shared_head.norm"], eps))
