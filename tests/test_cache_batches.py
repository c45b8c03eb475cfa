"""Caches of a layer in batches: rows joined, taken out and padded; and what no model could go on from."""

import copy

import mlx.core as mx
import pytest

from glm_dsa.cache import LayerCache, Widths
from glm_dsa.cache_checks import check_caches
from glm_dsa.errors import CacheError
from glm_dsa.store import KvQuantization
from tests.caches import INT8, WIDTHS, contents, every_kind, fill, filled, is_as, same, unchanged


@every_kind
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


@every_kind
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


@every_kind
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


@every_kind
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
@every_kind
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


@every_kind
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


@every_kind
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


@every_kind
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
