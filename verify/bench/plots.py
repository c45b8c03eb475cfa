"""One SVG a figure: rates, peak memory, and parts beside their floors, over the length of the context."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..core.files import whole
from .contenders import Hf
from .suite import FREQ, OURS, STOCK, Bench, Case, label

SHARING = f"ours, IndexShare (1 of {FREQ} layers selects)"
LOOK = {STOCK: ("#b4532a", "s"), Hf.name: ("#8a8a8a", "^"), OURS: ("#1f5fa8", "o"), SHARING: ("#2e8b57", "D")}


def draw(found: Bench, folder: Path) -> list[Path]:
    """Raises ValueError where the library that draws is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("figures need matplotlib: pip install 'glm-dsa[bench]'") from None
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "glm-dsa", "font.size": 11, "axes.spines.top": False,
                                "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3})  # fmt: skip
    drawn = []
    for kind in ("prefill", "decode"):
        cases = [c for c in found.cases if (c.kind, c.batch, c.widths) == (kind, 1, "eighth")]
        if len(cases) < 2:
            continue
        drawn.append(_rates(found, kind, cases, folder))
        drawn.append(_peaks(kind, cases, folder))
        if any(p.kind == kind and p.floor for p in found.parts):
            drawn.append(_parts(found, kind, folder))
    return drawn


def _rates(found: Bench, kind: str, cases: list[Case], folder: Path) -> Path:
    series: dict[str, Callable[[Case], float | None]] = {
        STOCK: lambda c: c.rate(STOCK),
        Hf.name: lambda c: c.rate(Hf.name) if Hf.name in c.sides else None,
        OURS: lambda c: c.rate(OURS),
        SHARING: lambda c: c.rate_with_sharing,
    }
    chunks = f", chunks of {found.chunk}" if kind == "prefill" else ""
    return _lines(
        cases, series, f"{kind}: tokens a second through one layer's attention{chunks}", folder, f"{kind}-rate"
    )


def _peaks(kind: str, cases: list[Case], folder: Path) -> Path:
    series: dict[str, Callable[[Case], float | None]] = {
        STOCK: lambda c: (c.sides[STOCK].peak or 0) / 1e6,
        OURS: lambda c: (c.sides[OURS].peak or 0) / 1e6,
    }
    return _lines(cases, series, f"{kind}: peak memory above weights and cache, MB", folder, f"{kind}-memory")


def _lines(
    cases: list[Case], series: dict[str, Callable[[Case], float | None]], title: str, folder: Path, name: str
) -> Path:
    from matplotlib import ticker

    figure, axes = _figure(title)
    for side, value in series.items():
        points = [(c.context, v) for c in cases if (v := value(c)) is not None]
        if points:
            colour, mark = LOOK[side]
            axes.plot(*zip(*points, strict=True), label=side, color=colour, marker=mark, linewidth=1.8, markersize=5)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _contexts(axes, [c.context for c in cases])
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.legend(frameon=False)
    return _save(figure, folder / f"{name}.svg")


def _parts(found: Bench, kind: str, folder: Path) -> Path:
    """Stacked: what each part takes, beside its floor."""
    parts = [p for p in found.parts if p.kind == kind and p.floor]
    contexts, chunk = sorted({p.context for p in parts}), found.chunk if kind == "prefill" else 1
    figure, axes = _figure(f"{kind}: ms a token by part, beside the bare primitives (pale)")
    colours = {"indexer": "#1f5fa8", "attention": "#2e8b57", "projections": "#c9a227"}
    for offset, pale in ((-0.2, False), (0.2, True)):
        below = [0.0] * len(contexts)
        for name, colour in colours.items():
            heights = [
                sum((p.floor if pale else p.seconds) for p in parts if (p.context, p.part) == (c, name)) / chunk * 1e3
                for c in contexts
            ]
            at = [i + offset for i in range(len(contexts))]
            axes.bar(at, heights, 0.38, below, color=colour, alpha=0.45 if pale else 1.0, label=None if pale else name)
            below = [b + h for b, h in zip(below, heights, strict=True)]
    _contexts(axes, contexts, range(len(contexts)))
    axes.legend(frameon=False)
    return _save(figure, folder / f"{kind}-parts.svg")


def _figure(title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=12)
    axes.set_xlabel("tokens of context")
    return figure, axes


def _contexts(axes: Any, contexts: list[int], at: Any = None) -> None:
    axes.set_xticks(list(contexts if at is None else at), [label(c) for c in contexts])
    axes.minorticks_off()


def _save(figure: Any, file: Path) -> Path:
    with whole(file) as part:
        figure.savefig(part, format="svg", metadata={"Date": None})
    return file
