"""The whole model at the sizes in use, against HF: chunks of 2048, calls of every length, 16 rows, contexts of 200,000.

At tiny widths, on checkpoints of their own: 8 of 32 experts for each token; selections of 64 keys, of 2048 as published, or none at
all. The indexer works in tiles, as it does for users.
"""

import mlx.core as mx
import pytest

from reference import checkpoints
from verify.cases import Case, Spec
from verify.claims.behind import Behind, Held
from verify.claims.replay import Row, hold
from verify.claims.test_mtp import check
from verify.core import sizes
from verify.engines.definition import to_numpy

CLAIM = "sizes in use"
LEAN = {
    "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 8, "q_lora_rank": 24, "kv_lora_rank": 32,
    "qk_rope_head_dim": 32, "qk_nope_head_dim": 12, "v_head_dim": 12, "num_attention_heads": 2, "num_key_value_heads": 2,
    "n_routed_experts": 32, "num_experts_per_tok": 8, "first_k_dense_replace": 1,
}  # fmt: skip
INDEXED = {"qk_head_dim": 44, "index_head_dim": 40, "index_n_heads": 4, "num_hidden_layers": 3,
           "indexer_types": ["full", "shared", "full"]}  # fmt: skip
FEW_KEYS, MANY_KEYS, ALL_KEYS = "64 keys selected", "2048 keys selected", "every key"
SPECS = [
    Spec(FEW_KEYS, checkpoints.tiny(**LEAN, **INDEXED, index_topk=64), {"indexer_rope": "interleaved"}),
    Spec(MANY_KEYS, checkpoints.tiny(**LEAN, **INDEXED, index_topk=2048), {"indexer_rope": "half-split"}),
    Spec(ALL_KEYS, checkpoints.glm_4_7(**LEAN, num_hidden_layers=2, num_nextn_predict_layers=0)),
]

CHUNK, FEW = 2048, 72  # what mlx-lm prefills at a time; and the rest of a prompt
CUTS = {
    "one prompt": [CHUNK + FEW],
    "a chunk behind a cache": [FEW, CHUNK],
    "chunks of 512": [512, 512, 512, 512, FEW - 2, 1, 1],
    "calls of every length": [*sizes.EVERY_LENGTH, CHUNK + FEW - sum(sizes.EVERY_LENGTH)],
}
CONTEXTS = (16_380, 65_532, 131_068, 200_000)
HEARD = ("topk", "weights", "heads", "output", "experts", "mlp_output", "logits")


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_chunks(case: Case, judge, cuts):
    hold(case, judge, "cuts", [Row(case.reference(sum(cuts)))], lambda replay: replay(*cuts))


@pytest.mark.parametrize("rows", [2, 16])
def test_batches(case: Case, judge, rows):
    """A quarter of them behind pads; the first cut a little beyond 64 keys, where selections are not gathered yet."""
    padded = max(rows // 4, 1)
    long, short = case.reference(200, rows - padded), case.reference(150, padded)
    every = [Row(long, of=i) for i in range(rows - padded)]
    every += [Row(short, 50, of=i, name="padded") for i in range(padded)]
    hold(
        case,
        judge,
        f"batch of {rows}",
        every,
        lambda replay: replay(68, 129, 1, 2),
        left_padding=[row.pad for row in every],
    )


@pytest.mark.on(FEW_KEYS)
@pytest.mark.parametrize("context", CONTEXTS[:-1])
def test_contexts(case: Case, judge, gate, context):
    check_context(case, judge, gate, context)


def test_the_longest_context(case: Case, judge, gate):
    check_context(case, judge, gate, CONTEXTS[-1])


def check_context(case: Case, judge, gate, context):
    """A few tokens behind many: each stage, on a cache that was filled with what HF's and the equations' hold too."""
    reference = Behind(case, context, 8)
    cache = reference.held.fill(case.ours.model.make_cache())
    ours = case.ours.forward(reference.tokens, cache, reference.injections, HEARD)
    batch, queries = reference.tokens.shape
    gate.ran(**sizes.of_call(case.args, batch, queries, cache[0].length - reference.length))
    judge.stages(ours, reference, local=False, replaced=reference.injections)


@pytest.mark.on(FEW_KEYS)
@pytest.mark.parametrize("context", CONTEXTS[::3])
def test_packed_contexts(case: Case, judge, context):
    """A packed cache, beside one that holds what is read back of it."""
    tokens, held, model = mx.array(case.tokens(9)), Held(case, context), case.ours.model
    packed, plain = model.make_cache(kv_bits=8, kv_group_size=32), model.make_cache()
    for layer_cache, like in zip(plain, packed, strict=True):
        assert like.quantization is not None
        append, rounded = layer_cache.append, like.quantization.rounded
        layer_cache.append = lambda joined, append=append, rounded=rounded: append(rounded(joined))  # type: ignore[method-assign, misc]
    for cache in (packed, plain):
        held.fill(cache)
    for part in (slice(0, 8), slice(8, 9)):
        ours, due = (to_numpy(model(tokens[:, part], cache)) for cache in (packed, plain))
        judge.values(case.name, f"logits (packed, {context} before)", ours, due, 0.0)


@pytest.mark.on(FEW_KEYS)
def test_drafts(case: Case, judge):
    """The MTP layer, after a prompt of a chunk; and more drafts at a time than anybody asks for, across index_topk."""
    check(case, judge, CHUNK, {}, count=1, rows=1)
    check(case, judge, case.args.index_topk - 4, {}, count=9, rows=16)
    check(case, judge, case.args.index_topk + 20, {"mtp_reuses_selection": True}, count=2, rows=16)
    pads, model = list(range(16)), case.ours.model
    cache = model.make_mtp_cache(left_padding=pads)
    judge.holds(case.name, "mtp cache", cache.left_padding == pads, f"of 16 rows (found pads: {cache.left_padding})")
    at = model.make_mtp_cache(start=131_073).offset
    judge.holds(case.name, "mtp cache", at == 131_073, f"begins behind 131,073 tokens (found: {at:,})")


@pytest.mark.on(FEW_KEYS)
def test_embeddings_in_the_place_of_tokens(case: Case, judge):
    tokens, model = mx.array(case.tokens(CHUNK + FEW)), case.ours.model
    cache, own = model.make_cache(), model.make_cache()
    for part in (slice(0, CHUNK), slice(CHUNK, CHUNK + FEW), slice(0, 1)):
        given = tokens[:, part]
        handed = model(mx.zeros_like(given), cache, input_embeddings=model.model.embed_tokens(given))
        judge.values(case.name, "logits (embeddings handed in)", to_numpy(handed), to_numpy(model(given, own)), 0.0)
