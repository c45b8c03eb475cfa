"""All modules of somebody's model on a case, judged; and what could not be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from ..core.collector import Collector
from ..core.report import Report
from ..core.stages import kind_of
from ..engines.third_party import Failed
from . import causes
from .comparison import BOUNDARIES, Watch
from .subject import Theirs

NO_SUBJECT = ("rotary_emb", "act_fn")  # of HF's modules: what they do is seen in others


def judge_case(theirs: Theirs, collector: Collector) -> dict[str, str]:
    """Records each fault, and mends it from then on. Returns {what was not verified: why}.

    Raises `Failed`, with the cause, where the model does not load or does not run.
    """
    theirs.judged = True
    theirs.mended.clear()
    watches = []
    try:
        model = theirs.model
        for path, fault in causes.eps_faults(theirs):
            collector.record(fault)
            theirs.mended.add(path)
        for length in theirs.case.lengths:
            watches += judge_modules(theirs, collector, length)
    except Failed as error:
        theirs.broken = str(error)
        raise
    return _unseen(theirs, model, watches)


def judge_modules(theirs: Theirs, collector: Collector, length: int) -> list[Watch]:
    """Every module on HF's input; the faults are recorded, and HF's output is put in their place from then on.

    Inside its boundaries (attention, feed-forward, indexer, router) code may be cut otherwise than HF's. What differs there
    is a fault only if the boundary around it, judged without repair, differs too.
    """
    reference = theirs.reference(length)
    watch = Watch(theirs, reference, collector)
    watch.forward(reference.reference.tokens)
    watches = [watch]
    if any(kind_of(path) not in BOUNDARIES for path, _ in watch.faults):
        outer = Watch(theirs, reference, collector, inside=False)
        outer.forward(reference.reference.tokens)
        watches.append(outer)
        differing, seen = {path for path, _ in outer.faults}, {*outer.calls} - {*outer.unread}
        kept = []
        for path, fault in watch.faults:
            is_boundary = kind_of(path) in BOUNDARIES
            if path in differing if is_boundary else _around(path, differing, seen):
                kept.append((path, fault))
            elif not is_boundary:
                watch.unread[path] = "differs from HF's; what is made of it, at the next boundary, does not"
        watch.faults = kept
    for path, fault in watch.faults:
        collector.record(fault)
        theirs.mended.add(path)
    return watches


def _around(path: str, differing: Iterable[str], seen: Iterable[str]) -> bool:
    """Whether the nearest boundary that was seen around a module differs."""
    parts = path.split(".")
    for end in range(len(parts) - 1, 1, -1):
        outer = ".".join(parts[:end])
        if outer in seen and kind_of(outer) in BOUNDARIES:
            return outer in differing or f"{outer}.heads" in differing
    return True


def _unseen(theirs: Theirs, model: object, watches: list[Watch]) -> dict[str, str]:
    """One line for each reason, of the kinds of modules that it holds for."""
    seen = {path for watch in watches for path in watch.calls}
    kinds: dict[str, set[str]] = {}
    for path in theirs.hf_paths():
        kind = kind_of(path)
        if path in seen or kind.rsplit(".", 1)[-1] in NO_SUBJECT or kind == "layers":
            continue
        kinds.setdefault(kind, set()).add(path)
    lines = {}
    if kinds:
        names = ", ".join(kind or "the decoder layer" for kind in kinds)
        lines[f"modules by themselves: {names}"] = "not called under HF's path; judged in what is made of them"
    for watch in watches:
        for path, why in watch.unread.items():
            lines[f"{kind_of(path) or 'the decoder layer'} by itself"] = f"it {why}"
    return lines


def judged_before(theirs: Theirs) -> str:
    """Judges the modules, if no test has yet, and says why nothing can be told of what comes behind them; "" if it can."""
    if not theirs.judged:
        with contextlib.suppress(Failed):
            judge_case(theirs, Collector(Report(), "", "", 0))
    return theirs.blind_spot()
