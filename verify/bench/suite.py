"""What a run measures, and the targets that it is held to."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from glm_dsa import ModelArgs
from glm_dsa.moe import MixtureOfExperts

from ..core import report
from . import floor as bare
from . import flops
from .contenders import EIGHTH, TRUE, Filled, Hf, Ours, Side, Stock, read
from .flops import Count, Sizes
from .timing import Timed, of, once, rounds

FREQ = 4  # GLM-5.2: of so many layers one makes the selection
PREFILL, DECODE = "prefill", "decode"
OURS, SHARED, STOCK = "ours", "ours, shared layer", Stock.name
LEAST = 0.4  # seconds that each side runs for at least, where a run is short
ATTENTION, SHARED_DECODE = "attention of a chunk, indexer apart", "decode through a shared layer"
PAIRS = ((ATTENTION, 8192, 65536), (SHARED_DECODE, 4096, 65536))
TURNS = 24  # of each pair: single runs differ by a third on a shared machine
ALIKE = 1e-3  # the median difference between two sides' outputs, over the rms


@dataclass
class Case:
    """One chunk of `chunk` tokens for `batch` rows, behind `context` tokens; sides: name -> what it took."""

    kind: str
    context: int
    chunk: int
    batch: int
    widths: str
    sides: dict[str, Timed] = field(default_factory=dict)

    def rate(self, side: str) -> float:
        """Tokens a second through one layer's attention, all rows together."""
        return self.chunk * self.batch / self.sides[side].median

    @property
    def rate_with_sharing(self) -> float:
        """The same, on average over one full layer and those that share its selection."""
        seconds = (self.sides[OURS].median + (FREQ - 1) * self.sides[SHARED].median) / FREQ
        return self.chunk * self.batch / seconds

    @property
    def speedup(self) -> float:
        return self.rate(OURS) / self.rate(STOCK)

    @property
    def speedup_with_sharing(self) -> float:
        return self.rate_with_sharing / self.rate(STOCK)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "sides": {name: timed.as_dict() for name, timed in self.sides.items()},
                "tokens_per_second": {name: self.rate(name) for name in self.sides}}  # fmt: skip


@dataclass
class Part:
    """One part of our chunk, beside what it counts and the bare primitives at the same shapes."""

    kind: str
    context: int
    part: str
    seconds: float
    count: Count
    floor: float
    primitives: list[bare.Primitive] = field(default_factory=list)

    @property
    def distance(self) -> float:
        return self.seconds / self.floor if self.floor else float("nan")

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "distance": self.distance, "operations": self.count.operations}


@dataclass
class Pair:
    """The same behind two contexts, in turns: what grows between them is the context's."""

    what: str
    near: int
    far: int
    seconds: dict[int, Timed]

    @property
    def ratio(self) -> float:
        return self.seconds[self.far].median / self.seconds[self.near].median

    def as_dict(self) -> dict[str, Any]:
        timed = {str(context): timed.as_dict() for context, timed in self.seconds.items()}
        return {"what": self.what, "near": self.near, "far": self.far, "seconds": timed, "ratio": self.ratio}


@dataclass
class Target:
    what: str
    due: str
    found: float
    met: bool
    note: str = ""


