"""What a cache changes: the prompt once more, in chunks and then token by token, and the catalogue's mistakes that show so.

Uncached, every stage was held to the reference; here the candidate's logits are held to its own without a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from glm_dsa.errors import GlmDsaError

from .. import faults
from ..core import compare
from ..engines.definition import to_numpy
from ..engines.factory import runner_of
from ..engines.marshal import call_model, first, new_cache
from ..engines.run_definition import OurRunner
from ..engines.run_third_party import TheirRunner
from ..engines.spec import OURS, Side
from ..engines.third_party import Failed
from ..faults.coverage import recorded

Array = np.ndarray
LAST, CHUNK = 8, 4  # single tokens at the end, and the chunk before them
BEYOND = 100.0  # times the logits' bound: a near tie may fall the other way, and is no fault of the cache
NATS = 1e-4
ALIKE = 1e-3  # of the logits' rms: how near a mistake made here must come
SUSPECTED = ("cache", "mask", "int8 cache", "rope", "MLA", "indexer")


@dataclass(frozen=True)
class Cached:
    """first: the position from which on logits are others; kl: the largest there, in nats; call: its length in tokens and its
    number. causes: mistakes that give the same logits."""

    first: int
    kl: float
    call: str
    causes: tuple[str, ...]
    tried: int

    def lines(self) -> list[str]:
        found = [f"{name}: {faults.CATALOGUE[name].what}; making it here gives the same logits" for name in self.causes]
        return [f"from token {self.first} on, in {self.call}; KL to its own without a cache up to {self.kl:.3g} nats",
                *(found or [f"cause unknown: none of {self.tried} catalogued mistakes gives the same"])]  # fmt: skip


def cuts(length: int) -> list[int]:
    """Two chunks, a small one, then single tokens."""
    last = min(LAST, length // 4)
    chunk = min(CHUNK, length // 4)
    half = (length - last - chunk) // 2
    return [cut for cut in (half, length - last - chunk - half, chunk, *[1] * last) if cut]


def logits(side: Side, tokens: Array) -> Array | None:
    """[S, V], in those cuts; None where there is no cache to be tried. Raises what the side's code raises."""
    runner = runner_of(side)
    if not isinstance(runner, (OurRunner, TheirRunner)):
        return None
    with side.within(None):
        if isinstance(runner, OurRunner):
            model: Any = runner.assembled().model
            kv = {k: v for k, v in side.options.items() if k.startswith("kv_")}
            cache, call = model.make_cache(**kv), lambda part: model(mx.array(part), cache)
        else:
            model = runner.load()
            cache, call = new_cache(model), lambda part: call_model(model, part, cache)
        parts, start = [], 0
        for cut in cuts(tokens.shape[1]):
            out, _ = first(call(tokens[:, start : start + cut]), mx.floating)
            part = to_numpy(out)
            if part is None or part.shape[:2] != (1, cut):
                return np.zeros((0, 0))  # no logits of every token: that is something else
            parts.append(part[0])
            start += cut
    return np.concatenate(parts)


def changed(with_cache: Array, without: Array, bound: float) -> int | None:
    """The first position at which a cache changes what is said."""
    if with_cache.shape != without.shape or not np.isfinite(with_cache).all():
        return 0
    scale = np.sqrt(np.mean(without.astype(np.float64) ** 2))
    apart = np.abs(with_cache - without).max(-1) / scale > BEYOND * bound
    apart &= compare.kl_by_position(with_cache, without) > NATS
    return int(np.argmax(apart)) if apart.any() else None


def examine(
    side: Side, tokens: Array, without: Array, bound: float, left_out: Sequence[str], tell: Callable[[str], None]
) -> Cached | None:
    """without: the candidate's logits of the whole prompt at once, [S, V]. None where a cache changes nothing."""
    mine = logits(side, tokens)
    if mine is None or (at := changed(mine, without, bound)) is None:
        return None
    call = next(i for i, end in enumerate(np.cumsum(cuts(tokens.shape[1]))) if end > at)
    length = cuts(tokens.shape[1])[call]
    is_whole = mine.shape == without.shape and bool(np.isfinite(mine).all())
    kl = float(compare.kl_by_position(mine, without).max()) if is_whole else np.inf
    found, tried = [], 0
    for name in _suspects(side, tokens, left_out):
        tell(f"suspect: {name}")
        tried += 1
        if _alike(_seeded(side, tokens, name), mine):
            found.append(name)
    return Cached(at, kl, f"call {call + 1}, of {length} token{'s' if length > 1 else ''}", tuple(found), tried)


def _suspects(side: Side, tokens: Array, left_out: Sequence[str]) -> list[str]:
    own = side.on(OURS, overrides=side.overrides)
    with recorded() as ran:
        logits(own, tokens)
    return [
        f.name for f in faults.CATALOGUE.values()
        if f.component in SUSPECTED and not f.equivalent and f.name not in left_out and all(e.where in ran for e in f.edits)
    ]  # fmt: skip


def _seeded(side: Side, tokens: Array, name: str) -> Array | None:
    kept = {k: v for k, v in side.options.items() if side.implementation == OURS and k.startswith("kv_")}
    own = replace(side.on(OURS, overrides=side.overrides), options=kept)
    try:
        with faults.seeded(name):
            return logits(own, tokens)
    except (GlmDsaError, Failed, LookupError, ValueError, TypeError, AttributeError, RuntimeError, AssertionError):
        return None


def _alike(seen: Array | None, mine: Array) -> bool:
    if seen is None or seen.shape != mine.shape:
        return False
    finite = np.isfinite(mine)
    scale = np.sqrt(np.mean(mine[finite].astype(np.float64) ** 2)) or 1.0
    gap = np.abs(np.where(finite, seen, 0) - np.where(finite, mine, 0)).max(-1) / scale
    return bool(np.array_equal(finite, np.isfinite(seen)) and (gap > ALIKE).mean() <= 0.01)
