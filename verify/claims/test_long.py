"""Selections behind 32k tokens of context, on a trained checkpoint: `pytest verify/ --long`.

What each full layer is given is made by the model itself, in windows; then its indexer selects for a few stretches of queries
among all the tokens before them, in tiles of keys, and is held to the equations.
"""

import mlx.core as mx
import numpy as np
import pytest
import torch

from glm_dsa.mask import CausalMask
from reference import corpus
from reference.capture import capture
from reference.kept import probes
from verify.cases import Case, trained_specs
from verify.core import bounds, compare
from verify.core.choices import of_keys
from verify.engines.definition import in_tiles_of, to_numpy

CLAIM = "selections behind 32k tokens"
TOKENS, WINDOW, STRETCH = 32768, 1024, 48
STARTS = (4096 - 7, 16384, TOKENS - STRETCH)


@pytest.fixture(scope="module")
def long(request, tmp_path_factory):
    """(case, what its full layers are given)."""
    if not request.config.getoption("--long"):
        pytest.skip("takes 3 minutes: add --long")
    case = Case(trained_specs()[0], tmp_path_factory.mktemp("long"), request.config.getoption("--seed"))
    return case, given(case, case.seed)


class KeysOf:
    """HF's cache, as far as its indexer asks for it: it holds the keys of all tokens."""

    def __init__(self, keys: np.ndarray) -> None:
        self.keys = torch.from_numpy(keys.astype(np.float32))

    def update_indexer(self, *_):
        return self.keys


def given(case: Case, seed: int) -> dict[int, np.ndarray]:
    """Full layer -> what comes into its attention, [1, T, hidden]: of texts, window by window."""
    random, texts = np.random.default_rng(seed), [corpus.encode(text) for text in probes()["texts"]]
    windows = []
    for _ in range(TOKENS // WINDOW):
        text = texts[random.integers(len(texts))]
        begin = random.integers(len(text) - WINDOW + 1)
        windows.append(text[begin : begin + WINDOW])
    layers = [i for i in range(case.args.num_hidden_layers) if case.args.runs_indexer(i)]
    seen: dict[int, list[np.ndarray]] = {i: [] for i in layers}
    for window in windows:
        with case.ours.captured() as shown:
            mx.eval(case.ours.model(mx.array(window[None])))
        for i in layers:
            seen[i].append(to_numpy(shown[f"layers.{i}.input_layernorm"]))
        shown.clear()
    return {i: np.concatenate(parts, axis=1) for i, parts in seen.items()}


@pytest.mark.parametrize("elements", [1 << 20, 1 << 24], ids=["many tiles", "few tiles"])
def test_selections(judge, long, monkeypatch, elements):
    case, inputs = long
    args, model = case.args, case.ours.model
    in_tiles_of(monkeypatch, elements)
    for layer, x in inputs.items():
        attention, cache, done = model.layers[layer].self_attn, model.make_cache()[layer], 0
        for start in STARTS:
            rows = slice(start, start + STRETCH)
            end = rows.stop
            rotation = model.model._rotary(mx.arange(done, end))
            keys = attention.indexer.keys_so_far(mx.array(x[:, done:end]), rotation, cache)
            done = end
            asking = mx.array(x[:, rows])
            latent = attention.query_latent(asking)
            mask = CausalMask(start, STRETCH)
            ours = attention.indexer(asking, latent, keys, model.model._rotary(mx.arange(start, end)), mask)
            q_latent = to_numpy(latent)
            positions = np.arange(end)[None]
            allowed = positions <= np.arange(start, end)[:, None]
            equations = case.equations()
            truth = equations.scores(layer, x[:, :end].astype(np.float64), q_latent.astype(np.float64), positions,
                                     allowed[None], rows)  # fmt: skip
            seen = hf_scores(case, layer, x[:, rows], q_latent, positions[:, rows], allowed,
                             equations.stages[f"layers.{layer}.self_attn.indexer.k"])  # fmt: skip
            error = compare.values(seen, truth).error
            noise = bounds.bound(error, seen, args.index_head_dim, explained=bounds.explained_at(end)).absolute(seen)
            name = f"{case.name}, {start} tokens before"
            due = np.argsort(-truth, axis=-1, kind="stable")[..., : args.index_topk]
            stage, decision = f"layers.{layer}.self_attn.indexer.topk", of_keys(truth, args.index_topk, noise)
            judge.selection(name, stage, to_numpy(ours), due, decision)


def hf_scores(case: Case, layer, x, q_latent, positions, allowed, keys) -> np.ndarray:
    """HF's, of these queries against these keys (of which HF keeps the two halves of a rotated pair apart)."""
    rope = case.args.qk_rope_head_dim
    keys = np.concatenate([keys[..., 0:rope:2], keys[..., 1:rope:2], keys[..., rope:]], axis=-1)
    indexer = case.hf.model.layers[layer].self_attn.indexer
    turned = case.hf.model.rotary_emb(torch.from_numpy(x), torch.from_numpy(positions))
    mask = torch.where(torch.from_numpy(allowed), 0.0, torch.finfo(torch.float32).min)[None]
    with capture(case.hf) as seen:
        indexer(*map(torch.from_numpy, (x, q_latent)), turned, mask, torch.from_numpy(positions), KeysOf(keys))
    return next(v for s, v in seen.items() if s.endswith("indexer.scores"))
