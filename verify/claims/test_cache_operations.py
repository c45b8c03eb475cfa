"""Any sequence of prefill, decode, rewind, quantizing, copying, saving and batching equals the same tokens run afresh.

Over 400 lines: one claim a file, and most of it is the one machine of operations."""

import copy
import json
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from glm_dsa import CacheError, KvQuantization, LayerCache, trace
from glm_dsa.cache import Widths
from verify.cases import TOPK, Case, group_size
from verify.claims.replay import filled
from verify.core import bounds, stages
from verify.core.checker import Discrepancy
from verify.core.choices import as_sets, of_stage
from verify.engines.definition import Ours, to_numpy

CLAIM = "cache operations, any sequence"
pytestmark = pytest.mark.needs("packable")

PROBE = 7  # the token by which two caches are compared: what the model says of it after them


def through_a_file(cache: LayerCache, folder) -> LayerCache:
    """Saved and loaded, as anyone may who knows `state` and `from_state` only."""
    parts = dict(enumerate(cache.state))
    arrays = {str(i): part for i, part in parts.items() if isinstance(part, mx.array)}
    others = {i: part for i, part in parts.items() if str(i) not in arrays}
    mx.save_safetensors(str(folder / "cache.safetensors"), arrays, {"rest": json.dumps(others)})
    loaded: Any = mx.load(str(folder / "cache.safetensors"), return_metadata=True)
    arrays, metadata = loaded
    mx.eval(arrays)  # mx.load is lazy, and the next cache goes into the same file
    rest = {int(i): part for i, part in json.loads(metadata["rest"]).items()}
    return LayerCache.from_state([rest[i] if i in rest else arrays[str(i)] for i in range(len(parts))])


def remade(cache: LayerCache, how: str, folder) -> LayerCache:
    if how == "copy":
        return copy.deepcopy(cache)
    return LayerCache.from_state(cache.state) if how == "state" else through_a_file(cache, folder)


def picks(rows: int):
    return st.lists(st.integers(0, rows - 1), min_size=1, max_size=4, unique=True)


# -- contents, bit for bit


class Row:
    """A cache beside what it must hold: the vectors appended, and from which on they are packed."""

    def __init__(self, cache: LayerCache, start: int | None) -> None:
        self.cache, self.start = cache, start
        self.vectors, self.keys = np.zeros((0, 96), np.float32), np.zeros((0, 6), np.float32)

    def copy(self, cache: LayerCache) -> "Row":
        twin = Row(cache, self.start)
        twin.vectors, twin.keys = self.vectors, self.keys
        return twin

    def grow(self, vectors, keys) -> None:
        self.vectors, self.keys = np.concatenate([self.vectors, vectors]), np.concatenate([self.keys, keys])

    def trim(self, tokens: int) -> None:
        left = len(self.vectors) - tokens
        self.vectors, self.keys = self.vectors[:left], self.keys[:left]

    def due(self) -> np.ndarray:
        start = len(self.vectors) if self.start is None else self.start
        if start >= len(self.vectors):
            return self.vectors
        packed = to_numpy(KvQuantization(8, 32).rounded(mx.array(self.vectors[start:])))
        return np.concatenate([self.vectors[:start], packed])


