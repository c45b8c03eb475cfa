"""Where a long run is: a bar on a terminal, a plain line a layer elsewhere."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from tqdm import tqdm

from glm_dsa.errors import printable


def peak_memory() -> float:
    """This process's largest resident size so far, GiB, mapped pages included."""
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss would count what a parent held before exec
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


@contextmanager
def line() -> Iterator[Callable[[str], None]]:
    """What is under way, on a terminal's last line."""
    bar = tqdm(disable=not sys.stderr.isatty(), bar_format="{desc}  {elapsed}", leave=False, file=sys.stderr)
    try:
        yield lambda text: bar.set_description_str(printable(text)[:100], refresh=True)
    finally:
        bar.close()


class Progress:
    """`aside`: in it, what is written reaches the terminal, though pytest captures the rest. `nbytes`: of each layer.
    `done`: how many an interrupted run finished; None where none was to be gone on with."""

    def __init__(
        self, nbytes: dict[int, int], aside: Callable[[], AbstractContextManager[None]], done: int | None
    ) -> None:
        self.nbytes, self.aside = nbytes, aside
        with aside():
            self.stream = sys.stderr
            self.bar = tqdm(
                total=len(nbytes), initial=done or 0, unit="layer", disable=not self.stream.isatty(), file=self.stream,
                bar_format="{desc}: {n_fmt}/{total_fmt} layers |{bar}| {elapsed}, {remaining} left{postfix}", leave=False,
            )  # fmt: skip
            if done:
                self.bar.write(f"resumed after {done} of {len(nbytes)} layers", file=self.stream)
            elif done == 0:
                self.bar.write(
                    "--resume: no interrupted run of these weights, options and versions; it starts anew",
                    file=self.stream,
                )
        self.begun, self.before, self.done = time.monotonic(), done or 0, done or 0

    def at(self, stage: str) -> None:
        with self.aside():
            self.bar.set_description_str(stage, refresh=True)

    def layer(self, index: int, seconds: float) -> None:
        self.done += 1
        rate = self.nbytes[index] / 1e6 / max(seconds, 1e-9)
        spoken = f"{rate:.3g} MB/s, peak {peak_memory():.1f} GiB"
        with self.aside():
            self.bar.set_postfix_str(spoken, refresh=False)
            self.bar.update(1)
            if self.bar.disable:
                each = (time.monotonic() - self.begun) / (self.done - self.before)
                left = each * (len(self.nbytes) - self.done)
                print(
                    f"layer {index}: {seconds:.0f} s, {spoken}; {self.done} of {len(self.nbytes)}, {_duration(left)} left",
                    file=self.stream, flush=True,
                )  # fmt: skip

    def close(self) -> None:
        with self.aside():
            self.bar.close()


def _duration(seconds: float) -> str:
    return (
        f"{seconds / 3600:.1f} h"
        if seconds >= 5400
        else f"{seconds / 60:.0f} min"
        if seconds >= 90
        else f"{seconds:.0f} s"
    )
