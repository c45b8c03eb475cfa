"""A run in words: tables for the terminal, and for the documentation."""

from __future__ import annotations

from collections.abc import Iterator

from .contenders import Hf
from .suite import OURS, STOCK, Bench, Case, Target, label

HEADINGS = ("mlx-lm", "HF on torch", "ours", "ours, IndexShare")


def summary(found: Bench) -> Iterator[str]:
    for kind in ("prefill", "decode"):
        cases = [c for c in found.cases if c.kind == kind and c.widths == "eighth"]
        chunks = f", chunks of {found.chunk}" if kind == "prefill" else ""
        yield f"{kind}: tokens a second through one layer's attention{chunks}"
        headings = "".join(f"{h:>18}" for h in (*HEADINGS, "times mlx-lm"))
        yield f"  {'context':>8} {'rows':>4}  {headings}{'peak MB, ours/mlx-lm':>24}"
        for case in cases:
            yield f"  {label(case.context):>8} {case.batch:>4}  " + "".join(_rates(case)) + _peaks(case)
        yield ""
    yield from _true(found)
    yield from _parts(found)
    for what, why in found.left_out.items():
        yield f"not measured: {what}: {why}"
    if found.targets:
        yield ""
        yield f"{'target':<66} {'due':>8} {'found':>8}"
        for t in found.targets:
            note = f"; {t.note}" if t.note else ""
            yield f"  {t.what:<64} {t.due:>8} {t.found:>8.2f}  {_verdict(t)}{note}"


def _verdict(target: Target) -> str:
    """A ratio that was missed is not called met for its floor's sake."""
    sign, number = target.due.split()
    reached = target.found >= float(number) if sign == ">=" else target.found <= float(number)
    return "met" if reached else "missed, within 1.5 of its floor" if target.met else "MISSED"


def _rates(case: Case) -> Iterator[str]:
    hf = case.rate(Hf.name) if Hf.name in case.sides else None
    rates = [case.rate(STOCK), hf, case.rate(OURS), case.rate_with_sharing]
    yield from (f"{'-' if rate is None else f'{rate:,.0f}':>18}" for rate in rates)
    yield f"{f'{case.speedup:.2f} / {case.speedup_with_sharing:.2f}':>18}"


def _peaks(case: Case) -> str:
    return f"{f'{(case.sides[OURS].peak or 0) / 1e6:.0f} / {(case.sides[STOCK].peak or 0) / 1e6:.0f}':>24}"


def _true(found: Bench) -> Iterator[str]:
    for case in (c for c in found.cases if c.widths == "true"):
        yield f"decode through one layer of GLM-5.2's own widths behind {label(case.context)}: ms a token"
        for name, timed in case.sides.items():
            yield f"  {name:<32} {timed.median * 1e3:>8.2f}  (spread {timed.spread:.0%})"
        yield ""


def _parts(found: Bench) -> Iterator[str]:
    yield f"{'part':<14} {'':<8} {'context':>8} {'ms a token':>11} {'GFLOP':>8} {'MB':>8} {'floor, ms':>10} {'distance':>9}"
    for p in found.parts:
        chunk = found.chunk if p.kind == "prefill" else 1
        floor = f"{p.floor / chunk * 1e3:>10.3f} {p.distance:>9.2f}" if p.floor else ""
        yield (
            f"{p.part:<14} {p.kind:<8} {label(p.context) if p.context else 'any':>8} {p.seconds / chunk * 1e3:>11.3f} "
            f"{p.count.operations / chunk / 1e9:>8.4f} {p.count.bytes / chunk / 1e6:>8.3f} {floor}".rstrip()
        )
    yield ""


def markdown(found: Bench) -> str:
    """Markdown, from the kept record of a run."""
    lines = [
        "| context | | mlx-lm | HF on torch | ours | ours, IndexShare | times mlx-lm | peak MB, ours / mlx-lm |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in found.cases:
        if case.widths != "eighth" or case.batch > 1:
            continue
        hf = f"{case.rate(Hf.name):,.0f}" if Hf.name in case.sides else "-"
        peaks = _peaks(case).strip()
        lines.append(
            f"| {label(case.context)} | {case.kind} | {case.rate(STOCK):,.0f} | {hf} | {case.rate(OURS):,.0f} | "
            f"{case.rate_with_sharing:,.0f} | {case.speedup:.2f} / {case.speedup_with_sharing:.2f} | {peaks} |"
        )
    v = found.versions
    lines += ["", f"One layer's attention with its indexer, chunks of {found.chunk} tokens; {found.processor}, {v['machine']}, mlx "
              f"{v['mlx']} on the {found.device.upper()}, mlx-lm {v['mlx-lm']}, torch {v['torch']}, transformers "
              f"{v['transformers']}; {found.date}."]  # fmt: skip
    return "\n".join(lines)
