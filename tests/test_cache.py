"""The cache of a layer: growing, rewinding, copying, saving, batching and quantizing act on every part together."""

import copy

import mlx.core as mx
import numpy as np
import pytest

from glm_dsa.cache import LayerCache, Widths, cache_bytes
from glm_dsa.cache_checks import check_caches
from glm_dsa.errors import CacheError
from glm_dsa.mask import CausalMask
from glm_dsa.store import STEP, Columns, KvQuantization

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


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def quantization(request):
    return request.param


@pytest.mark.parametrize("tokens", [1, STEP - 1, STEP, STEP + 1, 3 * STEP + 7])
def test_growing_keeps_what_was_there(quantization, tokens):
    cache = filled(tokens, quantization=quantization)
    before = contents(cache)
    fill(cache, 3, key=5)
    after = contents(cache)
    assert [part.shape[1] for part in after] == [tokens + 3] * 2
    assert same([part[:, :tokens] for part in after], before)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_packed_is_what_mx_quantize_packs(bits, dtype):
    cache = LayerCache(WIDTHS, KvQuantization(bits, 32))
    joined = mx.concatenate([fill(cache, n, dtype, key=n)[0] for n in (5, 1, 30)], axis=1)
    assert same(cache.latents.packed.read(), mx.quantize(joined, group_size=32, bits=bits))


@pytest.mark.parametrize("start", [0, 1, 20, 35, 36, 100])
def test_tokens_are_packed_from_the_start_asked_for(start):
    cuts = [(36,), (1,) * 36, (19, 2, 15), (20, 16)]
    caches = []
    for cut in cuts:
        cache, at = LayerCache(WIDTHS, KvQuantization(8, 32, start)), 0
        joined, keys = vectors(36, 96), vectors(36, 6, key=1)
        for n in cut:
            cache.append_index_keys(keys[:, at : at + n])
            cache.append(joined[:, at : at + n])
            at += n
        caches.append(cache)
    first = min(start, 36)
    for cache in caches:
        assert (cache.latents.plain.length, cache.latents.packed.length) == (first, 36 - first)
        read = cache.latents.read()
        assert mx.array_equal(read[:, :first], joined[:, :first])
        if first < 36:
            assert mx.array_equal(read[:, first:], INT8.rounded(joined[:, first:]))
        assert mx.array_equal(cache.index_keys.read()[0], keys)


def test_what_is_taken_is_what_would_be_read(quantization):
    """Unpacking what was selected equals unpacking everything, then selecting, exactly; in a batch too."""
    one, two = filled(40, quantization=quantization), filled(23, quantization=quantization, key=7)
    for cache in (one, LayerCache.merge([one, two])):
        rows, length = cache.batch, cache.length
        selection = mx.random.randint(0, length, (rows, 5, 9), key=mx.random.key(3)).astype(mx.uint32)
        every = cache.latents.read()
        picked = mx.take_along_axis(every[:, None], selection[..., None], axis=2)
        assert mx.array_equal(cache.latents.take(selection), picked)


def test_trim_acts_on_every_part(quantization):
    cache = filled(40, quantization=quantization)
    kept = [part[:, :15] for part in contents(cache)]
    assert cache.is_trimmable()
    assert cache.trim(25) == 25
    assert same(contents(cache), kept)
    joined, keys = fill(cache, 25, key=9)
    again = LayerCache(WIDTHS, quantization)
    again.append_index_keys(mx.concatenate([vectors(40, 6, key=1000)[:, :15], keys], axis=1))
    again.append(mx.concatenate([vectors(40, 96)[:, :15], joined], axis=1))
    assert same(contents(cache), contents(again))


@pytest.mark.parametrize("tokens", [-1, 41, 1000])
def test_more_than_there_is_cannot_be_trimmed(tokens):
    cache = filled(40)
    before = unchanged(cache)
    with pytest.raises(CacheError, match=r"holds 40 tokens"):
        cache.trim(tokens)
    assert is_as(cache, before)


