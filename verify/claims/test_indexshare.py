"""IndexShare: for any valid schedule, the model equals HF and a shared layer uses what its full layer selected."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import glm_dsa
from glm_dsa import trace
from reference import checkpoints, hf
from reference.capture import capture
from reference.equations import Conventions, Equations, schedule
from verify.cases import Case
from verify.core import bounds, compare
from verify.core.choices import of_keys
from verify.engines.definition import to_numpy

CLAIM = "IndexShare, any schedule"
TOPK, LENGTH = 8, 40


@st.composite
def schedules(draw):
    """Config keys of a valid schedule: explicit types, a pattern (string or list), or frequency and offset."""
    layers = draw(st.integers(2, 6))
    kind = draw(st.sampled_from(["types", "pattern", "letters", "rule", "mixed"]))
    rest = draw(st.lists(st.sampled_from(["full", "shared"]), min_size=layers - 1, max_size=layers - 1))
    types = ["full", *rest]
    rule = {"index_topk_freq": draw(st.integers(1, 5)), "index_skip_topk_offset": draw(st.integers(1, 4))}
    keys = {
        "types": {"indexer_types": types},
        "pattern": {"index_topk_pattern": types},
        "letters": {"index_topk_pattern": "".join(t[0].upper() for t in types)},
        "rule": rule,
        "mixed": {"indexer_types": types, **rule},  # the list beats the rule
    }[kind]
    return layers, keys


def build(layers, keys, layout, seed=0):
    """HF and ours with the same trained-like weights; dense feed-forward, so that selections are all that differs."""
    config = checkpoints.tiny(
        num_hidden_layers=layers, first_k_dense_replace=layers, index_topk=TOPK, num_nextn_predict_layers=0,
        indexer_rope_interleave=layout == "interleaved", **keys,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        theirs = hf.build(config)
        checkpoints.trained_like(theirs)
    conventions = Conventions(indexer_rope=layout)
    hf.apply(theirs, conventions)
    ours = glm_dsa.Model(glm_dsa.ModelArgs.from_dict(config))
    named = {n: p.detach().numpy() for n, p in theirs.state_dict().items()}
    ours.load_weights(list(ours.sanitize({n: mx.array(p) for n, p in named.items()}).items()))
    return config, conventions, theirs, ours, named


@pytest.mark.parametrize("layout", ["interleaved", "half-split"])
def test_any_schedule_equals_hf(judge, layout):
    @settings(max_examples=20)
    @given(schedules(), st.integers(0, 2**16), st.sampled_from([TOPK - 2, LENGTH, LENGTH]))
    def check(drawn, seed, length):
        layers, keys = drawn
        config, conventions, theirs, ours, named = build(layers, keys, layout, seed)
        tokens = np.random.default_rng(seed).integers(3, config["vocab_size"], (1, length))
        with capture(theirs) as seen:
            hf.forward(theirs, tokens)
        chosen = {s: v for s, v in seen.items() if s.endswith(".topk")}
        truth = Equations(config, lambda n: named[n].astype(np.float64), conventions, chosen)
        truth.forward(tokens)
        name = f"{layout}, {keys}"
        full = [i for i in range(layers) if ours.args.runs_indexer(i)]
        judge.holds(
            name,
            "indexer schedule",
            full == [i for i, f in enumerate(schedule(config)) if f],
            f"full layers {full}, as the rule says",
        )
        holders = [i for i in range(layers) if f"layers.{i}.self_attn.indexer.topk" in seen]
        judge.holds(name, "indexer schedule", full == holders, f"full layers {full}, as HF built them")

        cache = ours.make_cache()
        injected = {s: mx.array(v) for s, v in chosen.items()} if length > TOPK else {}
        with trace.capture(ours, injected) as mine:
            ours(mx.array(tokens), cache)
        errors = bounds.reference_errors(seen, truth.stages)
        bound = bounds.bound(errors["logits"], seen["logits"], 96)
        judge.values(name, "logits", to_numpy(mine["logits"]), seen["logits"], bound)
        for layer in full:
            stage = f"layers.{layer}.self_attn.indexer."
            scores = seen[stage + "scores"]
            noise = bounds.bound(errors[stage + "scores"], scores, 96).absolute(scores)
            decision = of_keys(scores, TOPK, noise)
            judge.selection(name, stage + "topk", to_numpy(mine[stage + "topk"]), seen[stage + "topk"], decision)
        no_indexer = all(("indexer" in layer.self_attn) == (i in full) for i, layer in enumerate(ours.layers))
        judge.holds(name, "weights", no_indexer, "a shared layer holds no indexer weights")
        keyless = all((c.index_keys.length > 0) == (i in full) for i, c in enumerate(cache))
        judge.holds(name, "cache", keyless, "a shared layer caches no indexer keys")

    check()


def owner(args, layer: int) -> int:
    return max(i for i in range(layer + 1) if args.runs_indexer(i))


def test_every_layer_uses_its_full_layers_selection(judge):
    """In prefill, in chunks and in decode."""

    @settings(max_examples=12)
    @given(schedules(), st.lists(st.integers(1, 17), min_size=1, max_size=5))
    def check(drawn, cuts):
        layers, keys = drawn
        _, _, _, ours, _ = build(layers, keys, "interleaved")
        cache, random = ours.make_cache(), np.random.default_rng(layers)
        for cut in [12, *cuts, 1]:
            with trace.capture(ours) as seen:
                ours(mx.array(random.integers(3, 160, (1, cut))), cache)
            for layer in range(layers):
                used = to_numpy(seen[f"layers.{layer}.self_attn.selection"])
                made = to_numpy(seen[f"layers.{owner(ours.args, layer)}.self_attn.indexer.topk"])
                same = (used is None) == (made is None) and (used is None or np.array_equal(used, made))
                judge.holds(
                    str(keys),
                    f"layers.{layer}.self_attn.selection",
                    same,
                    f"is that of layer {owner(ours.args, layer)}, chunk of {cut}",
                )
        lengths = {c.length for c in cache} | {c.index_keys.length for c in cache if c.has_indexer}
        judge.holds(
            str(keys), "cache", lengths == {cache[0].length}, "latent and indexer keys are equally long on every layer"
        )

    check()


def test_an_indexer_serves_exactly_the_layers_that_share_it(judge):
    """Turn one full layer's indexer around, hold every layer's input fixed: its sharers' selections change, no others."""

    @settings(max_examples=12)
    @given(schedules(), st.randoms(use_true_random=False))
    def check(drawn, random):
        layers, keys = drawn
        _, _, theirs, ours, _ = build(layers, keys, "interleaved")
        tokens = np.random.default_rng(layers).integers(3, 160, (1, LENGTH))
        with capture(theirs) as reference:
            hf.forward(theirs, tokens)
        fixed = {f"layers.{i}.output": mx.array(reference[f"layers.{i}.output"]) for i in range(layers)}
        changed = random.choice([i for i in range(layers) if ours.args.runs_indexer(i)])

        def used():
            with trace.capture(ours, fixed) as seen:
                ours(mx.array(tokens))
            return [
                compare.as_sets(to_numpy(seen[f"layers.{i}.self_attn.selection"]), LENGTH)[:, TOPK:]
                for i in range(layers)
            ]

        before = used()
        indexer = ours.layers[changed].self_attn.indexer
        indexer.weights_proj.weight = -indexer.weights_proj.weight
        after = used()
        for layer in range(layers):
            differs = not np.array_equal(before[layer], after[layer])
            shares = owner(ours.args, layer) == changed
            judge.holds(
                str(keys), f"layers.{layer}.self_attn.selection", differs == shares,
                f"{'changes' if shares else 'does not change'} with the indexer of layer {changed}",
            )  # fmt: skip

    check()


@pytest.mark.needs("shared")
def test_shared_layers_hold_nothing_of_an_indexer(case: Case, judge):
    model = case.ours.model
    for i, (layer, cache) in enumerate(zip(model.layers, model.make_cache(), strict=True)):
        full = case.args.runs_indexer(i)
        judge.holds(
            case.name,
            f"layers.{i}",
            ("indexer" in layer.self_attn) == full == cache.has_indexer,
            "indexer and its cache on full layers only",
        )
