"""States of caches, and mlx-lm's files of them."""

import importlib
import json

import mlx.core as mx
import pytest
from hypothesis import strategies as st
from mlx_lm.models.cache import save_prompt_cache

import glm_dsa
from reference import checkpoints

from .bounds import RAW, STRUCTURED, TINY, bounded, each, outcome
from .files import bad_header, edited, joined, parted

# wide enough for groups of 32
WIDE = TINY | {"qk_rope_head_dim": 32, "qk_head_dim": 44, "index_head_dim": 40}


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """(a model, its caches after a few tokens: in float, packed, packed in part)."""
    model = glm_dsa.load(checkpoints.write(tmp_path_factory.mktemp("cached") / "ck", WIDE))
    caches = []
    for options in (
        {},
        {"kv_bits": 8, "kv_group_size": 32},
        {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 3},
    ):
        caches.append(model.make_cache(**options))
        mx.eval(model(mx.array([[5, 6, 7, 8, 9]]), caches[-1]))
    return model, caches


def kinds_of(state):
    """What a state is, but for values: nobody can tell those from others."""
    return [(p.dtype, p.shape) if isinstance(p, mx.array) else p for p in state]


ODD_PARTS = st.one_of(
    st.sampled_from(
        ["text", "", 1.5, -1, 10**30, True, float("nan"), [], {}, (), [[]], ["a"], [1.5], [-1], [10**30], object()]
    ),
    st.sampled_from([(0,), (1,), (1, 5), (1, 5, 0), (0, 5, 64), (2, 5, 64), (1, 4, 64), (1, 5, 64, 1), (1, 5, 40)]).map(
        mx.zeros
    ),
    st.tuples(st.sampled_from([64, 40, 16, 8, 2]), st.sampled_from([mx.uint32, mx.int32, mx.float32, mx.bfloat16])).map(
        lambda of: mx.zeros((1, 5, of[0]), of[1])
    ),
)


def test_states_of_caches(cached, tmp_path):
    """A part lost, exchanged, doubled, or of another kind. What is taken is what was given, or no model goes on from it."""
    model, caches = cached
    sound = [[layer.state for layer in cache] for cache in caches]

    @st.composite
    def states(draw):
        kind, layer = draw(st.integers(0, 2)), draw(st.integers(0, 2))
        parts = list(sound[kind][layer])
        at, other = draw(st.integers(0, len(parts) - 1)), draw(st.integers(0, len(parts) - 1))
        how = draw(st.sampled_from(["odd", "odd", "lost", "more", "swapped", "none", "whole", "layer", "kind"]))
        if how == "odd":
            parts[at] = draw(ODD_PARTS)
        elif how == "lost":
            del parts[at]
        elif how == "more":
            parts.insert(at, draw(ODD_PARTS))
        elif how == "swapped":
            parts[at], parts[other] = parts[other], parts[at]
        elif how == "none":
            parts[at] = None
        elif how == "layer":
            parts[at] = sound[kind][(layer + 1) % 3][at]
        elif how == "kind":
            parts[at] = sound[(kind + 1) % 3][layer][at]
        return kind, layer, draw(ODD_PARTS) if how == "whole" else tuple(parts)

    def check(corruption):
        kind, layer, state = corruption
        with bounded(tmp_path):
            cache, refusal = outcome(lambda: glm_dsa.LayerCache.from_state(state))
            if refusal is None:
                caches = [glm_dsa.LayerCache.from_state(s) for s in sound[kind]]
                caches[layer] = cache
                _, refusal = outcome(lambda: mx.eval(model(mx.array([[3]]), caches)))
        if refusal is None:
            assert kinds_of(glm_dsa.LayerCache.from_state(state).state) == kinds_of(sound[kind][layer])

    each(states(), STRUCTURED["state"], check)


def test_prompt_caches(registered, cached, tmp_path):
    """mlx-lm's files of them: headers, metadata, raw bytes."""
    load = importlib.import_module("mlx_lm.generate").load_prompt_cache
    model, caches = cached
    file = tmp_path / "cache.safetensors"
    raws = []
    for cache in caches:
        save_prompt_cache(str(file), cache, {"model": "x"})
        raws.append(file.read_bytes())
    sound = [[kinds_of(layer.state) for layer in cache] for cache in caches]

    @st.composite
    def damaged(draw):
        kind = draw(st.integers(0, 2))
        header, data = parted(raws[kind])
        if draw(st.booleans()):
            return kind, draw(bad_header(raws[kind]))
        return kind, joined(
            draw(edited({"__metadata__": header["__metadata__"]}))[:-1]
            + b","
            + json.dumps({n: e for n, e in header.items() if n != "__metadata__"}).encode()[1:],
            data,
        )

    def check(corruption):
        kind, raw = corruption
        file.write_bytes(raw)
        with bounded(tmp_path):
            found, refusal = outcome(lambda: load(str(file)))
            if refusal is None:
                held = [kinds_of(layer.state) if isinstance(layer, glm_dsa.LayerCache) else layer for layer in found]
                _, refusal = outcome(lambda: mx.eval(model(mx.array([[3]]), found)))
        if refusal is None:
            assert held == sound[kind]

    each(damaged(), STRUCTURED["prompt cache"], check)
    each(st.tuples(st.just(0), st.binary(max_size=200)), RAW["prompt cache"], check)