def test_a_batch_is_trimmed_no_further_than_its_shortest_row():
    batch = LayerCache.merge([filled(30), filled(8, key=3)])
    with pytest.raises(CacheError, match=r"trim\(9\): this cache holds 8 tokens in its shortest row"):
        batch.trim(9)
    assert batch.trim(8) == 8


def test_shared_layers_have_no_indexer_keys():
    cache = LayerCache(Widths(64, 32))
    with pytest.raises(CacheError, match="a shared layer reuses a selection"):
        cache.append_index_keys(mx.zeros((1, 1, 6)))


# -- quantizing what is there


@pytest.mark.parametrize("start", [0, 20])
def test_quantizing_later_packs_what_is_there(start):
    """In place: mlx-lm keeps lists of its own beside that in which it puts what this returns."""
    cache = filled(30)
    assert cache.to_quantized(group_size=32, bits=8, start=start) is cache
    native = filled(30, quantization=KvQuantization(8, 32, start))
    assert same(contents(cache), contents(native))
    fill(cache, 4, key=2)
    fill(native, 4, key=2)
    assert same(cache.latents.packed.read(), native.latents.packed.read())


def test_quantizing_a_padded_batch_rounds_each_row_from_its_own_start():
    rows = [filled(30), filled(22, key=3)]
    batch = LayerCache.merge(rows).to_quantized(32, 8, start=20)
    for i, row in enumerate(rows):
        assert same(batch.extract(i).latents.packed.read(), row.to_quantized(32, 8, start=20).latents.packed.read())
        assert same(contents(batch.extract(i)), contents(row))


def test_quantizing_twice_changes_nothing():
    """mlx-lm asks after every step."""
    cache = filled(30).to_quantized(group_size=32, bits=8)
    assert cache.to_quantized(group_size=32, bits=8) is cache
    native = filled(30, quantization=KvQuantization(8, 32, 20))
    assert native.to_quantized(group_size=32, bits=8) is native


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, 64)])
def test_quantizing_otherwise_than_it_is_packed(bits, group_size):
    """mlx-lm checks this for its own class only."""
    cache = LayerCache(Widths(128, 64), KvQuantization(8, 32))
    fill(cache, 5)
    before = unchanged(cache)
    with pytest.raises(CacheError, match="packed already, 8 bit in groups of 32; ask for the same"):
        cache.to_quantized(group_size=group_size, bits=bits)
    assert is_as(cache, before)


@pytest.mark.parametrize(
    ("widths", "bits", "group_size", "message"),
    [
        (
            WIDTHS,
            8,
            64,
            r"groups of 64 do not divide this model's rotary key \(qk_rope_head_dim\) of 32; groups of 32 do",
        ),
        (Widths(96, 64), 8, 64, r"latent \(kv_lora_rank\) of 96; groups of 32 do"),
        (Widths(48, 16), 8, 32, "no groups that MLX packs do: keep this cache unquantized"),
        (WIDTHS, 7, 32, "bits 7; expected one of 2, 3, 4, 5, 6, 8"),
        (WIDTHS, 0, 32, "bits 0"),
        (WIDTHS, True, 32, "bits True"),
        (WIDTHS, 8.0, 32, "bits 8.0"),
        (WIDTHS, 8, 48, "group size 48; expected one of 32, 64, 128"),
        (WIDTHS, 8, 0, "group size 0"),
    ],
)
def test_bits_and_groups_that_do_not_fit(widths, bits, group_size, message):
    cache = LayerCache(widths)
    fill(cache, 5)
    before = unchanged(cache)
    with pytest.raises(CacheError, match=message):
        cache.to_quantized(group_size=group_size, bits=bits)
    assert is_as(cache, before)
    with pytest.raises(CacheError, match=message):
        LayerCache(widths, KvQuantization(bits, group_size))


