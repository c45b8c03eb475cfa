"""Where two models drift apart, and why: `python -m verify drift`, and the same from Python.

from verify import drift

found = drift.compare("./release", against="./original", prompt_file="prompt.txt")
print(found.summary())
found.write(Path("report"))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from reference.kept import TRAINED

from ..engines.recording import Recording
from ..engines.spec import Side, sides_of
from .checks import Wanted
from .prompts import prompt_of
from .result import Drift
from .session import Session

__all__ = ["Drift", "Recording", "Side", "compare", "sides_of"]


def compare(
    candidate: str | Side,
    against: str | Side | None = None,
    *,
    prompt_file: str | Path | None = None,
    text: str | None = None,
    tokens: Sequence[int] | None = None,
    length: int | None = None,
    seed: int = 0,
    layers: Iterable[int] | None = None,
    stages: str | None = None,
    thorough: bool = False,
    repair: bool = True,
    suggest_bits: float | None = None,
    without: Sequence[str] = (),
    keep: Callable[[dict[str, Recording]], None] | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Drift:
    """Runs both sides on one prompt and says where they part, and why.

    candidate, against: as on the command line ("./release", "hf@./release", "mlx_lm.models.glm_moe_dsa@./release",
    "./release,kv_bits=8"), or `Side`s; without `against`, HF on the candidate's own weights. The prompt: a file, a text, or
    token ids; `length` of its tokens. layers, stages: what is reported. repair: whether to look for what repairs the logits.
    without: faults of the catalogue that are not suspected. keep: is handed the recordings of all runs, by name, while they
    are there. Raises ValueError, GlmDsaError or Failed, in one line.
    """
    if isinstance(candidate, Side) and (isinstance(against, Side)):
        sides = candidate, against
    elif isinstance(candidate, str) and (against is None or isinstance(against, str)):
        sides = sides_of(candidate, against, str(TRAINED / "interleaved"))
    else:
        raise ValueError("candidate and against: two texts, or two Sides")
    chosen = None if layers is None else _numbers(layers)
    if stages is not None and not isinstance(stages, str):
        raise ValueError(f"stages {stages!r}: expected a pattern, 'self_attn.indexer.*' say")
    if suggest_bits is not None and not isinstance(suggest_bits, (int, float)):
        raise ValueError(f"suggest_bits {suggest_bits!r}: expected a number")
    file = None if prompt_file is None else Path(prompt_file)
    prompt = prompt_of(sides, file, text, tokens, length, seed)
    wanted = Wanted(chosen, stages)
    return Session(*sides, prompt, wanted, thorough, repair, suggest_bits, without, tell, keep).run()


def _numbers(layers: object) -> frozenset[int]:
    """Raises ValueError."""
    found: list[Any] = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else [layers]
    if not found or not all(type(n) is int for n in found):
        raise ValueError(f"layers {layers!r}: expected their numbers, [3, 7] say")
    return frozenset(found)
