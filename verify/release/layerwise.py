"""A release against HF and the equations, layer by layer, in one pass over its weights and in bounded memory.

Several engines run a layer: HF's module on the release's own weights, unpacked; the equations in float64, on HF's input and
under HF's choices; ours on the release as it is stored, on two rows: HF's input (local error) and what ours itself made of the
layers before (drift); where ours runs in bfloat16, HF's module in that, under its own choices in float32; and, where there is
an original, HF's module on that, on two rows of the same kind. When all stand at their experts, these are read, a chunk at a
time, and each takes what is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import torch

from ..core import stages
from ..engines.base import MX, Answer, Request, Underway, Weights, chunks, experts_at_once
from ..engines.definition import to_numpy
from ..engines.pruning import Numbering, Numberings
from ..engines.run_definition import DefinitionEngine
from ..engines.run_equations import EquationsEngine
from ..engines.run_hf import HfEngine
from ..engines.spec import EQUATIONS, HF, Side

Array = np.ndarray
Beside = Callable[[int, int, Weights | None, Weights | None], None]


@dataclass
class Ran:
    """One layer by all engines. hf, truth: {stage: array} of one row; ours: of two, HF's input and its own; original: of two,
    HF's input and its own. given: HF's input and selection. ends: the layer's output, HF's and ours on its own."""

    hf: dict[str, Array]
    truth: dict[str, Array]
    ours: Mapping[str, Any]
    ends: tuple[Array, Array]
    given: tuple[torch.Tensor, torch.Tensor | None]
    half: Mapping[str, Array] | None = None  # HF in bfloat16, where ours runs in it
    original: Mapping[str, Array] = field(default_factory=dict)
    attended: Array | None = None  # by the original, on HF's input: [S, T], the mean over heads


class Pass:
    """The streams of a release, advanced a layer at a time."""

    def __init__(
        self,
        release: Side,
        tokens: Array,
        original: Side | None = None,
        beside: Beside = lambda *_: None,
        tell: Callable[[str], None] = lambda _: None,
        numberings: Numberings | None = None,
    ) -> None:
        """release: ours on it, in the dtype that ours runs in; beside bfloat16, HF runs in it too. `beside(layer, first, the
        release's experts, the original's)` sees each chunk of experts, those that the release has not at last; `tell` where we
        are. numberings: of the layers whose experts are not numbered as the original's."""
        oracle = release.on(HF, overrides=release.overrides)
        self.theirs, self.ours = HfEngine(oracle), DefinitionEngine(release)
        self.truth = EquationsEngine(release.on(EQUATIONS, overrides=release.overrides), self.theirs.layers)
        is_half = release.dtype == "bfloat16"
        self.half = HfEngine(oracle.in_dtype(release.dtype)) if is_half else None
        self.args, self.tokens, self.dtype = release.args, tokens, MX[release.dtype]
        self.beside, self.tell, self.numberings = beside, tell, numberings or {}
        same = {"index_topk": self.args.index_topk} if self.args.has_indexer else {}  # selections go side by side
        self.original = (
            None if original is None else HfEngine(original.on(HF, overrides={**original.overrides, **same}))
        )
        self.chunk = experts_at_once(self.args)
        self.hf_selection: torch.Tensor | None = None
        self.own_selection: mx.array | None = None
        self.original_selection: torch.Tensor | None = None

    def embed(self) -> None:
        ids = torch.as_tensor(self.tokens)
        self.hf, own = self.theirs.layers.embed(ids), self.ours.layers.embed(self.tokens)
        self.own = mx.concatenate([own, own])  # [HF's input, its own]
        if self.original is not None:
            self.first = torch.cat([self.hf, self.original.layers.embed(ids)])  # [HF's input, its own]

    @property
    def is_sparse(self) -> bool:
        return 0 < self.args.index_topk < self.tokens.shape[1]

    @property
    def mtp(self) -> int | None:
        """The MTP layer's number, where the release has one."""
        return self.args.num_hidden_layers if self.theirs.layers.has_mtp else None

    def layer(self, index: int) -> Ran:
        if index == self.mtp:
            return self._mtp(index)
        theirs = None if self.original is None else (self.first, self.original_selection)
        ran, hf, ours, original = self._run(index, (self.hf, self.hf_selection), (self.own, self.own_selection), theirs)
        # what goes into the next layer
        self.hf, self.hf_selection = hf.out, hf.selection
        self.own = mx.concatenate([mx.array(hf.out.numpy()).astype(self.dtype), ours.out[1:]])
        self.own_selection = ours.selection
        if ours.selection is not None and hf.selection is not None:
            handed = mx.array(hf.selection.numpy()).astype(ours.selection.dtype)
            self.own_selection = mx.concatenate([handed, ours.selection[1:]])
        mx.eval(self.own)
        if original is not None:
            self.first, self.original_selection = torch.cat([hf.out, original.out[1:]]), original.selection
            if original.selection is not None and hf.selection is not None:
                self.original_selection = torch.cat([hf.selection, original.selection[1:]])
        return ran

    def _mtp(self, index: int) -> Ran:
        """The first draft step over the whole prompt."""
        hidden = self.theirs.layers.norm(self.hf)
        around, embedded, x = self.theirs.before_mtp(self.tokens, hidden)
        embeddings = self.ours.layers.mtp_embeddings(self.tokens)
        own = mx.concatenate([mx.array(hidden.numpy()).astype(self.dtype), self.ours.layers.norm(self.own[1:])])
        theirs = None
        if self.original is not None and self.original.layers.has_mtp:
            both = torch.cat([hidden, self.original.layers.norm(self.first[1:])])
            theirs = self.original.before_mtp(self.tokens, both)[2], None
        ran, hf, ours, _ = self._run(index, (x, None), (own, None), theirs, mx.concatenate([embeddings, embeddings]))
        last = around.after(hf.out)
        ran.hf |= {f"layers.{index}.eh_proj": x.numpy(), f"layers.{index}.shared_head": last.numpy()}
        ran.truth |= {
            f"layers.{index}.eh_proj": self.truth.eh_proj(embedded.double().numpy(), hidden.double().numpy()),
            f"layers.{index}.shared_head": self.truth.shared_head(ran.truth[f"layers.{index}.output"]),
        }
        ran.ends = last.numpy(), to_numpy(ours.out[1:])
        return ran

    def _run(
        self,
        index: int,
        given: tuple[torch.Tensor, torch.Tensor | None],
        own: tuple[mx.array, mx.array | None],
        theirs: tuple[torch.Tensor, torch.Tensor | None] | None,
        embeddings: mx.array | None = None,
    ) -> tuple[Ran, Answer[torch.Tensor], Answer[mx.array], Answer[torch.Tensor] | None]:
        """What HF, ours and the original are given, (input, selection) each -> what came of it."""
        x, selection = given
        hf = Underway(self.theirs.layer(index, x, selection, {}))
        choices = {s: v for s, v in hf.stages.items() if s.endswith(".topk")}
        original, attended = None, dict[str, Array]()
        if theirs is not None:
            assert self.original is not None
            places = torch.from_numpy(self._numbering(index).places)
            original = Underway(self.original.layer(index, *theirs, {}, attended, places))
        handed = None if selection is None else selection.numpy()
        truth = Underway(self.truth.layer(index, x.double().numpy(), handed, choices))
        under = stages.choices(choices, self.is_sparse)
        ours = Underway(self.ours.layer(index, *own, under, embeddings))
        half = None if self.half is None else Underway(self.half.layer(index, x, selection, choices))
        if hf.request is not None:
            requests = [run.request for run in (hf, truth, ours, half) if run is not None and run.request is not None]
            self._experts(index, requests, None if original is None else original.request)
        ends = hf.finish().out.numpy(), to_numpy(ours.finish().out[1:])
        ran = Ran(
            dict(hf.finish().stages), dict(truth.finish().stages), ours.finish().stages, ends, given,
            None if half is None else half.finish().stages,
        )  # fmt: skip
        if original is not None:
            ran.original, ran.attended = original.finish().stages, next(iter(attended.values()))[0]
        return ran, hf.finish(), ours.finish(), None if original is None else original.finish()

    def _experts(self, index: int, requests: list[Request], of_original: Request | None) -> None:
        """Reads them, each chunk once, for all who ask; the original's own are shown beside the release's."""
        every = self.args.n_routed_experts
        for first, count in chunks(self.args, self.chunk):
            self.tell(f"layer {index}, expert {first} of {every}")
            weights = self.theirs.layers.experts(index, first, count)
            for request in requests:
                request.take(first, weights)
            if of_original is None:
                self.beside(index, first, weights, None)
            else:
                self._take(index, of_original, first, count, weights)
            del weights  # before the next are read
        if of_original is not None:  # those that only the original has
            whole = len(self._numbering(index).order)
            for first in range(every, whole, self.chunk):
                self._take(index, of_original, first, min(self.chunk, whole - first), None)

    def _take(self, index: int, request: Request, first: int, count: int, beside: Weights | None) -> None:
        """The original's experts, by the release's numbers, those that it dropped behind them."""
        assert self.original is not None
        numbers = self._numbering(index).order[first : first + count].tolist()
        weights = self.original.layers.some_experts(index, numbers)
        self.beside(index, first, beside, weights)
        request.take(first, weights)

    def _numbering(self, index: int) -> Numbering:
        return self.numberings.get(index) or Numbering.plain(self.args.n_routed_experts)

    def in_float32(self, index: int, ran: Ran) -> Mapping[str, Array]:
        """The equations once more, in float32, on a layer that has passed: what float32 explains. It is read again for that."""
        x, selection = ran.given
        choices = {s: v for s, v in ran.hf.items() if s.endswith(".topk")}
        return self.truth.in_float32(index, x.numpy(), None if selection is None else selection.numpy(), choices)

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
        self.own = mx.array(state["own"]).astype(self.dtype)
        if "own_selection" in state:
            self.own_selection = mx.array(state["own_selection"])
