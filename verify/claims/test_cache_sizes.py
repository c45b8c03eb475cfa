"""Caches at the sizes in use, to 200k tokens, chunks of 2048 and 16 rows, without a model: what goes in comes out, bit for bit.

Each operation runs on both sides of each threshold and at the largest size in use: what is wrong from any size on is wrong there.
Over 400 lines: one part of one claim a file.
"""

import copy
import itertools
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest

from glm_dsa import CacheError, KvQuantization, LayerCache
from glm_dsa.cache import Widths
from glm_dsa.cache_checks import check_caches, check_in_step
from glm_dsa.mask import CausalMask
from glm_dsa.model import positions
from glm_dsa.mtp import last_selection
from glm_dsa.store import BITS, GROUP_SIZES, LatentStore
from verify.engines.definition import to_numpy

CLAIM = "sizes in use"

CASE = "vectors"  # random ones, in the place of a checkpoint's
LONGEST, CHUNK, ROWS = 200_000, 2048, 16
# Buffers grow by 256 tokens up to 16,384, by ever more behind it; indices of 16 bit end at 65,536. The last buffer that is full
# before the longest context ends at 199,680.
EDGES = (256, 16_384, 65_536, 131_072, 199_680)
APPENDS = (1, 2, 7, 512, CHUNK)
NARROW, PACKABLE = Widths(2, 1, 1), Widths(32, 32, 1)
INT8 = KvQuantization(8, 32)
Row = tuple[np.ndarray, np.ndarray]  # what a row must hold: [latent | rotary key] [T, R + D], indexer keys [T, D_I]


def drawn(rows: int, tokens: int, widths: Widths = NARROW, seed: int = 0) -> list[np.ndarray]:
    """[latent | rotary key] and indexer keys, [B, T, ..]."""
    random = np.random.default_rng([seed, rows, tokens])
    return [random.random((rows, tokens, w), dtype=np.float32) for w in (widths.latent + widths.rope, widths.index)]


def append(cache: LayerCache, parts: list[np.ndarray], begin: int, end: int) -> tuple[mx.array, mx.array]:
    """Returns what the layer is handed of them: all latents so far, and all keys."""
    joined, keys = (mx.array(part[:, begin:end]) for part in parts)
    every = cache.append_index_keys(keys)
    return cache.append(joined).read(), every


def filled(parts: list[np.ndarray], widths: Widths = NARROW, quantization: KvQuantization | None = None) -> LayerCache:
    cache = LayerCache(widths, quantization)
    append(cache, parts, 0, parts[0].shape[1])
    return cache


def exact(judge, stage: str, ours: mx.array, due: np.ndarray) -> None:
    mine = to_numpy(ours)
    if mine.shape == due.shape and np.array_equal(mine, due):
        judge.holds(CASE, stage, True, "bit for bit")
    else:
        judge.values(CASE, stage, mine, due, 0.0)


def check(judge, gate, stage: str, cache: LayerCache, parts: list[np.ndarray]) -> None:
    """A cache holds `parts`, and no more."""
    tokens = parts[0].shape[1]
    judge.holds(CASE, stage, cache.length == cache.size() == tokens, f"{tokens:,} tokens (found: {cache.length:,})")
    if tokens:
        exact(judge, stage, cache.latents.read(), parts[0])
        exact(judge, stage, cache.index_keys.read()[0], parts[1])
        gate.ran(context=cache.latents.read().shape[1], batch=cache.batch)


def check_rows(judge, gate, stage: str, cache: LayerCache, rows: list[Row]) -> None:
    """Each row of a left-padded batch holds its own, behind no more pads than it needs."""
    due = [cache.length - len(row[0]) for row in rows]
    judge.holds(CASE, stage, cache.left_padding == due, f"rows behind {due} pads (found: {cache.left_padding})")
    judge.holds(CASE, stage, min(due) == 0, "no column is padding in all rows")
    offsets = np.array(cache.offset).tolist()
    judge.holds(CASE, stage, offsets == [len(row[0]) for row in rows], f"positions go on there (found: {offsets})")
    held = to_numpy(cache.latents.read()), to_numpy(cache.index_keys.read()[0])
    other = [
        i
        for i, (pads, row) in enumerate(zip(due, rows, strict=True))
        if not all(np.array_equal(mine[i, pads:], part) for mine, part in zip(held, row, strict=True))
    ]
    judge.holds(CASE, stage, not other, f"each of {len(rows)} rows is what it was alone (other: {other})")
    for pads in due:
        gate.ran(context=held[0].shape[1], batch=held[0].shape[0], pads=pads)