@pytest.mark.parametrize("start", [-1, 1.5, None, True])
def test_a_start_that_is_no_token(start):
    with pytest.raises(CacheError, match="start"):
        LayerCache(WIDTHS, KvQuantization(8, 32, start))


@pytest.mark.parametrize("options", [{"start": -1}, {"left_padding": []}, {"left_padding": [2, -1]}], ids=str)
def test_beginnings_that_are_none(options):
    with pytest.raises(CacheError, match="neither can be negative or empty"):
        LayerCache(WIDTHS, **options)


def test_beginnings():
    assert LayerCache(WIDTHS, start=0, left_padding=[0, 3]).offset.tolist() == [0, -3]
    assert LayerCache(WIDTHS, start=9).offset == 9
    assert LayerCache(Widths(64, 32, 1)).has_indexer


# -- copies and files


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
        (lambda s: (*s[:8], mx.zeros((1, 30, 24), mx.uint32), *[mx.zeros((1, 30, 3))] * 2, s[11]), "expected tensors of"),
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


def test_copies_are_independent(quantization):
    cache = filled(10, quantization=quantization)
    twin = copy.deepcopy(cache)
    for key, one in ((1, twin), (2, cache)):
        joined, keys = fill(one, 12, key=key)
        fresh = LayerCache(WIDTHS, quantization)
        fresh.append_index_keys(mx.concatenate([vectors(10, 6, key=1000), keys], axis=1))
        fresh.append(mx.concatenate([vectors(10, 96), joined], axis=1))
        assert same(contents(one), contents(fresh))


# -- batches


def test_a_batch_holds_what_its_rows_held(quantization):
    rows = [filled(n, quantization=quantization, key=n) for n in (30, 1, 18, 300)]
    batch = LayerCache.merge(rows)
    assert batch.left_padding == [270, 299, 282, 0]
    assert batch.offset.tolist() == [30, 1, 18, 300]
    for i, row in enumerate(rows):
        single = batch.extract(i)
        assert same(contents(single), contents(row))
        assert same(single.latents.packed.read(), row.latents.packed.read())  # not a bit of what is packed
        assert single.left_padding is None


def test_rows_of_a_batch_go_on_as_they_would_alone(quantization):
    """Also where the quantization's start lies at different columns, and is passed at different steps."""
    rows = [filled(n, quantization=quantization, key=n) for n in (18, 3, 26)]
    batch = LayerCache.merge(rows)
    for step in range(20):
        joined, keys = fill(batch, 1, key=100 + step, batch=3)
        for i, row in enumerate(rows):
            row.append_index_keys(keys[i : i + 1])
            row.append(joined[i : i + 1])
    for i, row in enumerate(rows):
        assert same(contents(batch.extract(i)), contents(row))


def test_extending_filtering_and_extracting(quantization):
    rows = {n: filled(n, quantization=quantization, key=n) for n in (30, 4, 18, 25)}
    batch = LayerCache.merge([rows[4], rows[18]])
    batch.extend(LayerCache.merge([rows[30], rows[25]]))
    batch.filter([3, 0])
    assert batch.left_padding == [0, 21]
    batch.extend(rows[30])
    assert batch.left_padding == [5, 26, 0]
    batch.filter(mx.array([1, 0]))
    for i, n in enumerate((4, 25)):
        assert same(contents(batch.extract(i)), contents(rows[n]))


def test_empty_caches_join_a_batch(quantization):
    empty = LayerCache.merge([LayerCache(WIDTHS, quantization) for _ in range(2)])
    assert (empty.batch, empty.length, empty.offset.tolist()) == (2, 0, [0, 0])
    empty.extend(filled(24, quantization=quantization))
    assert empty.offset.tolist() == [0, 0, 24]
    joined, _ = fill(empty, 25, batch=3, key=5)
    alone = LayerCache(WIDTHS, quantization)
    alone.append(joined[1:2])
    assert mx.array_equal(empty.extract(1).latents.read(), alone.latents.read())


