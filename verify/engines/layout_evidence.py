"""Which RoPE layout a checkpoint's indexers were trained under, asked of its first layers' weights, in bounded time and memory.

`reference.layout` measures; here is what it measures on: texts in pieces of a length that is bounded, and what is then said.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from glm_dsa import ModelArgs
from glm_dsa.config import INTERLEAVED
from glm_dsa.errors import printable
from reference import layout
from reference.stored import InFloat32, read_tensors

from .. import FOLDER
from .conventions import conventions_of
from .tokenizer import tokenizer_of

Array = np.ndarray
TEXTS = FOLDER / "texts.json"
LAYERS, PIECES = 3, 6
TIMES, FEWEST = 4, 64  # a text's tokens: so many times index_topk; but no fewer
SCORES = 1 << 30  # bytes of T x T arrays, of which three a head are alive at once
RESOLVED = ("rms_norm_eps", "routed_scaling_factor", "norm_topk_prob", "n_group", "topk_group", "attention_bias")
SMALL = "thresholds set on small trained models"


def length_of(args: ModelArgs) -> int:
    """Tokens of a text: four times index_topk, or what bounded memory holds (the choice is then an eighth of it)."""
    heads = max(args.num_attention_heads, args.index_n_heads)
    most = math.isqrt(SCORES // (3 * 4 * heads)) // 8 * 8
    return min(max(TIMES * args.index_topk, FEWEST), most)


def layers_of(args: ModelArgs) -> int:
    return min(LAYERS, args.num_hidden_layers)


@cache
def kept_texts() -> Mapping[str, str]:
    """{where it is from: English or code}. Raises ValueError."""
    found = json.loads(TEXTS.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise ValueError(f"{TEXTS}: not as this repository keeps it; check it out again")
    return found


def pieces(ids: Array, length: int, most: int = PIECES) -> Array:
    """Different stretches of one text, int [most or fewer, length]. Raises ValueError where there are too few."""
    count = min(most, len(ids) // length)
    starts = np.linspace(0, max(len(ids) - length, 0), count).astype(int)
    found = np.unique([ids[s : s + length] for s in starts], axis=0)  # [texts, length]
    if len(found) < layout.TEXTS:
        raise ValueError(
            f"too short a text: {len(ids)} tokens hold {len(found)} different pieces of {length}, expected {layout.TEXTS} or more"
        )
    return found


def texts_of(folder: Path, args: ModelArgs, file: Path | None = None) -> Array:
    """int [texts, T]: the user's text in pieces, or the kept ones, by the checkpoint's tokenizer. Raises ValueError, in a line."""
    tokenizer = tokenizer_of([folder])
    if tokenizer is None:
        raise ValueError(f"{printable(str(folder))}: no tokenizer.json, so no text can be read")
    length = length_of(args)
    if file is not None:
        try:
            found = pieces(np.array(tokenizer.encode(file.read_text(encoding="utf-8")).ids), length)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompt-file {printable(str(file))}: {error}") from None
    else:
        ids = [tokenizer.encode(text).ids[:length] for text in kept_texts().values()]
        long = [text for text in ids if len(text) == length]
        if len(long) < layout.TEXTS:
            raise ValueError(
                f"too short a text: {len(long)} of the kept ones have {length} tokens by tokenizer.json, expected {layout.TEXTS} "
                "or more; add --prompt-file FILE"
            )
        found = np.array(long)
    if found.max() >= args.vocab_size:
        raise ValueError(f"tokenizer.json: token {found.max()} is beyond the vocabulary of {args.vocab_size}")
    return found


def measure(folder: Path, config: Mapping[str, Any], args: ModelArgs, texts: Array) -> layout.Evidence:
    """Of the first layers, in float32. Raises ValueError, in a line, for what cannot be measured.

    config: as the checkpoint has it; args: what it means.
    """
    meant = {key: getattr(args, key) for key in RESOLVED}
    meant |= {"indexer_types": list(args.indexer_types), "mlp_layer_types": list(args.mlp_layer_types)}
    weights = InFloat32(read_tensors(folder))
    conventions = conventions_of(args)
    mass = layout.captured_mass({**config, **meant}, weights, texts, conventions, layers_of(args), embed=weights.embed)
    return layout.evidence(mass)


def figures(evidence: layout.Evidence, texts: Array) -> str:
    """What was measured, on what."""
    masses = ", ".join(f"{name} catches {evidence.mass[name]}" for name in layout.LAYOUTS)
    count, length = texts.shape
    layers = len(evidence.by_layer)
    where = "layer 0" if layers == 1 else f"layers 0-{layers - 1}"
    return (
        f"of the attention, {masses}, random keys {evidence.chance:.3f} ({count} texts of {length} tokens, choices of an "
        f"eighth, {where}; {SMALL})"
    )


def key_of(args: ModelArgs) -> str:
    """The key of config.json that decides: the builder's own, or zai-org's; without either, the one to add."""
    source = next(c.source for c in args.conventions if c.name == "indexer_rope")
    return source.removeprefix("key ") if source.startswith("key ") else "indexer_rope_interleave"


def judgement(evidence: layout.Evidence, args: ModelArgs, texts: Array) -> tuple[bool, str]:
    """(whether config.json agrees with clear evidence, the line that says so)."""
    key, due = key_of(args), evidence.layout
    said = next(c.source for c in args.conventions if c.name == "indexer_rope")
    seen = figures(evidence, texts)
    if due == args.indexer_rope:
        return True, f"config.json ({said}) and the weights say {due}: {seen}"
    mended = json.dumps(due == INTERLEAVED)
    return False, f'config.json: {key}: expected {due}, got {args.indexer_rope} ({said}); set "{key}": {mended}. {seen}'