@dataclass
class Bench:
    """All that a run found."""

    config: dict[str, Any]
    device: str
    chunk: int
    rounds: int
    cases: list[Case] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    command: str = ""
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())
    versions: dict[str, str] = field(default_factory=report.versions)
    processor: str = field(default_factory=lambda: processor())

    def case(self, kind: str, context: int, batch: int = 1, widths: str = "eighth") -> Case | None:
        wanted = (kind, context, batch, widths)
        return next((c for c in self.cases if (c.kind, c.context, c.batch, c.widths) == wanted), None)

    def as_dict(self) -> dict[str, Any]:
        return {
            "format": 1, "command": self.command, "date": self.date, "versions": self.versions,
            "processor": self.processor, "device": self.device, "chunk": self.chunk,
            "rounds": self.rounds, "config": self.config, "cases": [c.as_dict() for c in self.cases],
            "parts": [p.as_dict() for p in self.parts], "pairs": [p.as_dict() for p in self.pairs],
            "targets": [asdict(t) for t in self.targets], "left_out": self.left_out,
        }  # fmt: skip

    @classmethod
    def of_dict(cls, record: dict[str, Any]) -> Bench:
        """What `as_dict` wrote."""
        known = {k: v for k, v in record.items() if k not in ("format", "cases", "parts", "pairs", "targets")}
        found = cls(**known)
        for case in record["cases"]:
            sides = {n: Timed(t["seconds"], t["peak_bytes"]) for n, t in case["sides"].items()}
            where = case["kind"], case["context"], case["chunk"], case["batch"], case["widths"]
            found.cases.append(Case(*where, sides))
        for part in record["parts"]:
            made, count = [bare.Primitive(**p) for p in part["primitives"]], Count(**part["count"])
            what = part["kind"], part["context"], part["part"], part["seconds"]
            found.parts.append(Part(*what, count, part["floor"], made))
        for pair in record["pairs"]:
            timed = {int(c): Timed(t["seconds"], t["peak_bytes"]) for c, t in pair["seconds"].items()}
            found.pairs.append(Pair(pair["what"], pair["near"], pair["far"], timed))
        found.targets = [Target(**t) for t in record["targets"]]
        return found


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