ANNOUNCED = {  # what must leave announced padding as it was announced
    "filter": lambda cache: cache.filter([0, 1]),
    "trim": lambda cache: cache.trim(0),
    "extend": lambda cache: (cache.extend(copy.deepcopy(cache)), cache.filter([2, 1])),
    "state": lambda cache: setattr(cache, "state", cache.state),
    "merge": lambda cache: vars(cache).update(vars(LayerCache.merge([cache]))),
    "nothing right": lambda cache: (cache.prepare(right_padding=[0, 0]), cache.finalize()),
}


@pytest.mark.parametrize("came", [0, 1, 4])
@pytest.mark.parametrize("how", ANNOUNCED)
def test_announced_padding_survives_whatever_is_done_before_it_has_come(how, came, quantization):
    """[5, 3] pads: none, some or all of one row's have come. Afterwards each row holds its own tokens, at its own positions."""
    whole, cache = (LayerCache(WIDTHS, quantization, left_padding=[5, 3]) for _ in range(2))
    values = mx.random.normal((2, 40, WIDTHS.latent + WIDTHS.rope), key=mx.random.key(3))
    keys = mx.random.normal((2, 40, WIDTHS.index), key=mx.random.key(4))
    for batch, cuts in ((whole, [(0, 40)]), (cache, [(0, came), (came, 40)])):
        for begin, end in cuts:
            if begin < end:
                batch.append_index_keys(keys[:, begin:end])
                batch.append(values[:, begin:end])
            if end == came:
                before = batch.offset.tolist()
                ANNOUNCED[how](batch)
                assert batch.offset.tolist() == before
    for row, tokens in ((0, 35), (1, 37)):
        assert cache.extract(row).length == tokens
        assert same(contents(cache.extract(row)), contents(whole.extract(row)))


def test_a_row_taken_out_before_its_pads_came_expects_none(quantization):
    cache = LayerCache(WIDTHS, quantization)
    cache.prepare(left_padding=[5, 3])
    alone = cache.extract(0)
    assert (alone.offset, alone.batch, alone.left_padding) == (0, None, None)
    assert cache.offset.tolist() == [-5, -3]  # the batch still waits
    expected = LayerCache(WIDTHS, quantization)
    for one in (alone, expected):
        fill(one, 40, key=6)
    assert same(contents(alone), contents(expected))


def test_announced_padding_is_no_token_to_forget():
    cache = LayerCache(WIDTHS, left_padding=[5, 3])
    with pytest.raises(CacheError, match="holds 0 tokens in its shortest row"):
        cache.trim(1)


def test_right_padding_of_tokens_that_never_came_is_refused():
    cache = LayerCache(WIDTHS)
    cache.prepare(right_padding=[0, 2])
    restored = LayerCache.from_state(cache.state)
    for one in (cache, restored):
        with pytest.raises(CacheError, match="holds 0 tokens"):
            one.finalize()
        fill(one, 4, batch=2)
        one.finalize()
        assert one.offset.tolist() == [4, 2]


def test_right_padding_is_moved_to_the_left(quantization):
    """mlx-lm pads prompts on the right, then asks for it to be rolled."""
    lengths = [30, 12, 21]
    batch = LayerCache.merge([LayerCache(WIDTHS, quantization) for _ in lengths])
    batch.prepare(lengths=lengths, right_padding=[30 - n for n in lengths])
    joined, keys = fill(batch, 30, batch=3)
    batch.finalize()
    assert batch.offset.tolist() == lengths
    for i, n in enumerate(lengths):
        alone = LayerCache(WIDTHS, quantization)
        alone.append_index_keys(keys[i : i + 1, :n])
        alone.append(joined[i : i + 1, :n])
        assert same(contents(batch.extract(i)), contents(alone))
    batch.finalize()  # nothing is pending any more
    assert batch.offset.tolist() == lengths


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: filled(5, quantization=INT8),
            "different quantization cannot be one batch: 8 bit in groups of 32, none",
        ),
        (lambda: filled(5, widths=Widths(96, 32, 6)), "different widths"),
        (lambda: filled(5, widths=Widths(64, 32)), "different widths"),
        (lambda: filled(5, dtype=mx.bfloat16), "different dtype"),
        (lambda: LayerCache(WIDTHS, model="another"), "different model"),
        (lambda: LayerCache(WIDTHS, start=7), "different first position"),
        (lambda: object(), "LayerCache and object"),
    ],
)
def test_caches_of_different_kinds_are_no_batch(other, message):
    cache = filled(5)
    before = unchanged(cache)
    with pytest.raises(CacheError, match=message):
        LayerCache.merge([cache, other()])
    with pytest.raises(CacheError, match=message):
        cache.extend(other())
    assert is_as(cache, before)


