"""A release against HF and the equations, layer by layer, in one pass over its weights and in bounded memory.

A layer is run by several hands: HF's module on the release's own weights, unpacked; the equations in float64, on HF's input
and under HF's choices; ours on the release as it is stored, on two rows: HF's input (local error) and what ours itself made
of the layers before (drift); and, where there is an original, HF's module on that, on two rows of the same kind. Each hand
waits at its experts for the next; then the experts are read, a chunk at a time, and each takes what is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch

from reference.equations import Conventions, Equations, causal, rms_norm
from reference.layers import Layers
from reference.mtp import Around

from ..engines.definition import to_numpy
from ..engines.definition_streamed import OurLayers, Seen
from ..engines.pruning import Numbering, Numberings
from .lockstep import HalfHand, Hand, HfHand, OriginalHand, OurHand, TruthHand, Weights, together

Array = np.ndarray
CHUNK = 1 << 28  # bytes of a chunk of experts, in float32, that HF is handed at once


@dataclass
class Ran:
    """One layer in all hands. hf, truth: {stage: array} of one row; ours: of two, HF's input and its own; original: of two,
    HF's input and its own. ends: the layer's output, HF's and ours on its own."""

    hf: dict[str, Array]
    truth: dict[str, Array]
    ours: dict[str, Any]
    ends: tuple[Array, Array]
    half: dict[str, Array] | None = None  # HF in bfloat16, where ours runs in it
    original: dict[str, Array] = field(default_factory=dict)
    by: HfHand | None = None
    attended: Array | None = None  # by the original, on HF's input: [S, T], the mean over heads


