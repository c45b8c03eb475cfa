"""The cache of a layer: growing, rewinding, copying and saving act on every part together."""

import copy

import mlx.core as mx
import pytest

from glm_dsa.cache import STEP, LayerCache, causal_mask


def filled(tokens, has_indexer=True, dtype=mx.float32):
    cache = LayerCache(has_indexer)
    rows = mx.arange(tokens, dtype=mx.float32)[None, :, None]
    cache.append((mx.zeros((1, tokens, 8)) + rows).astype(dtype), (mx.zeros((1, tokens, 4)) + rows).astype(dtype))
    if has_indexer:
        cache.append_index_keys((mx.zeros((1, tokens, 6)) + rows).astype(dtype))
    return cache


def contents(cache):
    parts = [cache.latent[:, : cache.length], cache.k_rope[:, : cache.length]]
    return parts + ([cache.index_keys[:, : cache.index_length]] if cache.has_indexer else [])


@pytest.mark.parametrize("tokens", [1, STEP - 1, STEP, STEP + 1, 3 * STEP + 7])
def test_growing_keeps_what_was_there(tokens):
    cache = filled(tokens)
    latent, _ = cache.append(mx.full((1, 3, 8), -1.0), mx.full((1, 3, 4), -1.0))
    keys = cache.append_index_keys(mx.full((1, 3, 6), -1.0))
    assert latent.shape[1] == keys.shape[1] == tokens + 3
    assert latent[0, :, 0].tolist() == keys[0, :, 0].tolist() == [*range(tokens), -1, -1, -1]


def test_trim_acts_on_every_part():
    cache = filled(40)
    assert cache.trim(15) == 15
    assert [p.shape[1] for p in contents(cache)] == [25, 25, 25]
    assert cache.trim(100) == 25  # what there is, as mlx-lm expects
    assert cache.size() == cache.index_length == 0
    assert cache.is_trimmable()


def test_shared_layers_have_no_indexer_keys():
    cache = filled(5, has_indexer=False)
    with pytest.raises(ValueError, match="a shared layer reuses a selection"):
        cache.append_index_keys(mx.zeros((1, 1, 6)))


def test_state_carries_everything():
    """mlx-lm rebuilds a cache through __new__ and the state alone."""
    cache = filled(30)
    cache.start = 100
    again = LayerCache.from_state(cache.state)
    assert again.offset == cache.offset == 130
    assert all(mx.array_equal(a, b) for a, b in zip(contents(again), contents(cache), strict=True))
    again.append(mx.zeros((1, 1, 8)), mx.zeros((1, 1, 4)))
    assert cache.length == 30


def test_state_carries_the_padding():
    cache = LayerCache(False, left_padding=[0, 2])
    cache.append(mx.zeros((2, 5, 8)), mx.zeros((2, 5, 4)))
    again = LayerCache.from_state(cache.state)
    assert again.offset.tolist() == [5, 3]
    assert mx.array_equal(again.make_mask(2), cache.make_mask(2))


def test_copies_are_independent():
    cache = filled(10)
    twin = copy.deepcopy(cache)
    twin.append(mx.full((1, 1, 8), 9.0), mx.full((1, 1, 4), 9.0))
    cache.append(mx.full((1, 1, 8), 5.0), mx.full((1, 1, 4), 5.0))
    assert twin.latent[0, 10, 0].item() == 9.0
    assert cache.latent[0, 10, 0].item() == 5.0


@pytest.mark.parametrize(("has_indexer", "width"), [(True, 18), (False, 12)])
@pytest.mark.parametrize(("dtype", "size"), [(mx.float32, 4), (mx.bfloat16, 2)])
def test_nbytes_tells_the_truth(has_indexer, width, dtype, size):
    """Latent 8, rotary key 4, and on full layers indexer keys 6, up to the growth step. No zeros beside the keys."""
    assert LayerCache(has_indexer).nbytes == 0
    assert filled(STEP + 1, has_indexer, dtype).nbytes == 2 * STEP * width * size


def test_positions_start_after_the_pads():
    cache = LayerCache(True, left_padding=[0, 3], start=10)
    assert cache.offset.tolist() == [10, 7]
    assert cache.make_mask(4)[1, 0].tolist() == [[False] * 4, [False] * 4, [False] * 4, [False] * 3 + [True]]


def test_masks():
    assert causal_mask(1, 7) is None
    assert causal_mask(2, 1)[0, 0].tolist() == [[True, True, False], [True, True, True]]
    assert causal_mask(1, 2, mx.array([0, 2]))[:, 0, 0].tolist() == [[True] * 3, [False, False, True]]