def test_rows_of_a_batch_that_was_never_padded(quantization):
    cache = LayerCache(WIDTHS, quantization)
    fill(cache, 30, batch=3)
    every = contents(cache)
    cache.filter([2, 0])
    assert cache.offset.tolist() == [30, 30]
    assert same(contents(cache), [part[mx.array([2, 0])] for part in every])


def test_a_row_that_is_not_packed_yet_beside_one_that_is():
    """From token 20 on: 22 tokens have two packed, 19 have none."""
    rows = [filled(tokens, quantization=KvQuantization(8, 32, 20), key=tokens) for tokens in (22, 19)]
    every = [contents(row) for row in rows]
    batch = LayerCache.merge(rows)
    for i, due in enumerate(every):
        single = batch.extract(i)
        assert single.offset == (22, 19)[i]
        assert same(contents(single), due)
    batch.filter([1])
    assert batch.offset.tolist() == [19]
    assert same(contents(batch), every[1])


def test_an_empty_cache_is_one_row():
    LayerCache(WIDTHS).filter([0])
    with pytest.raises(CacheError, match="of a batch of 1"):
        LayerCache(WIDTHS).filter([1])


@pytest.mark.parametrize("rows", [[], [2], [-1], [True, False]])
def test_rows_that_are_not_there(rows):
    batch = LayerCache.merge([filled(5), filled(3)])
    before = unchanged(batch)
    with pytest.raises(CacheError, match="of a batch of 2"):
        batch.filter(rows)
    assert is_as(batch, before)


def test_nothing_else_is_done_while_right_padding_is_pending():
    batch = LayerCache.merge([LayerCache(WIDTHS), LayerCache(WIDTHS)])
    batch.prepare(right_padding=[0, 2])
    fill(batch, 6, batch=2)
    for action in (
        lambda: batch.trim(1),
        lambda: batch.filter([0]),
        lambda: batch.extract(0),
        lambda: batch.extend(batch),
    ):
        with pytest.raises(CacheError, match="not yet finalized"):
            action()
    for action in (lambda: batch.prepare(right_padding=[1, 0]), lambda: batch.to_quantized(32, 8)):
        with pytest.raises(CacheError, match="not yet finalized"):
            action()
    batch.finalize()
    assert batch.offset.tolist() == [6, 4]
    with pytest.raises(CacheError, match="before the first token"):
        batch.prepare(left_padding=[1, 0])
    with pytest.raises(CacheError, match=r"padding \[\[1, 0, 0\]\]; this batch has 2 rows"):
        batch.prepare(right_padding=[1, 0, 0])
    for nothing in ({"lengths": [3, 3]}, {"right_padding": [0, 0]}):
        batch.prepare(**nothing)
        batch.trim(1)
    assert batch.offset.tolist() == [4, 2]


def test_a_cache_that_a_run_left_uneven_joins_no_batch():
    uneven = filled(5)
    uneven.append_index_keys(mx.zeros((1, 1, 6)))
    with pytest.raises(CacheError, match="5 latents beside 6 indexer keys"):
        LayerCache.merge([uneven, filled(4)])