class Contents(RuleBasedStateMachine):
    """Caches without a model: random vectors in, the same out."""

    def __init__(self, judge, folder) -> None:
        super().__init__()
        self.judge, self.folder = Shrinkable(judge), folder
        self.rows: list[Row] = []
        self.random = np.random.default_rng(0)

    def check(self, row: Row, what: str) -> None:
        self.judge.holds("vectors", what, row.cache.length == len(row.vectors), "as many tokens as were kept")
        after = self.first + len(row.vectors)
        self.judge.holds(
            "vectors", what, row.cache.offset == after, f"the next position is {after} (found: {row.cache.offset})"
        )
        if row.cache.length:
            self.judge.values("vectors", what, to_numpy(row.cache.latents.read())[0], row.due(), 0.0)
            self.judge.values("vectors", what, to_numpy(row.cache.index_keys.read()[0])[0], row.keys, 0.0)

    def draw(self, rows: int, tokens: int):
        return (self.random.standard_normal((rows, tokens, w)).astype(np.float32) for w in (96, 6))

    def grow(self, cache: LayerCache, rows: list[Row], lengths: list[int]) -> None:
        vectors, keys = self.draw(len(rows), max(lengths))
        cache.append_index_keys(mx.array(keys))
        cache.append(mx.array(vectors))
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            row.grow(vectors[i, :length], keys[i, :length])

    def fresh(self, pads=None) -> LayerCache:
        quantization = None if self.start is None else KvQuantization(8, 32, self.start)
        return LayerCache(Widths(64, 32, 6), quantization, pads, self.first)

    def new(self) -> None:
        self.rows.append(Row(self.fresh(), self.start))

    @initialize(start=st.sampled_from([None, 0, 5, 20]), first=st.sampled_from([0, 200_000]))
    def begin(self, start, first) -> None:
        self.start, self.first = start, first
        self.new()

    @rule(row=st.integers(0, 3), tokens=st.sampled_from([1, 1, 1, 3, 8, 300]))
    def append(self, row, tokens) -> None:
        row = self.rows[row % len(self.rows)]
        self.grow(row.cache, [row], [tokens])
        self.check(row, "append")

    @rule(row=st.integers(0, 3), tokens=st.integers(0, 30))
    def trim(self, row, tokens) -> None:
        row = self.rows[row % len(self.rows)]
        if tokens > len(row.vectors):
            with pytest.raises(CacheError):
                row.cache.trim(tokens)
        else:
            row.cache.trim(tokens)
            row.trim(tokens)
        self.check(row, "trim")

    @precondition(lambda self: len(self.rows) < 6)
    @rule(row=st.integers(0, 3), how=st.sampled_from(["new", "copy", "state", "file"]))
    def another(self, row, how) -> None:
        row = self.rows[row % len(self.rows)]
        if how == "new":
            return self.new()
        if how == "state":  # two of one state share nothing
            state = row.cache.state
            twin = row.copy(LayerCache.from_state(state))
            self.grow(twin.cache, [twin], [2])
            self.rows.append(row.copy(LayerCache.from_state(state)))
            self.check(twin, "state, gone on from")
        else:
            self.rows.append(row.copy(remade(row.cache, how, self.folder)))
        self.check(self.rows[-1], how)

    @rule(row=st.integers(0, 3), start=st.sampled_from([0, 5, 20]))
    def quantize(self, row, start) -> None:
        row = self.rows[row % len(self.rows)]
        row.cache = row.cache.to_quantized(group_size=32, bits=8, start=start)
        row.start = start if row.start is None else row.start  # what is packed stays as it is
        self.check(row, "quantize")

    @rule(data=st.data(), lengths=st.lists(st.integers(0, 6), min_size=4, max_size=4), decoded=st.integers(0, 2))
    def through_a_batch(self, data, lengths, decoded) -> None:
        """Merged; a right-padded chunk and some steps appended; some rows dropped, one added; each taken out again."""
        chosen = [self.rows[i] for i in data.draw(picks(len(self.rows)))]
        if len({row.start for row in chosen}) > 1:
            with pytest.raises(CacheError, match="different quantization"):
                LayerCache.merge([row.cache for row in chosen])
            for row in chosen:
                self.check(row, "merge refused")
            return
        batch = LayerCache.merge([row.cache for row in chosen])
        rows = [row.copy(row.cache) for row in chosen]
        lengths = lengths[: len(rows)]
        if longest := max(lengths):
            batch.prepare(lengths=lengths, right_padding=[longest - n for n in lengths])
            self.grow(batch, rows, lengths)
            batch.finalize()
        for _ in range(decoded):
            self.grow(batch, rows, [1] * len(rows))
        keep = data.draw(st.permutations(range(len(rows))))[: data.draw(st.integers(1, len(rows)))]
        batch.filter(mx.array(keep) if data.draw(st.booleans()) else keep)
        rows = [rows[i] for i in keep]
        if data.draw(st.booleans()):
            batch.extend(chosen[0].cache)
            rows.append(chosen[0].copy(chosen[0].cache))
        least = min(len(row.vectors) for row in rows)
        tokens = data.draw(st.integers(0, min(least, 4)))
        batch.trim(tokens)
        for i, row in enumerate(rows):
            row.trim(tokens)
            row.cache = batch.extract(i)
            self.check(row, "batch")
        for row in chosen:
            self.check(row, "merge leaves its parts alone")
        self.rows = (rows + self.rows)[:6]

    @rule(data=st.data(), pads=st.lists(st.integers(0, 6), min_size=2, max_size=4), is_prepared=st.booleans())
    def padded(self, data, pads, is_prepared) -> None:
        """A batch whose left padding is announced before its first token; it changes before, between and after the pads."""
        total = max(pads) + data.draw(st.integers(1, 4))
        vectors, keys = self.draw(len(pads), total)
        batch = self.fresh(None if is_prepared else pads)
        if is_prepared:
            batch.prepare(left_padding=pads)
        rows, cut = list(range(len(pads))), data.draw(st.integers(0, total))
        for columns in (slice(0, 0), slice(0, cut), slice(cut, total)):
            if columns.start < columns.stop:
                batch.append_index_keys(mx.array(keys[rows, columns]))
                batch.append(mx.array(vectors[rows, columns]))
            batch, rows = self.changed(data, batch, rows)
        for place, row in enumerate(rows):
            alone = Row(batch.extract(place), self.start)
            alone.grow(vectors[row, pads[row] :], keys[row, pads[row] :])
            self.check(alone, "batch, padded")

    def changed(self, data, batch: LayerCache, rows: list[int]) -> tuple[LayerCache, list[int]]:
        """The batch after one operation that keeps what its rows hold and expect, and which rows it has then."""
        how = data.draw(st.sampled_from(["filter", "extend", "trim", "copy", "state", "file"]))
        keep = data.draw(picks(len(rows)))
        if how == "filter":
            batch.filter(keep)
            return batch, [rows[place] for place in keep]
        if how == "extend":
            other = copy.deepcopy(batch)
            other.filter(keep[:1])
            batch.extend(other)
            return batch, [*rows, rows[keep[0]]]
        if how == "trim":
            batch.trim(0)
            return batch, rows
        return remade(batch, how, self.folder), rows


