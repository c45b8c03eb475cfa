"""Caches of a layer, filled with random vectors, and what is compared of them."""

import copy

import mlx.core as mx
import pytest

from glm_dsa.cache import LayerCache, Widths
from glm_dsa.store import KvQuantization

WIDTHS = Widths(64, 32, 6)
INT8 = KvQuantization(8, 32)


def vectors(tokens, width, batch=1, dtype=mx.float32, key=0):
    return mx.random.normal((batch, tokens, width), key=mx.random.key(key)).astype(dtype)


def fill(cache, tokens, dtype=mx.float32, key=0, batch=1):
    """Appends random vectors to every part; returns them."""
    joined = vectors(tokens, cache.widths.latent + cache.widths.rope, batch, dtype, key)
    keys = vectors(tokens, 6, batch, dtype, key + 1000)
    if cache.has_indexer:
        cache.append_index_keys(keys)
    cache.append(joined)
    return joined, keys


def filled(tokens, widths=WIDTHS, quantization=None, dtype=mx.float32, key=0):
    cache = LayerCache(widths, quantization)
    fill(cache, tokens, dtype, key)
    return cache


def contents(cache):
    return [cache.latents.read()] + (cache.index_keys.read() if cache.has_indexer else [])


def same(ours, theirs):
    return len(ours) == len(theirs) and all(
        a.dtype == b.dtype and mx.array_equal(a, b) for a, b in zip(ours, theirs, strict=True)
    )


def unchanged(cache):
    """A snapshot, to be compared after an error."""
    return copy.deepcopy(cache.state)


def is_as(cache, snapshot):
    for now, then in zip(cache.state, snapshot, strict=True):
        equal = mx.array_equal(now, then).item() if isinstance(now, mx.array) else now == then
        if not equal:
            return False
    return True


KINDS = {"plain": None, "int8": INT8, "int8 from token 20 on": KvQuantization(8, 32, 20), "int4": KvQuantization(4, 32)}
every_kind = pytest.mark.parametrize("quantization", KINDS.values(), ids=KINDS.keys())