def test_extracted_rows_do_not_keep_their_batch_in_memory():
    batch = LayerCache.merge([filled(2000, key=n) for n in range(8)])
    mx.eval(batch.state[7:])
    before = mx.get_active_memory()
    single = batch.extract(3)
    del batch
    assert mx.get_active_memory() - before < -5 * single.nbytes


@pytest.mark.parametrize(
    ("new", "what"), [((1, 1, 90), "width 96"), ((2, 1, 96), "1 rows"), ((1, 1, 96, mx.bfloat16), "float32")]
)
def test_what_does_not_fit_is_not_appended(new, what):
    cache = filled(5)
    before = unchanged(cache)
    *shape, dtype = new if isinstance(new[-1], mx.Dtype) else (*new, mx.float32)
    with pytest.raises(CacheError, match=what):
        cache.append(mx.zeros(shape, dtype))
    assert is_as(cache, before)
    with pytest.raises(CacheError, match=what.replace("96", "6")):
        cache.append_index_keys(mx.zeros((*shape[:2], 6 if shape[2] == 96 else 5), dtype))
    assert is_as(cache, before)


DUE = [WIDTHS, Widths(64, 32)]


def two(lengths=(5, 5), **options):
    caches = [LayerCache(widths, **options) for widths in DUE]
    for cache, tokens in zip(caches, lengths, strict=True):
        fill(cache, tokens)
    return caches


def uneven():
    caches = two()
    caches[0].append_index_keys(mx.zeros((1, 1, 6)))
    return caches


@pytest.mark.parametrize(
    ("caches", "message"),
    [
        (lambda: two()[:1], "1 caches for 2 layers"),
        (lambda: [two()[0], object()], "layer 1: the cache is a object"),
        (lambda: two()[::-1], r"layer 0: expected a cache of Widths\(.*\), got Widths\(latent=64, rope=32, index=0\)"),
        (lambda: two(model="another"), "layer 0: the cache was made by model another, this is a model"),
        (lambda: [two()[0], two(start=1)[1]], "differ in padding or first position"),
        (lambda: [two()[0], two(left_padding=[1])[1]], "differ in padding or first position"),
        (lambda: two((5, 4)), "hold between 4 and 5 tokens"),
        (uneven, "hold between 5 and 6 tokens"),
    ],
)
def test_caches_that_no_model_could_go_on_from(caches, message):
    with pytest.raises(CacheError, match=message):
        check_caches(caches(), DUE, "a model", 1)


def test_caches_that_a_model_goes_on_from():
    for caches in (two(), two(model="a model"), [LayerCache(widths) for widths in DUE]):
        check_caches(caches, DUE, "a model", 1)
    with pytest.raises(CacheError, match="layer 0: a cache of 1 rows, for a batch of 2"):
        check_caches(two(), DUE, "a model", 2)
    check_caches([LayerCache(widths) for widths in DUE], DUE, "a model", 2)


# -- bytes


@pytest.mark.parametrize(("dtype", "size"), [(mx.float32, 4), (mx.bfloat16, 2)])
@pytest.mark.parametrize("widths", [WIDTHS, Widths(64, 32)])
def test_nbytes_tells_the_truth(quantization, widths, dtype, size):
    """Up to the growth step of each part. No zeros beside the indexer's keys."""
    assert LayerCache(widths, quantization).nbytes == 0
    plain, index = cache_bytes(widths, size)
    packed, _ = cache_bytes(widths, size, quantization)
    start = quantization.start if quantization else 0
    due = 2 * STEP * (packed + index) if not start else STEP * plain + 2 * STEP * packed + 2 * STEP * index
    assert filled(STEP + start + 1, widths, quantization, dtype).nbytes == due