def run(machine, examples: int, steps: int, **more) -> None:
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=steps, **more))


class Shrinkable:
    """A judge whose faults hypothesis can shrink to the shortest sequence: pytest's own outcomes it lets through."""

    def __init__(self, judge) -> None:
        self.judge = judge

    def __getattr__(self, name):
        def check(*arguments):
            try:
                return getattr(self.judge, name)(*arguments)
            except Discrepancy as fault:
                raise AssertionError(str(fault)) from None

        return check


def test_contents_are_preserved(judge, tmp_path):
    """Without a model, whatever is done: each vector is read back as it was stored, or as its packing says."""
    run(lambda: Contents(judge, tmp_path), examples=60, steps=25)


# -- what the model says


class Run(list):
    """The tokens of a call, or of some in a row, and what was chosen for them: selections as sets of positions, bool [n, T];
    routings as experts [n, k]."""

    def __init__(self, tokens, choices) -> None:
        super().__init__(tokens)
        self.choices = choices

    def __delitem__(self, rows) -> None:
        super().__delitem__(rows)
        self.choices = {stage: np.delete(choice, rows, axis=0) for stage, choice in self.choices.items()}

    def followed_by(self, other: "Run") -> "Run":
        joined = {}
        for stage, parts in ((s, [self.choices[s], other.choices[s]]) for s in other.choices if s in self.choices):
            width = max(part.shape[1] for part in parts)
            joined[stage] = np.concatenate([np.pad(p, ((0, 0), (0, width - p.shape[1]))) for p in parts])
        return Run([*self, *other], joined or other.choices)


def choices_of(chosen, row: int, count: int, pads: int, length: int):
    """Of a row of a batch, of its next `count` tokens, behind which it has `length`; in the row's own positions."""
    own = {}
    for stage, choice in chosen.items():
        if not stages.is_selection(stage):
            own[stage] = choice[row, :count]
        elif choice is None:
            own[stage] = np.ones((count, length), bool)
        else:
            columns = int(choice.max()) + 1
            own[stage] = as_sets(choice[row, :count], max(columns, pads + length))[:, pads : pads + length]
    return own


class Conversation:
    """A cache of each layer, and how it came to be: runs of tokens, and the moment of quantizing.

    `exact`: the runs are the very calls that made the cache, so that repeating them must give the same bits.
    """

    def __init__(self, cache, options) -> None:
        self.cache, self.options = cache, options
        self.history: list = []
        self.exact = True

    @property
    def tokens(self) -> int:
        return sum(len(run) for run in self.history if isinstance(run, list))

    def copy(self, cache) -> "Conversation":
        twin = Conversation(cache, self.options)
        twin.history, twin.exact = copy.deepcopy(self.history), self.exact
        return twin

    def trim(self, tokens: int) -> None:
        for run in reversed([run for run in self.history if isinstance(run, list)]):
            gone = min(tokens, len(run))
            if gone < len(run) and gone:
                self.exact = False
            del run[len(run) - gone :]
            tokens -= gone
        self.history = [step for step in self.history if step != []]

    @property
    def is_packed(self) -> bool:
        return self.cache[0].quantization is not None


