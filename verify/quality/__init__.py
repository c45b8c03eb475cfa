"""`python -m verify quality CANDIDATE --against BASE`: how far a model's predictions of a text are from another's.

windows    the text, its cut into windows
runs       logits of a side on them, in bounded memory
metrics    KL, agreement, perplexity, bits per byte
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ..core.report import versions
from ..drift.checks import on_device
from ..drift.prompts import words_of
from ..engines.spec import Side, sides_of
from .metrics import Gathered, Quality
from .runs import Run, run_of
from .windows import CONTEXT, STRIDE, chunks, is_plain, text_of

__all__ = ["CONTEXT", "STRIDE", "Quality", "measure"]

ROWS = 1 << 24  # values of logits at once, of each side


def measure(
    candidate: str,
    against: str,
    *,
    text: str | Path | None = None,
    token_ids: Sequence[int] | None = None,
    length: int | None = None,
    context: int = CONTEXT,
    stride: int = STRIDE,
    tell: Callable[[str], None] = lambda _: None,
) -> Quality:
    """candidate, against: as `drift` takes its sides. text: a file (the kept texts, for the kept checkpoints); length: its
    first tokens only. Raises ValueError (and what reading a checkpoint raises), in one line."""
    if not 2 <= context <= 1 << 20:
        raise ValueError(f"--context {context}: expected at least 2 tokens")
    if not 1 <= stride <= context or context % stride:
        raise ValueError(f"--stride {stride}: expected a divisor of --context {context}")
    sides = sides_of(candidate, against, candidate)
    widths = [side.args.vocab_size for side in sides]
    if widths[0] != widths[1]:
        raise ValueError(f"vocabularies of {widths[0]:,} and {widths[1]:,}: nothing can be compared")
    found = text_of(sides, None if text is None else Path(text), token_ids, length)
    windows = found.windows(context, stride)
    ids = [found.ids[w.begin : w.end] for w in windows]
    runs = []
    for side in sides:
        with on_device(side.device):
            runs.append(run_of(side, ids, lambda line, name=side.checkpoint: tell(f"{name}: {line}")))  # type: ignore[misc]
    gathered, size = Gathered(), max(1, ROWS // widths[0])
    for i, window in enumerate(windows):
        tell(f"figures of window {i + 1} of {len(windows)}")
        plain = is_plain(window, context, len(found.ids))
        for rows in chunks(slice(0, window.length - 1) if plain else window.fresh, size):
            mine, base = (_logits(run, side, i, rows) for run, side in zip(runs, sides, strict=True))
            at = np.arange(rows.start, rows.stop)
            gathered.add(base, mine, ids[i][at + 1], window.begin + at + 1, at >= window.fresh.start, plain)
    quality = Quality.of(
        gathered, candidate=sides[0].runs, base=sides[1].runs, source=found.source, tokens=len(found.ids),
        context=min(context, len(found.ids)), stride=stride, windows=len(windows),
        nbytes=found.nbytes_of(np.concatenate(gathered.places)),
        versions="  ".join(f"{k} {v}" for k, v in versions().items()),
    )  # fmt: skip
    quality.worst_token = repr(words_of([s.folder for s in sides])(found.ids[quality.worst[0]]))
    return quality


def _logits(run: Run, side: Side, window: int, rows: slice) -> np.ndarray:
    with on_device(side.device):
        logits = run.logits(window, rows)
    width = side.args.vocab_size
    if logits.shape[-1] != width:
        raise ValueError(f"{side.text}: logits of {logits.shape[-1]:,} tokens, where the vocabulary has {width:,}")
    if not np.isfinite(logits).all():
        raise ValueError(f"{side.text}: logits are NaN or infinite; python -m verify drift says from where on")
    return logits
