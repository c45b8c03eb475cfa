"""The model's edges: 16 bit, tied embeddings, mlx-lm's own generation, drafts that are accepted."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm.generate import generate_step

import glm_dsa
from glm_dsa.model import parameters_of
from reference import checkpoints, hf
from reference.equations import Conventions


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
