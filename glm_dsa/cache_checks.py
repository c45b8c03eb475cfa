"""Which caches a model cannot go on from: of another model or batch, cut short, or not in step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .cache import LayerCache, Widths
from .errors import CacheError


def check_caches(caches: Sequence[Any], due: Sequence[Widths], model: str, rows: int) -> None:
    """Raises `CacheError` where a model's layers, of these widths, could not go on from these caches with `rows` rows."""
    if len(caches) != len(due):
        raise CacheError(f"{len(caches)} caches for {len(due)} layers: this is another model's cache; use make_cache()")
    for layer, (cache, widths) in enumerate(zip(caches, due, strict=True)):
        if not isinstance(cache, LayerCache):
            raise CacheError(
                f"layer {layer}: the cache is a {type(cache).__name__}, made by another definition; make it anew"
            )
        if cache.widths != widths:
            raise CacheError(
                f"layer {layer}: expected a cache of {widths}, got {cache.widths}: it is another model's; make it anew"
            )
        if cache.model and cache.model != model:
            raise CacheError(
                f"layer {layer}: the cache was made by model {cache.model}, this is {model} (weights or conventions "
                "differ); make it anew"
            )
        if cache.batch not in (None, rows):
            raise CacheError(f"layer {layer}: a cache of {cache.batch} rows, for a batch of {rows}")
    if any((c.start, c.left_padding) != (caches[0].start, caches[0].left_padding) for c in caches):
        raise CacheError("the layers' caches differ in padding or first position; make them anew")
    lengths = {c.length for c in caches} | {c.index_keys.length for c in caches if c.has_indexer}
    if len(lengths) > 1:
        raise CacheError(
            f"the layers' caches hold between {min(lengths)} and {max(lengths)} tokens: an earlier run was cut short, "
            "or they were not trimmed together. Start anew"
        )


def check_in_step(cache: LayerCache, main: LayerCache, tokens: int, rows: int) -> None:
    """Raises `CacheError` where the MTP layer's cache, `tokens` later, would not stand where the main model's does."""
    if main.batch not in (None, rows):
        raise CacheError(f"the main model's cache has {main.batch} rows, for a batch of {rows}")
    own, due = ([c.start + c.length - pads for pads in c.left_padding or [0] * rows] for c in (cache, main))
    row = next((i for i in range(rows) if own[i] + tokens != due[i]), None)
    if row is not None:
        where = f" (row {row})" if rows > 1 else ""
        raise CacheError(
            f"the MTP cache holds {own[row]} tokens, and the main model's {due[row]}{where}: expected "
            f"{due[row] - tokens} before the {tokens} handed in; hand in the hiddens of every token that it has not seen, or "
            "restore it beside the main one"
        )