class Pass:
    """The streams of a release, advanced a layer at a time."""

    def __init__(
        self,
        folder: Path,
        conventions: Conventions,
        overrides: Mapping[str, Any],
        tokens: Array,
        original: tuple[Path, Conventions] | None = None,
        beside: Callable[[int, int, Weights | None, Weights | None], None] = lambda *_: None,
        tell: Callable[[str], None] = lambda _: None,
        dtype: mx.Dtype = mx.float32,
        numberings: Numberings | None = None,
    ) -> None:
        """`beside(layer, first, the release's experts, the original's)` sees each chunk of experts, those that the release
        has not at last; `tell` where we are. dtype: what ours runs in; beside bfloat16, HF runs in it too. numberings: of
        the layers whose experts are not numbered as the original's."""
        self.theirs, self.ours = Layers(folder, conventions, **overrides), OurLayers(folder, dtype, **overrides)
        is_half = dtype == mx.bfloat16
        self.half = Layers(folder, conventions, torch.bfloat16, **overrides) if is_half else None
        self.conventions, self.args, self.tokens = conventions, self.ours.args, tokens
        self.beside, self.tell, self.overrides = beside, tell, overrides
        self.numberings = numberings or {}
        same = {"index_topk": self.args.index_topk} if self.args.has_indexer else {}  # selections go side by side
        self.original = None if original is None else Layers(original[0], original[1], **{**overrides, **same})
        inner = self.args.moe_intermediate_size * self.args.hidden_size * 3 * 4
        self.chunk = max(1, min(self.args.n_routed_experts, CHUNK // inner))
        self.hf_selection: torch.Tensor | None = None
        self.own_selection: mx.array | None = None
        self.original_selection: torch.Tensor | None = None

    def embed(self) -> None:
        ids = torch.as_tensor(self.tokens)
        self.hf, own = self.theirs.embed(ids), self.ours.embed(self.tokens)
        self.own = mx.concatenate([own, own])  # [HF's input, its own]
        if self.original is not None:
            self.first = torch.cat([self.hf, self.original.embed(ids)])  # [HF's input, its own]

    @property
    def is_sparse(self) -> bool:
        return 0 < self.args.index_topk < self.tokens.shape[1]

    @property
    def mtp(self) -> int | None:
        """The MTP layer's number, where the release has one."""
        return self.args.num_hidden_layers if self.theirs.has_mtp else None

    def layer(self, index: int) -> Ran:
        if index == self.mtp:
            return self._mtp(index)
        hf = HfHand(self.theirs, index, self.hf, self.hf_selection)
        ours = OurHand(self.ours, hf, self.own, self.own_selection, self.is_sparse)
        original = None
        if self.original is not None:
            original = self._original(index, self.first, self.original_selection)
        ran = self._together(hf, ours, original)
        self._advance(hf, ours.seen, original)
        return ran

    def _mtp(self, index: int) -> Ran:
        """The first draft step over the whole prompt: each position is given the next token, the last one the first."""
        following = np.roll(self.tokens, -1, axis=1)
        ids, zeroed = torch.as_tensor(following), int(self.args.mtp_zero_first_embedding)

        def before(layers: Layers, hidden: torch.Tensor) -> tuple[Around, torch.Tensor, torch.Tensor]:
            around, embedded = layers.around_mtp(), layers.mtp_embed(ids)
            embedded[:, :zeroed] = 0
            return around, embedded, around.before(embedded.expand_as(hidden), hidden)

        hidden = self.theirs.norm(self.hf)
        around, embedded, x = before(self.theirs, hidden)
        hf = HfHand(self.theirs, index, x, None)
        embeddings = self.ours.mtp_embed(following)
        embeddings = mx.where((mx.arange(following.shape[1]) < zeroed)[:, None], 0, embeddings)
        own = mx.concatenate([mx.array(hidden.numpy()).astype(self.ours.dtype), self.ours.norm(self.own[1:])])
        ours = OurHand(self.ours, hf, (own, mx.concatenate([embeddings, embeddings])), None, self.is_sparse)
        original = None
        if self.original is not None and self.original.has_mtp:
            both = torch.cat([hidden, self.original.norm(self.first[1:])])
            original = self._original(index, before(self.original, both)[2], None)
        ran = self._together(hf, ours, original)
        last = around.after(hf.out)
        ran.hf |= {f"layers.{index}.eh_proj": x.numpy(), f"layers.{index}.shared_head": last.numpy()}
        ran.truth |= self._true_ends(index, embedded, hidden, ran.truth[f"layers.{index}.output"])
        ran.ends = last.numpy(), to_numpy(ours.seen.out[1:])
        return ran

    def _true_ends(self, index: int, embedded: torch.Tensor, hidden: torch.Tensor, out: Array) -> dict[str, Array]:
        read, eps = self.theirs.read, self.args.rms_norm_eps
        w = {n: read(f"model.layers.{index}.{n}.weight") for n in ("enorm", "hnorm", "eh_proj", "shared_head.norm")}
        parts = (embedded, "enorm"), (hidden, "hnorm")
        joined = np.concatenate([rms_norm(x.double().numpy(), w[n], eps) for x, n in parts], -1)
        return {
            f"layers.{index}.eh_proj": joined @ w["eh_proj"].T,
            f"layers.{index}.shared_head": rms_norm(out, w["shared_head.norm"], eps),
        }

    def in_float32(self, ran: Ran) -> dict[str, Array]:
        """The equations once more, in float32, on a layer that has passed: what float32 explains. It is read again for that."""
        hf = ran.by
        assert hf is not None
        given = {s: v for s, v in hf.stages.items() if s.endswith(".topk")}
        own = Equations(hf.layers.config, lambda n: hf.layers.read(n, torch.float32).numpy(), self.conventions, given)
        shape = tuple(hf.x.shape[:2])
        positions = np.broadcast_to(np.arange(shape[1]), shape)
        own.layer(
            hf.index, hf.x.numpy(), positions, causal(shape, None), None if hf.given is None else hf.given.numpy()
        )
        return own.stages

    def _original(self, index: int, x: torch.Tensor, selection: torch.Tensor | None) -> OriginalHand:
        assert self.original is not None
        return OriginalHand(
            self.original,
            index,
            x,
            selection,
            numbering=self.numberings.get(index) or Numbering.plain(self.args.n_routed_experts),
            beside=lambda first, mine, theirs: self.beside(index, first, mine, theirs),
        )

    def _together(self, hf: HfHand, ours: OurHand, original: OriginalHand | None) -> Ran:
        truth = TruthHand(hf, self.conventions)
        half = None if self.half is None else HalfHand(self.half, hf)
        hands = [hand for hand in (hf, original, truth, ours, half) if hand is not None]
        together(hands, lambda: self._experts(hands))
        ends = hf.out.numpy(), to_numpy(ours.seen.out[1:])
        ran = Ran(hf.stages, truth.stages, ours.seen.stages, ends, None if half is None else half.stages)
        ran.by = hf
        if original is not None:
            ran.original, ran.attended = original.stages, next(iter(original.attended.values()))[0]
        return ran

    def _experts(self, hands: Sequence[Hand]) -> None:
        waiting = [hand for hand in hands if hand.asked is not None]
        if not waiting:
            return
        hf = hands[0]
        assert isinstance(hf, HfHand)
        for first in range(0, self.args.n_routed_experts, self.chunk):
            self.tell(f"layer {hf.index}, expert {first} of {self.args.n_routed_experts}")
            weights = self.theirs.experts(hf.index, first, min(self.chunk, self.args.n_routed_experts - first))
            for hand in waiting:
                hand.take(first, weights)
            if not any(isinstance(hand, OriginalHand) for hand in waiting):
                self.beside(hf.index, first, weights, None)
            del weights  # before the next are read
        for hand in waiting:
            if isinstance(hand, OriginalHand):
                hand.take_dropped(self.chunk)

    def _advance(self, hf: HfHand, seen: Seen, original: OriginalHand | None) -> None:
        """What goes into the next layer."""
        self.hf, self.hf_selection = hf.out, hf.selection
        self.own = mx.concatenate([mx.array(hf.out.numpy()).astype(self.ours.dtype), seen.out[1:]])
        self.own_selection = seen.selection
        if seen.selection is not None and hf.selection is not None:
            handed = mx.array(hf.selection.numpy()).astype(seen.selection.dtype)
            self.own_selection = mx.concatenate([handed, seen.selection[1:]])
        mx.eval(self.own)
        if original is not None:
            self.first, self.original_selection = torch.cat([hf.out, original.out[1:]]), original.selection
            if original.selection is not None and hf.selection is not None:
                self.original_selection = torch.cat([hf.selection, original.selection[1:]])

    # -- what an interrupted run needs to go on

    def state(self) -> dict[str, Array]:
        of_torch = {"hf": self.hf, "hf_selection": self.hf_selection}
        if self.original is not None:
            of_torch |= {"first": self.first, "original_selection": self.original_selection}
        of_mlx = {"own": self.own, "own_selection": self.own_selection}
        kept = {n: None if t is None else t.numpy() for n, t in of_torch.items()}
        kept |= {n: to_numpy(a) for n, a in of_mlx.items()}
        return {name: array for name, array in kept.items() if array is not None}

    def restore(self, state: Mapping[str, Array]) -> None:
        for name in ("hf", "hf_selection", "first", "original_selection"):
            if name in state:
                setattr(self, name, torch.from_numpy(state[name]))
        self.own = mx.array(state["own"]).astype(self.ours.dtype)
        if "own_selection" in state:
            self.own_selection = mx.array(state["own_selection"])