class ReadBack(LayerCache):
    """A float cache of what a packed one reads back, which rounds what is appended as that one would."""

    def __init__(self, packed: LayerCache) -> None:
        super().__init__(packed.widths, model=packed.model)
        assert packed.quantization is not None
        self.packing = packed.quantization
        if packed.length:
            self.latents.append(packed.latents.read())
            if packed.has_indexer:
                self.index_keys.append(*packed.index_keys.read())

    def append(self, joined):
        return super().append(self.packing.rounded(joined) if self.length >= self.packing.start else joined)


class Conversations(RuleBasedStateMachine):
    def __init__(self, case: Case, judge, folder, options) -> None:
        super().__init__()
        self.case, self.judge, self.folder, self.options = case, Shrinkable(judge), folder, options
        self.model, self.group = case.ours.model, group_size(case.args)
        self.random = np.random.default_rng(0)
        # Two of unequal length, one almost at index_topk: few short runs would rarely get there.
        self.all = [self.begun(case.args.index_topk - 3), self.begun(5)]

    def begun(self, length: int) -> Conversation:
        row = self.fresh()
        row.history.append(self.feed(row.cache, self.case.tokens(length)[0].tolist()))
        return row

    def fresh(self) -> Conversation:
        return Conversation(self.model.make_cache(**self.options), self.options)

    def some(self, count: int) -> list[int]:
        return self.random.integers(3, self.case.args.vocab_size, count).tolist()

    def call(self, tokens, cache):
        """The model on int [B, S]: what it chose, by stage."""
        chosen = {}

        def listener(stage, value):
            if stage.endswith(".topk"):
                chosen[stage] = value
            return value

        with trace.listen(self.model, listener):
            mx.eval(self.model(mx.array(tokens), cache), [v for v in chosen.values() if v is not None])
        return {stage: to_numpy(value) for stage, value in chosen.items()}

    def feed(self, cache, tokens) -> Run:
        chosen = self.call([tokens], cache)
        return Run(tokens, choices_of(chosen, 0, len(tokens), 0, cache[0].length))

    def replay(self, row: Conversation, what: str = ""):
        """The same tokens run afresh. what: under the same choices, each held to what is chosen now; as it stands elsewhere."""
        cache, at = self.model.make_cache(**row.options), 0
        for step in row.history:
            if not isinstance(step, Run):
                cache = [c.to_quantized(self.group, 8, step) for c in cache]
            elif what:
                self.feed_under(cache, step, at, what)
                at += len(step)
            else:
                mx.eval(self.model(mx.array([step]), cache))
        return cache

    def feed_under(self, cache, run: Run, at: int, what: str) -> None:
        width, topk, given = at + len(run), self.case.args.index_topk, {}
        for stage, choice in run.choices.items():
            if not stages.is_selection(stage):
                given[stage] = choice[None]
            elif width > topk:
                sets = np.pad(choice, ((0, 0), (0, max(0, width - choice.shape[1]))))[:, :width]
                unseen = np.arange(width)[None] > at + np.arange(len(run))[:, None]
                given[stage] = filled(sets, unseen, topk)[None]
        seen = self.case.ours.forward(np.array([run]), cache, given)
        self.judge_choices(f"{self.case.name}", what, given, seen)

    def judge_choices(self, name: str, what: str, ours, seen) -> None:
        """ours: choices; seen: the stages of the run that they are held to."""
        reference = self.case.reference(self.case.long)
        for stage, choice in ours.items():
            values = seen.__getitem__
            decision = of_stage(stage, self.case.args, values, lambda s: reference.bound(s, False), self.case.weights)
            self.judge.selection(name, f"{stage} ({what})", choice, seen[stage], decision)

    def check(self, row: Conversation, what: str) -> None:
        """What the model says next, here and after the same tokens run afresh.

        Under other cuts a packed cache may differ by a step here and there, and routing near a tie then amplifies that:
        there it is held to the first layer's contents, which no choice comes before, and to what it reads back.
        """
        again = self.replay(row, "" if row.exact or row.is_packed else what)
        if row.is_packed and not row.exact:
            self.check_first_layer(row, again, what)
            again = [ReadBack(cache) for cache in row.cache]
        probe, mine = np.array([[PROBE]]), copy.deepcopy(row.cache)
        ref = self.case.ours.forward(probe, again)
        chosen = {s: v for s, v in ref.items() if s.endswith(".topk") and v is not None}
        ours = self.case.ours.forward(probe, mine, {} if row.exact or row.is_packed else chosen)
        name, length = f"{self.case.name}{', packed' if row.is_packed else ''}", row.tokens + 1
        if row.exact or row.is_packed:
            stage = f"logits ({what}, {'same cuts' if row.exact else 'on what is read back'})"
            self.judge.values(name, stage, ours["logits"], ref["logits"], 0.0)
            return
        bound = self.case.reference(self.case.long).bound("logits", local=False)
        lengths = {v.shape[-1] for s, v in ref.items() if s.endswith("indexer.scores")}
        self.judge.holds(
            name, "indexer scores", lengths <= {length}, f"one score for each of {length} tokens ({lengths})"
        )
        self.judge_choices(name, what, {s: ours[s] for s in chosen}, ref)
        self.judge.values(name, f"logits ({what}, other cuts)", ours["logits"], ref["logits"], bound)

    def check_first_layer(self, row: Conversation, again, what: str) -> None:
        """Each value within a rounding step of the fresh run's, and all but one in fifty within float noise of it."""
        if not row.tokens:
            return
        ours, ref = (to_numpy(caches[0].latents.read()) for caches in (row.cache, again))
        stage, name = f"layers.0.cache ({what}, other cuts)", f"{self.case.name}, packed"
        reference = self.case.reference(self.case.long)
        stages = [f"layers.0.self_attn.{part}" for part in ("kv_latent", "k_rope")]
        noise = max(reference.bound(s, local=False).absolute(reference.hf[s]) for s in stages)
        step = 2 * bounds.packing_error(ref, self.group, 8) + noise
        apart = np.abs(ours - ref)
        self.judge.at_most(name, stage, float((apart / step).max()), 1.0, "largest difference / a rounding step")
        self.judge.at_most(name, stage, float((apart > noise).mean()), 0.02, "share of values that differ at all")
        keys = [to_numpy(caches[0].index_keys.read()[0]) for caches in (row.cache, again)]
        bound = reference.bound("layers.0.self_attn.indexer.k", local=False)
        self.judge.values(name, f"layers.0.cache.index_keys ({what}, other cuts)", *keys, bound)

    @rule(row=st.integers(0, 3), count=st.sampled_from([1, 1, 2, 5, 13, 30]))
    def run(self, row, count) -> None:
        row = self.all[row % len(self.all)]
        if row.tokens + count > 120:
            return
        row.history.append(self.feed(row.cache, self.some(count)))
        self.check(row, "run")

    @rule(row=st.integers(0, 3), count=st.integers(0, 15))
    def trim(self, row, count) -> None:
        row = self.all[row % len(self.all)]
        count = min(count, row.tokens)
        for cache in row.cache:
            cache.trim(count)
        row.trim(count)
        self.check(row, "trim")

    @precondition(lambda self: any(not row.is_packed for row in self.all))
    @rule(start=st.sampled_from([0, 0, 20]))
    def quantize(self, start) -> None:
        row = next(row for row in self.all if not row.is_packed)
        row.cache = [c.to_quantized(self.group, 8, start) for c in row.cache]
        row.history.append(start)
        self.check(row, "quantize")

    @precondition(lambda self: len(self.all) < 4)
    @rule(row=st.integers(0, 3), how=st.sampled_from(["new", "copy", "state", "file"]))
    def another(self, row, how) -> None:
        row = self.all[row % len(self.all)]
        if how == "new":
            self.all.append(self.fresh())
            return
        self.all.append(row.copy([remade(cache, how, self.folder) for cache in row.cache]))
        self.check(self.all[-1], how)

    @rule(data=st.data(), lengths=st.lists(st.integers(0, 9), min_size=4, max_size=4), decoded=st.integers(0, 3))
    def through_a_batch(self, data, lengths, decoded) -> None:
        rows = [self.all[i] for i in data.draw(picks(len(self.all)))]
        first = rows[0].cache[0].quantization
        rows = [row for row in rows if row.cache[0].quantization == first and row.tokens <= 100]
        if not rows:
            return
        batch = [LayerCache.merge(layers) for layers in zip(*(row.cache for row in rows), strict=True)]
        lengths = lengths[: len(rows)]
        chunks, runs = [self.some(n) for n in lengths], [Run([], {}) for _ in rows]

        def step(tokens, counts) -> None:
            pads = list(batch[0].left_padding or [0] * len(rows))
            chosen = self.call(tokens, batch)
            for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
                length = row.tokens + len(runs[i]) + count
                own = Run(tokens[i][:count], choices_of(chosen, i, count, pads[i], length))
                runs[i] = runs[i].followed_by(own)

        if longest := max(lengths):
            for cache in batch:
                cache.prepare(lengths=lengths, right_padding=[longest - n for n in lengths])
            step([c + [0] * (longest - len(c)) for c in chunks], lengths)
            for cache in batch:
                cache.finalize()
        for _ in range(decoded):
            step([self.some(1) for _ in rows], [1] * len(rows))
        keep = data.draw(st.permutations(range(len(rows))))[: data.draw(st.integers(1, len(rows)))]
        for cache in batch:
            cache.filter(keep)
        for i, kept in enumerate(keep):
            row = rows[kept]
            row.cache = [cache.extract(i) for cache in batch]
            if runs[kept]:
                row.history.append(runs[kept])
                row.exact = False
            self.check(row, "batch")


