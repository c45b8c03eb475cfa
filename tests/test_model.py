"""The model's edges: 16 bit, tied embeddings, mlx-lm's own generation, drafts that are accepted."""

import dataclasses
import json
import re
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step

import glm_dsa
from glm_dsa.errors import CacheError
from glm_dsa.model import parameters_of
from reference import checkpoints, hf
from reference.equations import Conventions
from verify.candidate import in_tiles_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("model") / "ck", checkpoints.glm_5_2())


@pytest.fixture(scope="module")
def model(folder):
    return glm_dsa.load(folder, dtype=mx.float32)


def greedy(model, prompt, count):
    """Without a cache: the whole context again for each token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(mx.argmax(model(mx.array([tokens]))[0, -1])))
    return tokens[len(prompt) :]


def test_bf16_runs_and_stays_bf16(folder, model):
    """Weights as published; scores and routing in float32 inside; no further off than HF in bf16, within index_topk."""
    low = glm_dsa.load(folder)
    tokens = np.random.default_rng(0).integers(3, 160, (1, 60))
    with glm_dsa.trace.capture(low) as seen:
        low(mx.array(tokens))
    assert seen["logits"].dtype == seen["layers.0.output"].dtype == mx.bfloat16
    assert seen["layers.0.self_attn.indexer.scores"].dtype == mx.float32
    assert seen["layers.3.mlp.gate.logits"].dtype == mx.float32
    short = tokens[:, :14]
    exact = np.array(model(mx.array(short)))
    ours = np.array(low(mx.array(short)).astype(mx.float32))
    conventions = Conventions(indexer_rope="interleaved")
    theirs = hf.forward(hf.load(folder, conventions, dtype=torch.bfloat16), short).float().numpy()
    assert np.abs(ours - exact).mean() <= 1.5 * np.abs(theirs - exact).mean()


def test_the_correction_bias_stays_float32(folder):
    low = glm_dsa.load(folder, dtype=mx.float16)
    assert parameters_of(low)["model.layers.3.mlp.gate.e_score_correction_bias"].dtype == mx.float32
    assert parameters_of(low)["lm_head.weight"].dtype == mx.float16
    assert not low.cast_predicate("model.layers.3.mlp.gate.e_score_correction_bias")


def test_mlx_lm_generates_what_the_uncached_run_says(model):
    """60 tokens, from below index_topk to well beyond it, prefilled in chunks of 5."""
    prompt = [7, 8, 9, 10, 11, 12, 13, 14]
    tokens = [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=60, prefill_step_size=5)]
    assert tokens == greedy(model, prompt, 60)


@pytest.fixture(params=[1, 6], ids=["many blocks", "two blocks"])
def small_blocks(monkeypatch, request):
    """Blocks of a few queries, as long prompts have at full width; or two for 60 of them."""
    in_tiles_of(monkeypatch, request.param * 5 * 16 * 60)


def test_gradients_and_compilation_pass_through_blocks(model, small_blocks):
    """Training beyond index_topk, as mlx-lm's LoRA does; nothing in the forward pass may evaluate."""
    tokens = mx.array(np.random.default_rng(0).integers(3, 160, (1, 60)))

    def loss(model):
        return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]).mean()

    value, gradients = nn.value_and_grad(model, loss)(model)
    norms = {n: float(mx.abs(g).max()) for n, g in tree_flatten(gradients) if "layers.8" not in n}
    assert np.isfinite(float(value))
    assert all(np.isfinite(n) for n in norms.values())
    assert norms["model.layers.0.self_attn.q_b_proj.weight"] > 0
    compiled = mx.compile(lambda t: model(t))
    assert np.allclose(np.array(compiled(tokens)), np.array(model(tokens)), atol=1e-4)


def test_gradient_checkpoints_take_a_selection(model):
    """mlx-lm's --grad-checkpoint runs each layer in mx.checkpoint, which differentiates all that is handed in."""
    tokens = mx.array(np.random.default_rng(0).integers(3, 160, (1, 40)))
    x = model.model.embed_tokens(tokens)
    rotation, mask = model.model.rotation_and_mask(40, None)

    def run(parameters, x, selection):
        layer.update(parameters)
        return layer(x, rotation, mask, None, selection)[0].sum()

    selection = model.layers[2](x, rotation, mask)[1]
    layer = model.layers[3]  # a shared one
    gradients = mx.grad(mx.checkpoint(run))(layer.trainable_parameters(), x, selection)
    assert float(mx.abs(gradients["self_attn"]["q_b_proj"]["weight"]).max()) > 0


@pytest.mark.parametrize("rows", [1, 2])
def test_blocks_change_nothing(model, small_blocks, monkeypatch, rows):
    tokens = mx.array(np.random.default_rng(1).integers(3, 160, (rows, 60)))
    blocks = np.array(model(tokens))
    monkeypatch.undo()
    assert np.allclose(blocks, np.array(model(tokens)), atol=1e-4)


def test_a_replaced_score_changes_the_selection(model):
    """Replacing a stage reaches what comes after it, scores included."""
    tokens = mx.array(np.random.default_rng(1).integers(3, 160, (1, 60)))
    stage = "layers.0.self_attn.indexer."
    newest = mx.where(mx.tril(mx.ones((1, 60, 60))) > 0, mx.broadcast_to(mx.arange(60.0), (1, 60, 60)), -mx.inf)
    with glm_dsa.trace.capture(model, {stage + "scores": newest}) as seen:
        model(tokens)
    assert sorted(np.array(seen[stage + "topk"])[0, 59].tolist()) == list(range(44, 60))