def rounded(values: np.ndarray, start: int = 0, quantization: KvQuantization = INT8) -> np.ndarray:
    """What is read back of values [T, W] that are packed from `start` on."""
    if start >= len(values):
        return values
    words, scales, biases = packed(values[start:], quantization)
    back = mx.dequantize(words, scales, biases, group_size=quantization.group_size, bits=quantization.bits)
    return np.concatenate([values[:start], to_numpy(back)])


def packed(values: np.ndarray, quantization: KvQuantization) -> tuple[mx.array, mx.array, mx.array]:
    return mx.quantize(mx.array(values), group_size=quantization.group_size, bits=quantization.bits)


# -- growing


@pytest.mark.parametrize("tokens", [512, CHUNK, LONGEST])
def test_growing_to_the_longest_context(judge, gate, tokens):
    """By chunks from the first token on; compared whenever buffers have grown."""
    parts, cache, size = drawn(1, LONGEST), LayerCache(NARROW), 0
    for begin in range(0, LONGEST, tokens):
        end = min(begin + tokens, LONGEST)
        append(cache, parts, begin, end)
        if cache.nbytes != size or end == LONGEST:
            size = cache.nbytes
            check(judge, gate, "cache growth", cache, [part[:, :end] for part in parts])


@pytest.mark.parametrize(("tokens", "rows"), [*((tokens, 1) for tokens in APPENDS), (1, ROWS), (CHUNK, ROWS)])
def test_growing_across_each_edge(judge, gate, tokens, rows):
    """A few appends before each edge and a few behind it."""
    for edge in EDGES if rows == 1 else (16_384, 199_680):
        begin = max(edge - 2 * tokens, 1)
        parts = drawn(rows, begin + 4 * tokens if edge < LONGEST - 4 * tokens else LONGEST)
        cache = filled([part[:, :begin] for part in parts])
        for at in range(begin, parts[0].shape[1], tokens):
            append(cache, parts, at, at + tokens)
        check(judge, gate, "cache growth", cache, parts)
    gate.ran(chunk=tokens)


@pytest.mark.parametrize("tokens", APPENDS)
def test_growing_into_the_longest_context(judge, gate, tokens):
    """A cache that was saved has no columns in reserve: it grows by what comes next, here to the last token in use."""
    parts = drawn(1, LONGEST)
    cache = LayerCache.from_state(filled([part[:, :-tokens] for part in parts]).state)
    handed = append(cache, parts, LONGEST - tokens, LONGEST)
    check(judge, gate, "cache growth", cache, parts)
    for ours, part in zip(handed, parts, strict=True):
        exact(judge, "what the layer is handed", ours, part)


def test_positions_of_what_comes_next(judge, gate):
    """Of a chunk behind the longest context, and of a batch whose rows begin behind pads."""
    parts = drawn(2, LONGEST)
    batch, alone = LayerCache(NARROW, left_padding=[0, 65_537]), filled([part[:1] for part in parts])
    append(batch, parts, 0, LONGEST)
    after = LONGEST + np.arange(CHUNK)
    exact(judge, "positions", positions(CHUNK, alone), after)
    exact(judge, "positions", positions(CHUNK, batch), np.stack([after, after - 65_537]))
    for what, cache, pads in (("alone", alone, None), ("batch", batch, (0, 65_537))):
        mask = cache.mask(CHUNK)
        judge.holds(
            CASE,
            "mask",
            mask == CausalMask(LONGEST, CHUNK, pads),
            f"of {what}: behind all that is held (found: {mask})",
        )
        check_mask(judge, "mask", cache.make_mask(2), seen(LONGEST, range(2), np.arange(LONGEST + 2), pads)[:, None])
    every = last_selection(None, batch)
    exact(judge, "every key", every, np.broadcast_to(np.arange(LONGEST), (2, 1, LONGEST)))
    gate.ran(context=every.shape[-1], batch=every.shape[0])
    picked = columns_of(ROWS, CHUNK, 16, LONGEST)
    exact(judge, "the last query's keys", last_selection(mx.array(picked), batch), picked[:, -1:])