@pytest.mark.any_layout
@pytest.mark.needs("packable", "shared")
@pytest.mark.parametrize("start", [None, 0, 20])
def test_a_model_goes_on_as_after_a_fresh_run(case: Case, judge, tmp_path, start):
    """Same cuts: the same bits. Other cuts, or batched: within the bound, and the same selections but for ties; packed, the
    first layer's contents but for rounding steps, and exactly what a float cache of what is read back says."""
    options = (
        {} if start is None else {"kv_bits": 8, "kv_group_size": group_size(case.args), "quantized_kv_start": start}
    )
    examples = 4 if case.args.index_topk <= TOPK else 1  # long prompts cost four times as much
    run(lambda: Conversations(case, judge, tmp_path, options), examples, steps=10)


PADS, START = [3, 0], 4


@pytest.mark.parametrize("how", ["made so", "prepared", "packed later"])
def test_rows_are_packed_from_their_own_token_on(judge, how):
    """In a left-padded batch, whichever way the cache learns of pads and packing."""
    quantization, first = KvQuantization(8, 32, START), 200_000
    vectors, keys = (np.random.default_rng(0).standard_normal((2, 12, w)).astype(np.float32) for w in (96, 6))
    cache = LayerCache(Widths(64, 32, 6), None if how == "packed later" else quantization,
                       None if how == "prepared" else PADS, first)  # fmt: skip
    if how == "prepared":
        cache.prepare(left_padding=PADS)
    for rows in (slice(0, 5), slice(5, 12)):
        cache.append_index_keys(mx.array(keys[:, rows]))
        cache.append(mx.array(vectors[:, rows]))
    if how == "packed later":
        cache = cache.to_quantized(group_size=32, bits=8, start=START)
    due = vectors.copy()
    for row, pads in enumerate(PADS):
        due[row, pads + START :] = to_numpy(quantization.rounded(mx.array(vectors[row, pads + START :])))
    judge.values("vectors", f"padded batch, {how}", to_numpy(cache.latents.read()), due, 0.0)
    after = [first + 12 - pads for pads in PADS]
    judge.holds("vectors", "offset", np.array(cache.offset).tolist() == after, f"the next positions are {after}")
    is_whole = cache.is_trimmable() and cache.size() == 12 and not cache.empty()
    judge.holds("vectors", "size", is_whole, "12 columns, which can be trimmed")
    with pytest.raises(CacheError, match="packed"):
        cache.to_quantized(group_size=32, bits=4)
    judge.holds("vectors", "packing", cache.quantization == quantization, "other bits are refused, and change nothing")


@pytest.mark.needs("indexer")
@pytest.mark.any_layout
def test_a_cache_of_other_conventions_is_refused(case: Case, judge):
    """Its keys were turned another way."""
    other = {"interleaved": "half-split", "half-split": "interleaved"}[case.args.indexer_rope]
    cache = Ours(case.folder, **{**case.spec.overrides, "indexer_rope": other}).model.make_cache()
    with pytest.raises(CacheError, match="weights or conventions differ"):
        case.ours.model(mx.array(case.tokens(5)), cache)
    judge.holds(case.name, "cache", cache[0].empty(), "refused before anything is written")
