"""The cache of a layer: growing, rewinding and quantizing act on every part together; bytes, positions, masks."""

import mlx.core as mx
import numpy as np
import pytest

from glm_dsa.cache import LayerCache, Widths, cache_bytes
from glm_dsa.errors import CacheError
from glm_dsa.mask import CausalMask
from glm_dsa.store import STEP, Columns, KvQuantization
from tests.caches import INT8, WIDTHS, contents, every_kind, fill, filled, is_as, same, unchanged, vectors


@pytest.mark.parametrize("tokens", [1, STEP - 1, STEP, STEP + 1, 3 * STEP + 7])
@every_kind
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


@every_kind
def test_what_is_taken_is_what_would_be_read(quantization):
    """Unpacking what was selected equals unpacking everything, then selecting, exactly; in a batch too."""
    one, two = filled(40, quantization=quantization), filled(23, quantization=quantization, key=7)
    for cache in (one, LayerCache.merge([one, two])):
        rows, length = cache.batch, cache.length
        selection = mx.random.randint(0, length, (rows, 5, 9), key=mx.random.key(3)).astype(mx.uint32)
        every = cache.latents.read()
        picked = mx.take_along_axis(every[:, None], selection[..., None], axis=2)
        assert mx.array_equal(cache.latents.take(selection), picked)


@every_kind
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


# -- bytes


@pytest.mark.parametrize(("dtype", "size"), [(mx.float32, 4), (mx.bfloat16, 2)])
@pytest.mark.parametrize("widths", [WIDTHS, Widths(64, 32)])
@every_kind
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