def test_what_no_cache_keeps(judge):
    """Latents of one call alone; and what packing makes of them."""
    for rows, tokens in ((ROWS, CHUNK), (1, LONGEST)):
        values = drawn(rows, tokens, PACKABLE)[0]
        exact(judge, "latents (no cache)", LatentStore.of(mx.array(values)).read(), values)
        due = np.stack([rounded(row) for row in values])
        exact(judge, "latents (rounded)", INT8.rounded(mx.array(values)), due)


def test_caches_that_are_out_of_step(judge):
    """Layers of the longest context go together; one that is a token short does not."""
    parts = drawn(1, LONGEST)
    whole, short = filled(parts), filled([part[:, :-1] for part in parts])
    check_caches([whole, filled(parts)], [NARROW] * 2, "", 1)
    check_in_step(short, whole, 1, 1)
    for what, refused in (
        ("layers", lambda: check_caches([whole, short], [NARROW] * 2, "", 1)),
        ("the MTP layer", lambda: check_in_step(whole, whole, 1, 1)),
    ):
        try:
            refused()
        except CacheError:
            judge.holds(CASE, "caches in step", True, f"{what}: a token more or less is refused")
        else:
            judge.holds(CASE, "caches in step", False, f"{what}: a token more or less is refused")


# -- gathering


def columns_of(rows: int, queries: int, chosen: int, length: int) -> np.ndarray:
    """int [B, S, K], ascending, with those on both sides of each edge, the first and the last."""
    random = np.random.default_rng([rows, queries])
    edges = [0, length - 1, *(at for edge in EDGES for at in (edge - 1, edge) if at < length)]
    picked = np.sort(random.integers(0, length, (rows, queries, chosen)), axis=-1)
    picked[..., : len(edges)] = edges
    return np.sort(picked, axis=-1)


@pytest.mark.parametrize("rows", [1, 2, ROWS])
def test_gathering(judge, gate, rows):
    parts = drawn(rows, LONGEST)
    cache = filled(parts)
    for what in ("with columns in reserve", "without"):
        for queries, chosen in ((1, CHUNK), (64, 64), (CHUNK, 16))[: 3 if rows == 1 else 2]:
            columns = columns_of(rows, queries, chosen, LONGEST)
            due = np.take_along_axis(parts[0][:, None], columns[..., None], axis=2)
            taken = cache.latents.take(mx.array(columns.astype(np.uint32)))
            exact(judge, f"gather ({rows} rows, {what})", taken, due)
            gate.ran(selected=taken.shape[2], batch=taken.shape[0], context=cache.length)
        cache = LayerCache.from_state(cache.state)


@pytest.mark.parametrize("rows", [1, ROWS])
def test_gathering_what_is_packed(judge, gate, rows):
    """Words and scales of any kind: unpacked is what numpy picks of them."""
    random = np.random.default_rng(rows)
    words = random.integers(0, 1 << 32, (rows, LONGEST, 4), dtype=np.uint32)
    scales, biases = (random.random((rows, LONGEST, 2), dtype=np.float32) for _ in range(2))
    state = list(LayerCache(PACKABLE, KvQuantization(2, 32)).state)
    state[8:11] = map(mx.array, (words, scales, biases))
    state[11] = mx.zeros((rows, LONGEST, 1))
    cache = LayerCache.from_state(state)
    for queries, chosen in ((1, CHUNK), (CHUNK, 16))[: 2 if rows == 1 else 1]:
        columns = columns_of(rows, queries, chosen, LONGEST)
        picked = [
            mx.array(np.take_along_axis(part[:, None], columns[..., None], axis=2)) for part in (words, scales, biases)
        ]
        due = to_numpy(mx.dequantize(picked[0], picked[1], picked[2], group_size=32, bits=2))
        exact(judge, f"gather ({rows} rows, packed)", cache.latents.take(mx.array(columns.astype(np.uint32))), due)
        gate.ran(selected=columns.shape[-1], batch=words.shape[0], context=cache.length)


