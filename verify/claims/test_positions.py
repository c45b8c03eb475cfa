"""Far positions: a small cache that starts at 200k and at 1M."""

import mlx.core as mx
import numpy as np
import pytest

from reference import hf
from reference.capture import capture
from verify.cases import Case
from verify.core import bounds, stages
from verify.engines.definition import to_numpy

CLAIM = "positions of 200k and 1M"
ROTATED = ("self_attn.q_rope", "self_attn.k_rope", "self_attn.indexer.q", "self_attn.indexer.k")


@pytest.mark.parametrize("length", [14, 64], ids=["within index_topk", "beyond index_topk"])
@pytest.mark.parametrize("start", [200_000, 1_000_000])
def test_far_positions(case: Case, judge, start, length):
    """At a million radians float32 keeps one digit after the point: the bound follows HF's own error there.

    Choices are injected: with angles this coarse, near ties flip. After the prefill the last tokens are decoded again, one
    by one, from the rewound cache.
    """
    length = case.scaled([length])[0]
    tokens = case.tokens(length)
    positions = start + np.arange(length)[None]
    with capture(case.hf) as seen:
        hf.forward(case.hf, tokens, positions=positions)
    is_sparse = 0 < case.args.index_topk < length
    equations = case.equations(stages.choices(seen, is_sparse=True))
    equations.forward(tokens, positions)
    errors = bounds.reference_errors(seen, equations.stages)

    explained = bounds.explained_at(start + length)
    model, cache = case.ours.model, case.ours.model.make_cache(start=start)
    injected = stages.choices(seen, is_sparse)
    with case.ours.captured(injected) as ours:
        model(mx.array(tokens), cache)
    judge.holds(case.name, "cache", cache[0].offset == start + length, f"the next position is {start + length}")
    for stage in stages.in_order(s for s in seen if (stages.kind(s) in ROTATED or s == "logits") and s in ours):
        bound = bounds.bound(errors[stage], seen[stage], max(case.longest, length), explained=explained)
        judge.values(case.name, f"{stage} at {start}", to_numpy(ours[stage]), seen[stage], bound)

    for layer_cache in cache:
        layer_cache.trim(3)
    decoded = []
    for i in range(length - 3, length):
        with case.ours.captured({stage: choices[:, i : i + 1] for stage, choices in injected.items()}) as ours:
            decoded.append(to_numpy(model(mx.array(tokens[:, i : i + 1]), cache)))
        for stage in (s for s in stages.in_order(s for s in seen if stages.kind(s) in ROTATED) if s in ours):
            bound = bounds.bound(errors[stage], seen[stage], max(case.longest, length), explained=explained)
            ref = seen[stage][:, i : i + 1]
            judge.values(case.name, f"{stage} decoded at {start}", to_numpy(ours[stage]), ref, bound)
    for layer, layer_cache in enumerate(cache):
        if layer_cache.has_indexer:
            stage = f"layers.{layer}.self_attn.indexer.k"
            bound = bounds.bound(errors[stage], seen[stage], max(case.longest, length), explained=explained)
            held = to_numpy(layer_cache.index_keys.read()[0])
            judge.values(case.name, f"layers.{layer}.cache.index_keys at {start}", held, seen[stage], bound)
    bound = bounds.bound(errors["logits"], seen["logits"], max(case.longest, length), explained=explained)
    judge.values(case.name, f"logits decoded at {start}", np.concatenate(decoded, 1), seen["logits"][:, -3:], bound)
