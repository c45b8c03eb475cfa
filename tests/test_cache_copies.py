"""Caches of a layer, copied, saved and loaded."""

import copy

import mlx.core as mx
import pytest

from glm_dsa.cache import LayerCache, Widths
from glm_dsa.errors import CacheError
from glm_dsa.store import KvQuantization
from tests.caches import WIDTHS, contents, every_kind, fill, filled, is_as, same, unchanged, vectors


@every_kind
def test_state_carries_everything(quantization):
    """mlx-lm rebuilds a cache through __new__ and the state alone."""
    cache = filled(30, quantization=quantization)
    cache.start, cache.model = 100, "a model"
    again = LayerCache.from_state(cache.state)
    assert (again.offset, again.model, again.widths) == (cache.offset, "a model", WIDTHS) == (130, "a model", WIDTHS)
    assert again.quantization == quantization
    assert same(contents(again), contents(cache))
    for one in (cache, again):
        fill(one, 7, key=4)
    assert same(contents(again), contents(cache))


@every_kind
def test_one_state_makes_independent_caches(quantization):
    """Buffers are written in place: what was handed over as a state must not be."""
    cache = filled(30, quantization=quantization)
    state = cache.state
    one, two = LayerCache.from_state(state), LayerCache.from_state(state)
    due = contents(filled(30, quantization=quantization))
    one.trim(10)
    fill(one, 5, key=4)
    assert same(contents(two), due)
    assert same(contents(LayerCache.from_state(state)), due)
    assert same(contents(cache), due)


def test_state_carries_the_padding():
    cache = LayerCache(Widths(64, 32), left_padding=[0, 2])
    cache.append(mx.zeros((2, 5, 96)))
    again = LayerCache.from_state(cache.state)
    assert again.offset.tolist() == [5, 3]
    assert mx.array_equal(again.make_mask(2), cache.make_mask(2))


def test_state_carries_what_is_pending():
    cache = LayerCache(WIDTHS)
    cache.prepare(right_padding=[0, 2])
    fill(cache, 5, batch=2)
    again = LayerCache.from_state(cache.state)
    for one in (cache, again):
        one.finalize()
    assert again.offset.tolist() == [5, 3]
    assert same(contents(again), contents(cache))


def test_what_was_trimmed_is_not_saved():
    cache = filled(30)
    cache.trim(10)
    assert [part.shape[1] for part in cache.state if isinstance(part, mx.array)] == [20, 20]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: (), "another version"),
        (lambda s: ("glm-dsa cache 0", *s[1:]), "saved as 'glm-dsa cache 0', expected 'glm-dsa cache 1'"),
        (lambda s: (mx.zeros(3), mx.zeros(3)), "something else"),
        (lambda s: (mx.zeros(3), "a text"), "something else"),
        (lambda s: ("glm-dsa cache 0",), "saved as 'glm-dsa cache 0'"),
        (lambda s: s[:-1], "damaged"),
        (lambda s: (*s[:2], None, *s[3:]), "damaged"),
        (lambda s: (*s[:3], [8, 7, 0], *s[4:]), "damaged"),
        (lambda s: (*s[:7], s[7][..., :5], *s[8:]), "damaged"),
        (lambda s: (*s[:11], s[11][:, :7]), "damaged"),
        (lambda s: (*s[:7], None, *s[8:]), "damaged"),
        (lambda s: (*s[:4], [-4], *s[5:]), "damaged"),
        (lambda s: (*s[:5], [0, 0, 0], *s[6:]), "damaged"),
        (lambda s: (*s[:3], [8, 32, 20], *s[4:]), "damaged"),
        (lambda s: (s[0], 3, *s[2:]), "model 3"),
        (lambda s: (*s[:6], 1.5, *s[7:]), r"numbers \[1.5, 64"),
        (lambda s: (*s[:6], True, *s[7:]), r"numbers \[True, 64"),
        (lambda s: (*s[:6], -1, *s[7:]), r"numbers \[-1, 64"),
        (lambda s: (*s[:6], 1 << 31, *s[7:]), r"numbers \[2147483648, 64"),
        (lambda s: (*s[:5], [1, 2], *s[6:]), "padding .1, 2. of 1 rows"),
        (lambda s: (*s[:4], [0, 0], *s[5:]), "expected tensors of"),
        (
            lambda s: (*s[:8], mx.zeros((1, 30, 24), mx.uint32), *[mx.zeros((1, 30, 3))] * 2, s[11]),
            "expected tensors of",
        ),
        (lambda s: (*s[:7], s[7].astype(mx.int32), *s[8:]), "tensors of mlx.core.int32"),
        (lambda s: (*s[:11], s[11].astype(mx.int32)), "tensors of .*int32"),
        (lambda s: (*s[:2], [64, 32, 0], *s[3:]), "expected tensors of"),
    ],
)
def test_a_state_of_another_version_or_damaged(damage, message):
    cache, other = filled(30), filled(4, key=8)
    before = unchanged(other)
    with pytest.raises(CacheError, match=message):
        LayerCache.from_state(damage(cache.state))
    with pytest.raises(CacheError, match=message):
        other.state = damage(cache.state)
    assert is_as(other, before)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: (*s[:7], s[7][:, :19], *s[8:]), "expected tensors of"),  # plain: 20 tokens are
        (lambda s: (*s[:8], *(part[:, :9] for part in s[8:11]), s[11]), "expected tensors of"),  # packed: 10
        (lambda s: (*s[:8], s[8].astype(mx.int32), *s[9:]), "tensors of .*int32"),
        (lambda s: (*s[:9], s[9].astype(mx.float16), *s[10:]), "tensors of .*float16"),
        (lambda s: (*s[:10], s[10].astype(mx.float16), *s[11:]), "tensors of .*float16"),
        (lambda s: (*s[:10], s[10][..., :2], *s[11:]), "expected tensors of"),
        (lambda s: (*s[:8], s[8][..., :2], *s[9:]), "expected tensors of"),
    ],
)
def test_a_packed_state_that_is_damaged(damage, message):
    state = filled(30, quantization=KvQuantization(8, 32, 20)).state
    assert LayerCache.from_state(state).offset == 30
    with pytest.raises(CacheError, match=message):
        LayerCache.from_state(damage(state))


@every_kind
def test_copies_are_independent(quantization):
    cache = filled(10, quantization=quantization)
    twin = copy.deepcopy(cache)
    for key, one in ((1, twin), (2, cache)):
        joined, keys = fill(one, 12, key=key)
        fresh = LayerCache(WIDTHS, quantization)
        fresh.append_index_keys(mx.concatenate([vectors(10, 6, key=1000), keys], axis=1))
        fresh.append(mx.concatenate([vectors(10, 96), joined], axis=1))
        assert same(contents(one), contents(fresh))