def test_keys_that_no_selection_reads_are_still_evaluated(model):
    """Within index_topk nothing reads the indexer's keys: they must not stay an ever longer graph."""
    cache = model.make_cache()
    for token in range(8):
        mx.eval(model(mx.array([[token]]), cache))
    before = mx.get_active_memory()
    mx.eval([c.index_keys.buffers for c in cache if c.has_indexer])
    assert abs(mx.get_active_memory() - before) < 1024


def test_input_embeddings_replace_the_lookup(model):
    tokens = mx.array([[5, 6, 7]])
    embedded = model.model.embed_tokens(tokens)
    assert mx.array_equal(model(tokens), model(tokens, input_embeddings=embedded))


def test_tied_embeddings(tmp_path):
    config = checkpoints.tiny(tie_word_embeddings=True, num_hidden_layers=4, num_nextn_predict_layers=0)
    folder = checkpoints.write(tmp_path / "tied", config)
    ours = glm_dsa.load(folder, dtype=mx.float32)
    assert "lm_head.weight" not in parameters_of(ours)
    tokens = np.arange(3, 40)[None]
    theirs = hf.forward(hf.load(folder, Conventions(indexer_rope="interleaved")), tokens).numpy()
    assert np.abs(np.array(ours(mx.array(tokens))) - theirs).max() < 1e-3 * np.abs(theirs).max()


def test_drafts_are_greedy_by_default_and_continue_the_cache(model):
    tokens = mx.array([[5, 6, 7, 8]])
    cache = model.make_mtp_cache()
    drafts = model.draft(model.model(tokens), tokens, cache, 3)
    assert [d.logits.shape[1] for d in drafts] == [4, 1, 1]
    assert drafts[1].tokens.item() == int(mx.argmax(drafts[0].logits[0, -1]))
    assert cache.length == 6


def test_a_model_without_mtp_cannot_draft():
    args = glm_dsa.ModelArgs.from_dict(checkpoints.tiny(num_hidden_layers=4, num_nextn_predict_layers=0))
    bare = glm_dsa.Model(args)
    with pytest.raises(ValueError, match="no MTP layer"):
        bare.draft(mx.zeros((1, 1, 64)), mx.array([[1]]), bare.make_mtp_cache(), 1)
    model = glm_dsa.Model(glm_dsa.ModelArgs.from_dict(checkpoints.tiny(num_hidden_layers=4)))
    with pytest.raises(ValueError, match="at least 1 draft step"):
        model.draft(mx.zeros((1, 1, 64)), mx.array([[1]]), model.make_mtp_cache(), 0)


def test_an_mtp_cache_that_is_not_this_models_is_refused(model):
    hidden, tokens = model.model(mx.array([[5, 6, 7]])), mx.array([[6, 7, 8]])
    for cache, message in (
        (model.make_cache()[3], "layer 0: a cache of Widths"),  # a shared layer's
        (model.make_mtp_cache(left_padding=[0, 0]), "a cache of 2 rows, for a batch of 1"),
    ):
        with pytest.raises(CacheError, match=message):
            model.draft(hidden, tokens, cache, 1)
        assert cache.empty()


def test_the_fingerprint_tells_models_apart(folder, model):
    """Of what shapes and turns cached values, and of two norms that stand for the weights; nothing else."""
    own = model.fingerprint
    assert re.fullmatch("[0-9a-f]{12}", own)
    other = glm_dsa.load(folder, dtype=mx.float32)
    assert other.fingerprint == own == model.make_cache()[0].model
    seen = {own}
    for norm in (other.model.norm, other.layers[0].self_attn.kv_a_layernorm):
        norm.weight = norm.weight * 1.01
        seen.add(other.fingerprint)
    for change in ({"indexer_rope": "half-split"}, {"index_topk": 17}):
        seen.add(glm_dsa.load(folder, dtype=mx.float32, **change).fingerprint)
    other.args = dataclasses.replace(other.args, rope_theta=1e4)
    for norm in (other.model.norm, other.layers[0].self_attn.kv_a_layernorm):
        norm.weight = norm.weight + 0  # or it says what it said
    seen.add(other.fingerprint)
    assert len(seen) == 6
    other = glm_dsa.load(folder, dtype=mx.bfloat16)
    other.layers[1].self_attn.kv_a_layernorm.weight *= 2
    assert other.fingerprint == own
    assert model.model_type == "glm_moe_dsa"  # mlx-lm asks for it


def test_a_stage_is_whole_while_somebody_listens(model, small_blocks):
    tokens = mx.array(np.random.default_rng(1).integers(3, 160, (2, 60)))
    with glm_dsa.trace.capture(model) as seen:
        model(tokens)
    assert seen["layers.0.self_attn.indexer.scores"].shape == (2, 60, 60)


def test_partial_mtp_is_refused(folder, tmp_path):
    """Some MTP tensors, but not all: neither a model with MTP nor one without."""
    damaged = tmp_path / "ck"
    shutil.copytree(folder, damaged)
    index = json.loads((damaged / checkpoints.INDEX).read_text())
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f != "model-mtp.safetensors"}
    (damaged / checkpoints.INDEX).write_text(json.dumps(index))
    (damaged / "model-mtp.safetensors").unlink()
    with pytest.raises(glm_dsa.CheckpointError, match=r"4 missing: model\.layers\.8\.eh_proj"):
        glm_dsa.load(damaged)