@dataclass
class Course:
    """contexts: tokens that are cached already. hf_up_to: HF's dense attention takes memory of S times T times heads."""

    contexts: Sequence[int]
    chunk: int = 128
    rounds: int = 3
    batches: Sequence[int] = (1, 4, 16)
    hf_up_to: int = 16384
    true_context: int | None = 16384
    tell: Callable[[str], None] = lambda _: None

    def run(self) -> Bench:
        """Raises ValueError where two sides do not compute the same."""
        config = read(EIGHTH)
        self.args = ModelArgs.from_dict(config)
        device = "gpu" if mx.default_device() == mx.Device(mx.gpu) else "cpu"
        found = Bench(config, device, self.chunk, self.rounds)
        if device == "cpu":
            found.left_out["contexts up to 1M on a GPU"] = "mlx runs on the CPU here"
        found.left_out["int8 at these widths"] = (
            "a rotary key of 8 holds no group of 32 values: measured at GLM-5.2's true widths"
        )
        self.ours = Ours(self.args)
        self.shared = Ours(self.args, shared=True, like=self.ours)
        self.stock, self.hf = Stock(self.ours, config), Hf(self.ours, config)
        for context in self.contexts:
            for kind in (PREFILL, DECODE):
                found.cases.append(self._case(kind, context, 1))
                if context > self.args.index_topk:
                    found.parts += self._parts(kind, context)
        below = [c for c in self.contexts if c + self.chunk <= self.args.index_topk]
        for batch in self.batches if below else ():
            for kind in (PREFILL, DECODE):
                if batch > 1:
                    found.cases.append(self._case(kind, below[-1], batch))
        found.pairs = [self._pair(*pair) for pair in PAIRS if {pair[1], pair[2]} <= set(self.contexts)]
        found.parts += self._elsewhere()
        if self.true_context is not None:
            found.cases.append(self._true_widths(self.true_context))
        found.targets = list(targets(found))
        return found

    def _case(self, kind: str, context: int, batch: int) -> Case:
        chunk = self.chunk if kind == PREFILL else 1
        self.tell(f"{kind} of {chunk} behind {context} tokens, {batch} rows")
        filled = Filled(self.args, context, chunk, batch)
        sides: list[Side] = [self.ours, self.shared, self.stock]
        if context <= self.hf_up_to:
            sides.append(self.hf)
        for side in sides:
            side.fill(filled)
        alike(self.ours, self.shared)
        alike(self.ours, self.stock)
        if self.hf in sides:
            alike(self.ours, self.hf)
        times = self.rounds if context > self.args.index_topk else 2 * self.rounds  # there they differ by little
        return Case(kind, context, chunk, batch, "eighth", rounds(sides, times, LEAST))

    def _parts(self, kind: str, context: int) -> Iterator[Part]:
        chunk = self.chunk if kind == PREFILL else 1
        self.tell(f"parts of {kind} behind {context} tokens")
        ours = self.ours
        ours.fill(Filled(self.args, context, chunk))
        whole, total = of(ours.run, self.rounds, LEAST), context + chunk
        gathered = of(ours.attend_apart(), self.rounds, LEAST)
        indexed = of(ours.select, self.rounds, LEAST)
        rest = max(whole.median - gathered.median - indexed.median, 0.0)
        sizes, a = Sizes(), self.args
        for name, seconds, count, of_primitives in (
            ("indexer", indexed.median, flops.indexer(a, chunk, total, sizes, ours.block.indexer.tile(1, chunk)[0]),
             bare.indexer(ours, 1, chunk, total)),
            ("attention", gathered.median, flops.attention(a, "gathered", chunk, total, sizes),
             bare.attention(ours, 1, chunk, total)),
            ("projections", rest, flops.projections(a, chunk, sizes), bare.projections(ours, 1, chunk)),
        ):  # fmt: skip
            primitives = list(of_primitives)
            yield Part(kind, context, name, seconds, count, sum(p.total for p in primitives), primitives)

    def _pair(self, what: str, near: int, far: int) -> Pair:
        """Attention on what is selected, indexer apart: of a chunk, and of a token in decode through a whole shared layer."""
        self.tell(f"{what} behind {near} and {far} tokens, in turns")
        runs: dict[int, Callable[[], Any]] = {}
        for context in (near, far):
            ours = Ours(self.args, shared=True, like=self.ours)
            ours.fill(Filled(self.args, context, self.chunk if what == ATTENTION else 1))
            attend = ours.attend_apart() if what == ATTENTION else ours.once
            runs[context] = partial(_evaluated, attend)
            runs[context]()
        timed = {near: Timed(), far: Timed()}
        for turn in range(TURNS):
            for context in (near, far) if turn % 2 == 0 else (far, near):
                timed[context].seconds.append(once(runs[context]))
        return Pair(what, near, far, timed)

    def _elsewhere(self) -> Iterator[Part]:
        """What does not depend on the context: apart."""
        args, sizes = self.args, Sizes()
        sparse = next(i for i in range(args.num_hidden_layers) if args.is_sparse(i))
        experts = MixtureOfExperts(args)
        width = mx.random.normal((args.vocab_size, args.hidden_size))
        mx.eval(experts.parameters(), width)
        for kind, chunk in ((PREFILL, self.chunk), (DECODE, 1)):
            self.tell(f"{kind}: experts and head")
            x = mx.random.normal((1, chunk, args.hidden_size))
            mx.eval(x)
            for name, run, count in (
                ("feed-forward", lambda x=x: experts(x), flops.feed_forward(args, sparse, chunk, sizes)),
                ("head", lambda x=x: x @ width.T, flops.head(args, chunk, sizes)),
            ):
                yield Part(kind, 0, name, of(run, self.rounds, LEAST).median, count, 0.0)

    def _true_widths(self, context: int) -> Case:
        """Decode through one layer of GLM-5.2's own widths, where weights dominate; our cache in float and in int8."""
        config = read(TRUE)
        args = ModelArgs.from_dict(config)
        self.tell(f"decode through one layer of true widths behind {context} tokens")
        filled = Filled(args, context, 1)
        ours = Ours(args)
        sides: list[Side] = [
            ours,
            *(Ours(args, shared, bits, ours) for shared, bits in ((True, None), (False, 8), (True, 8))),
        ]
        sides.append(Stock(ours, config))
        for side in sides:
            side.fill(filled)
        alike(ours, sides[-1])
        return Case(DECODE, context, 1, 1, "true", rounds(sides, self.rounds, LEAST))


def _evaluated(run: Callable[[], mx.array]) -> None:
    mx.eval(run())