# -- rewinding


@pytest.mark.parametrize("quantization", [None, INT8, KvQuantization(8, 32, 100_001)], ids=str)
def test_trimming(judge, gate, quantization):
    """0, 1, 2, half and all of the longest context, and on from there."""
    widths = NARROW if quantization is None else PACKABLE
    parts, more = drawn(1, LONGEST, widths), drawn(1, CHUNK, widths, seed=1)
    start = 2 * LONGEST if quantization is None else quantization.start
    whole = rounded(parts[0][0], start)[None]
    state = filled(parts, widths, quantization).state
    for tokens, comes in ((0, 1), (1, 1), (2, 7), (LONGEST // 2, CHUNK), (LONGEST, CHUNK)):
        cache, left = LayerCache.from_state(state), LONGEST - tokens
        judge.holds(CASE, "trim", cache.trim(tokens) == tokens, f"{tokens:,} are forgotten")
        check(judge, gate, "trim", cache, [whole[:, :left], parts[1][:, :left]])
        append(cache, more, 0, comes)
        rest = rounded(more[0][0, :comes], max(start - left, 0))[None]
        check(judge, gate, "trim, and on", cache, [np.concatenate([whole[:, :left], rest], axis=1),
                                                   np.concatenate([parts[1][:, :left], more[1][:, :comes]], axis=1)])  # fmt: skip
        gate.ran(trim=tokens)


def test_trimming_any_number(judge, gate):
    """Of tokens, in a cache that has grown once: every number that there is, and none beyond."""
    parts, tokens = drawn(1, 300), 300
    state, other = filled(parts).state, []
    for number in range(tokens + 1):
        cache, left = LayerCache.from_state(state), tokens - number
        cache.trim(number)
        held = (to_numpy(part) for part in (cache.latents.read(), *cache.index_keys.read()))
        if cache.length != left or not all(np.array_equal(h, p[:, :left]) for h, p in zip(held, parts, strict=True)):
            other.append(number)
        gate.ran(trim=tokens - cache.length)
    judge.holds(
        CASE, "trim", not other, f"{tokens} tokens less 0 to {tokens} are as many, the first ones (other: {other[:5]})"
    )


def test_trimming_a_batch(judge, gate):
    lengths = [CHUNK + 100 * i for i in range(ROWS)]
    rows = rows_of(lengths)
    for tokens in (0, 1, 2, CHUNK // 2, CHUNK):
        batch = merged(rows)
        batch.trim(tokens)
        left = [(latents[: len(latents) - tokens], keys[: len(keys) - tokens]) for latents, keys in rows]
        check_rows(judge, gate, "trim (batch)", batch, left)
        gate.ran(trim=tokens, batch=batch.batch)


# -- masks


def seen(first: int, rows: range, columns: np.ndarray, pads: Sequence[int] | None) -> np.ndarray:
    """columns [t] or [B, s, t] -> bool [1 or B, s, t]."""
    own = first + np.arange(rows.start, rows.stop, dtype=np.int32)[:, None]
    allowed = (columns <= own).reshape(-1, len(own), columns.shape[-1])
    return allowed if pads is None else allowed & (columns >= np.array(pads)[:, None, None])


def of_bits(mask: mx.array) -> np.ndarray:
    """As it lies in memory, not copied: the largest has 400 million entries."""
    mx.eval(mask)
    return np.asarray(memoryview(mask))  # type: ignore[arg-type]  # its stubs do not tell that it is a buffer


def check_mask(judge, stage: str, ours: mx.array | None, due: np.ndarray) -> None:
    if ours is None:
        judge.holds(CASE, stage, bool(due.all()), "no mask where each sees each")
    else:
        judge.holds(
            CASE, stage, np.array_equal(of_bits(ours), due), f"masked is what is expected, {due.shape}"
        )


PADS = [0, 1, 255, 256, 257, 2048, 16_383, 16_384, 65_535, 65_536, 65_537, 70_000, 131_071, 131_072, 150_000, 0]


@pytest.mark.parametrize(("first", "queries", "pads"), [
    (0, 2 * CHUNK, None), (0, CHUNK, [0, 1, 700, CHUNK - 1]), (16_384, 512, [0, 16_385]), (LONGEST - 7, 7, PADS),
    (LONGEST - 1, 1, None), (LONGEST - 1, 1, PADS),
])  # fmt: skip
def test_masks(judge, first, queries, pads):
    mask = CausalMask(first, queries, None if pads is None else tuple(pads))
    due = seen(first, range(queries), np.arange(first + queries, dtype=np.int32), pads)
    whole = mask.whole()
    check_mask(judge, "mask", whole, due[:, None])


def test_the_largest_mask(judge):
    """Of a whole chunk behind the longest context: all that came before it, and its own triangle."""
    first = LONGEST - CHUNK
    whole = CausalMask(first, CHUNK).whole()
    assert whole is not None
    ours = of_bits(whole)
    judge.holds(CASE, "mask", ours.shape == (1, 1, CHUNK, LONGEST), f"{CHUNK} queries, {LONGEST:,} keys")
    judge.holds(CASE, "mask", ours[..., :first].all(), "each sees all that came before the chunk")
    judge.holds(
        CASE, "mask", np.array_equal(ours[0, 0, :, first:], np.tri(CHUNK, dtype=bool)), "and the chunk up to its own"
    )


@pytest.mark.parametrize("pads", [None, PADS], ids=["alone", "16 rows"])
def test_masks_of_tiles_and_of_what_was_selected(judge, pads):
    first = LONGEST - CHUNK
    mask, batch = CausalMask(first, CHUNK, None if pads is None else tuple(pads)), len(pads or [0])
    some = (range(1), range(500, 600), range(CHUNK - 1, CHUNK))
    for rows in some:
        own = first + rows.start + 1
        for columns in (range(300), range(65_500, 65_600), range(own - 300, own), range(own - 300, own + 1),
                        range(own - 1, LONGEST), range(150_000, own)):  # fmt: skip
            due = seen(first, rows, np.arange(columns.start, columns.stop), pads)
            check_mask(judge, "mask of a tile", mask.tile(rows, columns), due)
    for rows in (*some, range(CHUNK)):
        picked = columns_of(batch, len(rows), 64, LONGEST)
        if pads is not None:  # the first column that is no padding, and the last that is
            picked[..., 0], picked[..., 1] = np.array(pads)[:, None], np.maximum(np.array(pads) - 1, 0)[:, None]
        of_selection = mask.sees if pads is None else mask.picked
        due = seen(first, rows, picked, pads)
        check_mask(judge, "mask of a selection", of_selection(rows, mx.array(picked.astype(np.uint32))), due)
    for chosen in (64, CHUNK):  # the query in this place sees as many keys as it picks
        few = CausalMask(0, 2 * CHUNK)
        for rows in (range(chosen - 1, chosen), range(chosen - 2, chosen), range(chosen, chosen + 9)):
            picked = np.broadcast_to(np.arange(chosen), (1, len(rows), chosen))
            check_mask(judge, "mask of a selection", few.picked(rows, mx.array(picked)), seen(0, rows, picked, None))


# -- batches


def rows_of(lengths: list[int], widths: Widths = NARROW, seed: int = 0) -> list[Row]:
    return [tuple(part[0] for part in drawn(1, n, widths, seed=seed + i)) for i, n in enumerate(lengths)]


def merged(rows: list[Row], widths: Widths = NARROW, quantization: KvQuantization | None = None) -> LayerCache:
    return LayerCache.merge([filled([part[None] for part in row], widths, quantization) for row in rows])


def read_back(rows: list[Row], start: int | None) -> list[Row]:
    return [(joined if start is None else rounded(joined, start), keys) for joined, keys in rows]


UNEQUAL = [1, 2, 7, 255, 256, 257, 300, 511, 513, 1000, 1024, 2047, 2048, 2049, 3000, 4001]


@pytest.mark.parametrize(("lengths", "start"), [
    (UNEQUAL, None), (UNEQUAL, 0), (UNEQUAL, 300), ([LONGEST, 65_537], None), ([LONGEST, 180_000], 150_001),
    ([LONGEST, 200], 300), ([LONGEST - 1000 * i for i in range(ROWS)], None),
], ids=["to 4k", "to 4k, packed", "to 4k, packed from 300 on", "200k", "200k, packed from 150k on",
        "200k and one that is not packed", "16 of 200k"])  # fmt: skip
def test_batches(judge, gate, lengths, start):
    """Rows merged, run on, filtered and in another order, extended, and taken out again are what they were alone."""
    quantization = None if start is None else KvQuantization(8, 32, start)
    widths = NARROW if start is None else PACKABLE
    rows = rows_of(lengths, widths)
    due = read_back(rows, start)
    batch = merged(rows, widths, quantization)
    check_rows(judge, gate, "batch (merged)", batch, due)
    order = list(range(len(rows)))[::-1][: max(2, len(rows) - 3)]
    batch.filter(order)
    due = [due[i] for i in order]
    check_rows(judge, gate, "batch (filtered)", batch, due)
    batch.filter([len(order) - 1])
    check_rows(judge, gate, "batch (filtered)", batch, due[-1:])
    batch.extend(merged(rows[:1] if len(rows) < ROWS else rows[:15], widths, quantization))
    due = due[-1:] + read_back(rows[: 1 if len(rows) < ROWS else 15], start)
    check_rows(judge, gate, "batch (extended)", batch, due)
    last = batch.extract(len(due) - 1)
    check(judge, gate, "batch (a row taken out)", last, [part[None] for part in due[-1]])


@pytest.mark.parametrize(("before", "comes"), [
    ([0] * ROWS, [CHUNK - 100 * i for i in range(ROWS)]), ([0, 0], [512, 1]), (UNEQUAL, [1] * 15 + [CHUNK]),
    ([LONGEST - CHUNK, 100], [1, CHUNK]),
], ids=["16 prompts", "2 prompts", "16 chunks", "behind 200k"])  # fmt: skip
def test_chunks_of_unequal_length(judge, gate, before, comes):
    """Right padding that was announced goes to the left of each row, whatever came before it."""
    rows, more = rows_of(before), rows_of(comes, seed=100)
    batch = merged(rows) if max(before) else LayerCache(NARROW, left_padding=[0] * len(rows))
    longest = max(comes)
    batch.prepare(lengths=comes, right_padding=[longest - n for n in comes])
    parts = [
        np.stack([np.pad(part, ((0, longest - len(part)), (0, 0))) for part in column])
        for column in zip(*more, strict=True)
    ]
    append(batch, parts, 0, longest)
    batch.finalize()
    due = [
        (np.concatenate([latents, more_latents]), np.concatenate([keys, more_keys]))
        for (latents, keys), (more_latents, more_keys) in zip(rows, more, strict=True)
    ]
    check_rows(judge, gate, "batch (right padding)", batch, due)
    gate.ran(chunk=parts[0].shape[1])


@pytest.mark.parametrize("start", [None, 131_073])
def test_copies(judge, gate, start):
    """Copied, or saved and restored: all of it, and nothing that goes on in one shows in the other."""
    widths, quantization = (NARROW, None) if start is None else (PACKABLE, KvQuantization(8, 32, start))
    parts = drawn(1, LONGEST, widths)
    cache = filled([part[:, :-1] for part in parts], widths, quantization)
    twins = copy.deepcopy(cache), LayerCache.from_state(cache.state)
    due = [parts[0] if start is None else rounded(parts[0][0], start)[None], parts[1]]
    for twin in twins:
        append(twin, parts, LONGEST - 1, LONGEST)
        check(judge, gate, "cache copied", twin, due)
        check(judge, gate, "cache copied", cache, [part[:, :-1] for part in due])


@pytest.mark.parametrize("lengths", [[9, 5], [400, 100], [100_000, 3]])
def test_saved_batches(judge, gate, lengths):
    """Rows of unequal lengths, saved and restored."""
    rows = rows_of(lengths)
    batch = merged(rows)
    twin = LayerCache.from_state(batch.state)
    gate.ran(saved_pads=max(batch.left_padding or [0]))
    check_rows(judge, gate, "batch (saved)", twin, rows)


def test_padding_that_is_announced(judge, gate):
    """Of 16 rows, before their first token; and the mask that mlx-lm asks for."""
    rows = rows_of(UNEQUAL)
    longest = max(UNEQUAL)
    batch = LayerCache(NARROW)
    batch.prepare(left_padding=[longest - n for n in UNEQUAL])
    parts = [
        np.stack([np.pad(part, ((longest - len(part), 0), (0, 0))) for part in column])
        for column in zip(*rows, strict=True)
    ]
    pads = batch.left_padding
    check_mask(
        judge, "mask (of a batch)", batch.make_mask(CHUNK), seen(0, range(CHUNK), np.arange(CHUNK), pads)[:, None]
    )
    append(batch, parts, 0, longest)
    check_rows(judge, gate, "batch (padding announced)", batch, rows)


# -- packing


@pytest.mark.parametrize(("bits", "group"), list(itertools.product(BITS, GROUP_SIZES)))
def test_every_packing(judge, gate, bits, group):
    """A prompt, a chunk and a decode step: words, scales and biases are those of mx.quantize; so is what is read."""
    widths, quantization = Widths(group, group, 1), KvQuantization(bits, group)
    parts, cache = drawn(2, 600 + CHUNK + 1, widths), LayerCache(widths, quantization)
    for begin, end in ((0, 600), (600, 600 + CHUNK), (600 + CHUNK, 600 + CHUNK + 1)):
        append(cache, parts, begin, end)
    words, scales, biases = due = packed(parts[0], quantization)
    for name, ours, theirs in zip(("words", "scales", "biases"), cache.latents.packed.read(), due, strict=True):
        exact(judge, f"packed {name} ({bits} bit in groups of {group})", ours, to_numpy(theirs))
    back = mx.dequantize(words, scales, biases, group_size=group, bits=bits)
    exact(judge, f"packed ({bits} bit in groups of {group})", cache.latents.read(), to_numpy(back))
    gate.ran(bits=bits, group=group, chunk=CHUNK, batch=cache.batch)


@pytest.mark.parametrize("start", [0, 16_385, 131_073, LONGEST - 1, LONGEST])
def test_packing_from_a_token_on(judge, gate, start):
    """In a cache made so, and in one that is packed when it is full: before it the vectors themselves, from it on packed."""
    parts = drawn(1, LONGEST, PACKABLE)
    due = rounded(parts[0][0], start)[None]
    cache = LayerCache(PACKABLE, KvQuantization(8, 32, start))
    for begin, end in ((0, 16_384), (16_384, LONGEST - CHUNK), (LONGEST - CHUNK, LONGEST)):
        append(cache, parts, begin, end)
    columns = columns_of(1, 1, CHUNK, LONGEST)
    picked = np.take_along_axis(due[:, None], columns[..., None], axis=2)
    made = {"made so": cache}
    if start in (0, 131_073):
        made["packed later"] = filled(parts, PACKABLE).to_quantized(32, 8, start)
    gate.ran(start=cache.latents.plain.length)
    for what, ours in made.items():
        check(judge, gate, f"packed from a token on ({what})", ours, [due, parts[1]])
        exact(judge, f"gather (packed, {what})", ours.latents.take(mx.array(columns.astype(np.uint32))), picked)
