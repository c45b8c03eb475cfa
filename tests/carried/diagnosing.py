"""`python -m tests.carried --drift`: how many of the carried faults `python -m verify drift` names.

Each alone, in HF and in mlx-lm; a fifth of the catalogue withheld, in HF; and two and three at once, in HF.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from hashlib import sha256
from itertools import combinations, islice
from multiprocessing import get_context
from pathlib import Path
from tempfile import mkdtemp

import torch

from verify.faults import CATALOGUE
from verify.faults.catalogue import pairs

from . import kept
from .compared import Trial
from .diagnosed import HF, STOCK, Diagnosed, diagnose
from .in_hf import IN_HF
from .in_stock import IN_STOCK
from .kept import Task

FOLDS = 5
PAIRS, TRIPLES = 20, 10
LEAST = 0.95
# the components that stages can tell apart, by what the catalogue calls them
TOLD_AS = {
    "mask": {"indexer", "MLA"}, "IndexShare": {"IndexShare", "indexer", "MLA"}, "rope": {"rope", "MLA", "indexer"},
    "decoder layer": {"decoder layer", "MoE", "indexer", "embedding", "head", "MLA"},
    "weights": {"MLA", "MoE", "router"}, "MoE": {"MoE", "router"},
}  # fmt: skip

_trial: list[Trial] = []


def lot(text: str) -> int:
    """Drawn from names, so that a fault that is added leaves the lots of the others."""
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big")


def withheld(number: int) -> list[str]:
    """A fifth of the catalogue."""
    return [name for name in CATALOGUE if lot(name) % FOLDS == number]


def tasks(folds: Iterable[int] = (0,), dtypes: Sequence[str] = ("float32",)) -> list[Task]:
    out = [Task("alone", (name,), HF, dtype) for dtype in dtypes for name in IN_HF]
    out += [Task("alone", (name,), STOCK) for name in IN_STOCK]
    halves = {fault.name for fault in pairs.faults()}  # of which a withheld mistake may be one
    for number in folds:
        chosen = withheld(number)
        without = tuple(name for name in CATALOGUE if name in halves.union(chosen))
        out += [Task("withheld", (name,), HF, without=without) for name in chosen if name in IN_HF]
    return out + [Task("together", names, HF) for names in together()]


def together() -> list[tuple[str, ...]]:
    """Faults of one case that change other places."""
    out = list[tuple[str, ...]]()
    for size, count in ((2, PAIRS), (3, TRIPLES)):
        drawn = sorted(combinations(sorted(IN_HF), size), key=lambda names: lot("+".join(names)))
        out += islice(filter(go_together, drawn), count)
    return out


def go_together(names: Sequence[str]) -> bool:
    chosen = [IN_HF[name] for name in names]
    places = [change[:2] for fault in chosen for change in fault.changes]
    functions = [c[0] for fault in chosen for c in fault.changes]
    alike = len({(f.case, f.length) for f in chosen}) == 1
    return alike and len(set(places)) == len(places) and len(set(functions)) == len(functions)


def judged(task: Task) -> tuple[Task, Diagnosed | str]:
    if not _trial:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        _trial.append(Trial(Path(mkdtemp(prefix="carried-")), seed=11))
    try:
        return task, diagnose(_trial[0], task.names, task.where, task.dtype, task.without)
    except Exception as error:
        return task, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def is_right(task: Task, found: Diagnosed | str) -> bool:
    """Alone: named, and nothing else, at its stage. Withheld: nothing of the catalogue is named, and the component is right
    (where it is a convention that is wrong, that may be named). Together: the first divergence is one of them, named."""
    if isinstance(found, str):
        return False
    if task.what == "alone":
        return found.is_named and found.at_its_stage
    if task.what == "withheld":
        named = {name for cause in found.named for name in cause}
        return not named & (set(CATALOGUE) - set(task.names)) and component_is_right(task.names[0], found)
    return bool(found.named) and bool(set(task.names) & set(found.named[0]))


def record(task: Task, found: Diagnosed | str) -> dict:
    said = asdict(task) | {"names": list(task.names), "right": is_right(task, found)}
    del said["without"]
    said |= {"key": kept.key(task)}
    if isinstance(found, str):
        return said | {"seen": True, "found": found}
    told = asdict(found)
    del told["names"], told["seconds"]
    return said | {"seen": bool(found.stage), "found": told}


def component_is_right(name: str, found: Diagnosed) -> bool:
    due = CATALOGUE[name].component
    return bool(set(found.component.split(" and ")) & TOLD_AS.get(due, {due}))


def main(
    processes: int = 2, folds: Iterable[int] = (0,), dtypes: Sequence[str] = ("float32",), keep: bool = False
) -> int:
    full = kept.core()
    records = list(diagnosed(tasks(folds, dtypes), processes))
    print("\n" + table(records))
    if keep:
        keep_all(full, records)
    return int(not all(enough(records, kind) for kind in kinds(records)))


def changed(processes: int, keep: bool) -> int:
    """What a change may have made untrue of the record is diagnosed again (kept.due)."""
    full, rows = kept.read()
    every = tasks()
    due = kept.due(every, full, rows, keep)
    reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(due.values()).items())
    print(f"{len(due)} of {len(every)} to diagnose{': ' if due else ''}{reasons}; {kept.caption(full, rows)}", flush=True)
    found: list[dict] = []
    for row in diagnosed(list(due), processes) if due else ():
        found.append(row)
        if keep:  # as they come: a run that is cut short has lost one
            keep_all(full, kept.renewed(every, rows, found))
    lines = kept.differences(rows, found)
    print("\n".join(["", *(lines or ["nothing differs from the record"])]))
    if keep:
        keep_all(full, kept.renewed(every, rows, found))
    return int(bool(lines))


def release() -> int:
    """Refuses a record that is not of a full run on this code."""
    full, rows = kept.read()
    print(kept.caption(full, rows))
    wrong = [f"stale: {t.what} {'+'.join(t.names)} in {t.where}; run make full" for t in kept.stale(tasks(), rows)]
    wrong += [] if full == kept.core() else [f"expected a full run at core {kept.core()}, got {full}; make full renews it"]
    print("\n".join(wrong) or "fit for a release")
    return int(bool(wrong))


def diagnosed(chosen: Sequence[Task], processes: int) -> Iterator[dict]:
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for task, found in pool.map(judged, chosen):
            right = is_right(task, found)
            told = found if isinstance(found, str) else f"{found.stage or '-'}: {found.named or 'unknown'}"
            left = "" if isinstance(found, str) or not found.left else f"; left: {', '.join(found.left)}"
            component = "" if isinstance(found, str) else f" [{found.component}]"
            print(f"{'     ' if right else 'WRONG'} {task.what} {'+'.join(task.names)} in {task.where}, {task.dtype}: "
                  f"{told}{component}{left}", flush=True)  # fmt: skip
            yield record(task, found)


def keep_all(full: str, records: Sequence[dict]) -> None:
    kept.KEPT.write_text(kept.as_lines(full, records), encoding="utf-8")


def kinds(records: Sequence[dict]) -> list[tuple[str, str, str, int]]:
    """(what, where, dtype, how many faults at once), in the order of the run."""
    return list(dict.fromkeys((r["what"], r["where"], r["dtype"], len(r["names"])) for r in records))


def of(records: Sequence[dict], kind: tuple[str, str, str, int]) -> list[dict]:
    return [r for r in records if (r["what"], r["where"], r["dtype"], len(r["names"])) == kind]


def enough(records: Sequence[dict], kind: tuple[str, str, str, int]) -> bool:
    """Of those that show at all: in 16 bit, what moves less than HF's own rounding does not."""
    mine = [r for r in of(records, kind) if r["seen"] or kind[2] == "float32"]
    return sum(r["right"] for r in mine) >= LEAST * len(mine)


WHERE = {HF: "HF's modules", STOCK: "mlx-lm's definition"}


def table(records: Sequence[dict]) -> str:
    """What of each kind was right, as the documentation has it."""
    said = {
        ("alone", 1): "one fault, its stage met first and it alone named",
        ("withheld", 1): "one fault that the catalogue does not have (a fifth is withheld): unknown, with the right component",
        ("together", 2): "two faults, the first one named", ("together", 3): "three faults, the first one named",
    }  # fmt: skip
    rows = ["| candidate | right | of | not to be seen |", "|---|---|---|---|"]
    for kind in kinds(records):
        mine = of(records, kind)
        what, where, dtype, count = kind
        right, seen = sum(r["right"] for r in mine), sum(r["seen"] for r in mine)
        is_16_bit = dtype != "float32"
        shown, unseen = (seen, len(mine) - seen) if is_16_bit else (len(mine), 0)
        rows.append(f"| {WHERE[where]} in {dtype}: {said[what, count]} | {right} | {shown} | {unseen} |")
    return "\n".join(rows)