def alike(one: Side, other: Side) -> None:
    """Raises ValueError."""
    a, b = one.output(), other.output()
    error = float(np.median(np.abs(a - b)) / np.sqrt(np.mean(b**2)))
    if not error <= ALIKE:
        raise ValueError(f"{one.name} and {other.name} do not compute the same: they differ by {error:.2g}")


def label(tokens: int) -> str:
    """16384 -> "16k"."""
    if tokens >= 1 << 20:
        return f"{tokens / 2**20:g}M"
    return f"{tokens // 1024}k" if tokens and tokens % 1024 == 0 else str(tokens)


# -- targets


def _taking(found: Bench, pair: Pair) -> str:
    """The one primitive in it that knows how long the context is: rows from farther apart miss the CPU's caches."""
    if pair.what != ATTENTION:
        return ""
    times = {
        p.context: made.total * 1e3 / found.chunk
        for p in found.parts
        for made in p.primitives
        if (p.kind, p.part) == (PREFILL, "attention") and "rows of" in made.what
    }
    if not {pair.near, pair.far} <= times.keys():
        return ""
    return f"taking the selected rows alone: {times[pair.near]:.2f} and {times[pair.far]:.2f} ms a token"


def targets(found: Bench) -> Iterator[Target]:
    """What is asked of long contexts, as far as this run can tell."""

    def floor_note(kind: str, context: int, shared: bool) -> tuple[float, str]:
        parts = [p for p in found.parts if (p.kind, p.context) == (kind, context)]
        times = {"indexer": 1 / FREQ if shared else 1.0}
        took = sum(p.seconds * times.get(p.part, 1.0) for p in parts)
        least = sum(p.floor * times.get(p.part, 1.0) for p in parts)
        distance = took / least if least else float("inf")
        tokens = found.chunk if kind == PREFILL else 1
        return distance, f"floor {least * 1e3 / tokens:.2f} ms a token, distance {distance:.2f}"

    for context, due, due_shared in ((16384, 4.0, 5.5), (65536, 8.0, 15.0)):
        case = found.case(PREFILL, context)
        if case is None:
            continue
        for what, least, ratio, shared in (
            ("without IndexShare", due, case.speedup, False),
            (f"IndexShare, freq {FREQ}", due_shared, case.speedup_with_sharing, True),
        ):
            distance, note = floor_note(PREFILL, context, shared)
            met = ratio >= least or distance <= 1.5
            yield Target(f"prefill against mlx-lm at {label(context)}, {what}", f">= {least:g}", ratio, met, note)
    near, far = found.case(PREFILL, 8192), found.case(PREFILL, 65536)
    for pair in found.pairs:
        what = f"{pair.what}, {label(pair.far)} over {label(pair.near)}"
        yield Target(what, "<= 1.1", pair.ratio, pair.ratio <= 1.1, _taking(found, pair))
    if near and far:
        peaks = near.sides[OURS].peak, far.sides[OURS].peak
        ratio = (peaks[1] or 0) / (peaks[0] or 1)
        yield Target("peak memory of a chunk, 64k over 8k", "<= 1.2", ratio, ratio <= 1.2)
    middle = found.case(PREFILL, 16384)
    if middle:
        ratio = (middle.sides[OURS].peak or 0) / (middle.sides[STOCK].peak or 1)
        yield Target("peak memory of a chunk at 16k, over mlx-lm's", "<= 0.25", ratio, ratio <= 0.25)
    middle = found.case(DECODE, 16384)
    for what, least, shared in (("without IndexShare", 1.1, False), (f"IndexShare, freq {FREQ}", 1.6, True)):
        if middle:
            ratio = middle.speedup_with_sharing if shared else middle.speedup
            distance, note = floor_note(DECODE, 16384, shared)
            met = ratio >= least or distance <= 1.5
            yield Target(f"decode against mlx-lm at 16k, {what}", f">= {least:g}", ratio, met, note)
    for case in found.cases:
        if case.widths == "eighth" and case.context + case.chunk <= found.config["index_topk"]:
            what = f"{case.kind} against mlx-lm at {label(case.context)}, below index_topk, {case.batch} rows"
            yield Target(what, ">= 0.95", case.speedup, case.speedup >= 0.95)
