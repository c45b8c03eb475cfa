"""Rounds in both orders, since machines are noisy: medians, spread, and the peak of what mlx held."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from .contenders import Side


@dataclass
class Timed:
    """seconds: of each run; peak: bytes above weights and cache, where mlx can tell."""

    seconds: list[float] = field(default_factory=list)
    peak: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median."""
        return (max(self.seconds) - min(self.seconds)) / self.median

    def as_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "median": self.median, "spread": self.spread, "peak_bytes": self.peak}


def once(run: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def rounds(sides: Sequence[Side], count: int, least: float = 0.0) -> dict[str, Timed]:
    """Each side `count` times, or until it ran `least` seconds in all; every second round in the reverse order."""
    found = {side.name: Timed() for side in sides}
    for side in sides:
        side.run()  # buffers are made, kernels compiled
    for turn in range(count):
        for side in sides if turn % 2 == 0 else reversed(sides):
            timed, repeat = found[side.name], True
            while repeat:  # what is over in no time is run more often
                before = _start_peak()
                timed.seconds.append(once(side.run))
                if side.in_mlx:
                    timed.peak = max(timed.peak or 0, mx.get_peak_memory() - before)
                repeat = sum(timed.seconds) < least * (turn + 1) / count
    return found


def _start_peak() -> int:
    mx.reset_peak_memory()
    return mx.get_active_memory()


def of(run: Callable[[], Any], count: int, least: float = 0.0) -> Timed:
    """The same of something that is no side."""
    timed = Timed()
    mx.eval(run())
    while len(timed.seconds) < count or sum(timed.seconds) < least:
        timed.seconds.append(once(lambda: mx.eval(run())))
    return timed