def test_bytes_at_glm_5_2_widths():
    """1152 a token and layer in 16 bit; in int8 612, or 648 with float32 scales; 256 for the indexer."""
    widths = Widths(512, 64, 128)
    assert cache_bytes(widths, 2) == (1152, 256)
    assert cache_bytes(widths, 2, KvQuantization()) == (612, 256)
    assert cache_bytes(widths, 4, KvQuantization()) == (648, 512)
    assert cache_bytes(Widths(512, 64), 2, KvQuantization(4)) == (324, 0)


@pytest.mark.parametrize("tokens", [1024, 8192, 32768])
@pytest.mark.parametrize("quantization", [None, KvQuantization(), KvQuantization(4)], ids=str)
def test_bytes_measured_are_those_predicted(tokens, quantization):
    """At GLM-5.2's widths, in 16 bit, grown in chunks."""
    cache = LayerCache(Widths(512, 64, 128), quantization)
    for _ in range(tokens // 1024):
        cache.append_index_keys(mx.zeros((1, 1024, 128), mx.bfloat16))
        cache.append(mx.zeros((1, 1024, 576), mx.bfloat16))
        mx.eval(cache.state[7:])
    assert cache.nbytes == tokens * sum(cache_bytes(cache.widths, 2, quantization))
    assert sum(p.nbytes for p in cache.state if isinstance(p, mx.array)) == cache.nbytes


def test_long_buffers_grow_seldom_and_little():
    """Growing copies all that there is: by 256 columns at a time a context of 1M would be copied 4096 times."""
    columns, copies = Columns(), 0
    while columns.length < 1 << 17:
        before = columns.buffers
        columns.append(mx.zeros((1, 128, 1)))
        copies += columns.buffers is not before
        reserve = columns.buffers[0].shape[1] - columns.length
        assert reserve <= max(256, columns.length // 60)
    assert copies < 64 + 64 * 4  # 64 up to 16k, then some 44 for each doubling


# -- positions and masks


def test_positions_start_after_the_pads():
    cache = LayerCache(WIDTHS, left_padding=[0, 3], start=10)
    assert cache.offset.tolist() == [10, 7]
    assert cache.make_mask(4)[1, 0].tolist() == [[False] * 4, [False] * 4, [False] * 4, [False] * 3 + [True]]


def test_masks():
    assert CausalMask(7, 1).whole() is None
    assert CausalMask(1, 2).whole()[0, 0].tolist() == [[True, True, False], [True, True, True]]
    assert CausalMask(2, 1, (0, 2)).whole()[:, 0, 0].tolist() == [[True] * 3, [False, False, True]]


@pytest.mark.parametrize("pads", [None, (0, 3)])
def test_a_masks_parts_are_those_of_the_whole(pads):
    mask, rows = CausalMask(4, 6, pads), 1 if pads is None else len(pads)
    whole = np.array(mask.whole())[:, 0]
    random = np.random.default_rng(0)
    for first, last in ((0, 6), (2, 4), (5, 6)):
        queries = range(first, last)
        for begin, end in ((0, 10), (3, 5), (0, 6), (4, 7), (9, 10)):
            part, due = mask.tile(queries, range(begin, end)), whole[:, first:last, begin:end]
            assert due.all() if part is None else np.array_equal(np.array(part), due)
        picked = np.stack([random.permuted(np.tile(np.arange(10), (rows, 1)), axis=1)[:, :7] for _ in queries], axis=1)
        seen, due = mask.picked(queries, mx.array(picked)), np.take_along_axis(whole[:, first:last], picked, axis=-1)
        assert (seen is None) == (pads is None and 4 + first + 1 >= 7)
        assert seen is None or np.array_equal(np.array(seen), due)
    assert CausalMask(6, 2).picked(range(2), mx.zeros((1, 2, 7), dtype=mx.uint32)) is None  # 7 and more are seen
    assert CausalMask(5, 2).picked(range(2), mx.zeros((1, 2, 7), dtype=mx.uint32)) is not None


def test_what_a_cache_says_of_itself():
    assert repr(filled(30, quantization=INT8)).startswith("LayerCache(30 tokens, 8 bit in groups of 32, ")
