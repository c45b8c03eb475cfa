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
from glm_dsa.cache_checks import check_in_step
from glm_dsa.errors import CacheError, InputError
from glm_dsa.model import parameters_of
from reference import checkpoints, hf
from reference.equations import Conventions
from verify.engines.definition import in_tiles_of


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
        (model.make_cache()[3], "layer 0: expected a cache of Widths"),  # a shared layer's
        (model.make_mtp_cache(left_padding=[0, 0]), "a cache of 2 rows, for a batch of 1"),
    ):
        with pytest.raises(CacheError, match=message):
            model.draft(hidden, tokens, cache, 1)
        assert cache.empty()


BAD_TOKENS = {
    "one-dimensional": (mx.array([5, 6, 7]), "shape [3]: expected [B, S]"),
    "one-dimensional, none": (mx.zeros((0,), mx.int32), "shape [0]: expected [B, S]"),
    "none": (mx.zeros((1, 0), mx.int32), "shape [1, 0]: expected [B, S]"),
    "no rows": (mx.zeros((0, 3), mx.int32), "shape [0, 3]: expected [B, S]"),
    "three axes": (mx.zeros((1, 3, 2), mx.int32), "shape [1, 3, 2]: expected [B, S]"),
    "floating": (mx.array([[5.0, 6.0]]), "float32: expected integers, ids from 0 to 159"),
    "of bool": (mx.array([[True, False]]), "bool: expected integers"),
    "beyond": (mx.array([[5, 6, 7], [8, 160, 9]]), "token 160 at [1, 1]: expected 0 to 159"),
    "negative": (mx.array([[5, -1, 7]]), "token -1 at [0, 1]: expected 0 to 159"),
    "one, the first": (mx.array([[160]]), "token 160 at [0, 0]: expected 0 to 159"),
}


@pytest.mark.parametrize("how", BAD_TOKENS)
def test_tokens_that_are_none_of_this_models_are_one_line(model, how):
    tokens, message = BAD_TOKENS[how]
    cache, mtp_cache = model.make_cache(), model.make_mtp_cache()
    hidden = mx.zeros((*tokens.shape[:2], model.args.hidden_size))
    calls = [lambda: model(tokens), lambda: model(tokens, cache)]
    calls += [lambda: model.draft(hidden, tokens, mtp_cache, 1)] if tokens.ndim == 2 and tokens.size else []
    for call in calls:
        with pytest.raises(InputError, match=re.escape(message)) as error:
            call()
        assert "\n" not in str(error.value)
        assert ("tokens[None]" in str(error.value)) == (how == "one-dimensional")  # which would help there alone
    assert cache[0].empty()
    assert mtp_cache.empty()


@pytest.mark.parametrize("dtype", [mx.int32, mx.int64, mx.uint32, mx.uint8])
def test_every_token_of_the_vocabulary_in_any_integer_dtype_runs(model, dtype):
    tokens = mx.array([[0, 159, 5], [1, 158, 0]], dtype=dtype)
    cache = model.make_cache()
    assert model(tokens, cache).shape == (2, 3, 160)
    assert model(tokens[:, :1], cache).shape == (2, 1, 160)
    assert mx.compile(lambda given: model(given))(tokens).shape == (2, 3, 160)  # where no value is known yet


def test_a_decode_step_is_not_waited_for(model, monkeypatch):
    """Its token is the last step's, which may be under way: only shape and dtype are looked at."""
    cache = model.make_cache()
    model(mx.array([[5, 6]]), cache)
    monkeypatch.setattr(glm_dsa.inputs, "_check_values", None)  # would fail if it were called
    model(mx.array([[7]]), cache)
    with pytest.raises(TypeError):
        model(mx.array([[7, 8]]), cache)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 3, 63), mx.float32, "input_embeddings of shape [1, 3, 63]: expected [B, S, 64]"),
        ((3, 64), mx.float32, "input_embeddings of shape [3, 64]: expected [B, S, 64]"),
        ((1, 0, 64), mx.float32, "shape [1, 0, 64]: expected [B, S, 64]"),
        ((1, 4, 64), mx.float32, "beside tokens of [1, 3]: expected tokens of [1, 4]"),
        ((2, 3, 64), mx.float32, "beside tokens of [1, 3]: expected tokens of [2, 3]"),
        ((1, 3, 64), mx.int32, "input_embeddings of mlx.core.int32: expected a floating dtype"),
    ],
)
def test_embeddings_of_another_shape_are_one_line(model, shape, dtype, message):
    with pytest.raises(InputError, match=re.escape(message)):
        model(mx.array([[5, 6, 7]]), input_embeddings=mx.zeros(shape, dtype))


def test_embeddings_may_come_without_tokens(model):
    """As mlx-lm calls with `input_embeddings` alone."""
    embedded = model.model.embed_tokens(mx.array([[5, 6, 7]]))
    assert mx.array_equal(model(mx.array([[]]), input_embeddings=embedded), model(mx.array([[5, 6, 7]])))


def test_hiddens_and_the_tokens_after_them_go_together(model):
    hidden, cache = model.model(mx.array([[5, 6, 7]])), model.make_mtp_cache()
    for given, tokens in (
        (hidden, mx.array([[6, 7]])),
        (hidden[0], mx.array([[6, 7, 8]])),
        (hidden[..., :9], mx.array([[6, 7, 8]])),
    ):
        with pytest.raises(InputError, match="hidden of shape"):
            model.draft(given, tokens, cache, 1)
    assert cache.empty()


# -- an MTP cache beside the main one


def test_an_empty_mtp_cache_behind_a_restored_prompt_is_refused(model):
    """It would run, and draft otherwise; `start` makes its positions right and leaves its keys missing."""
    prompt, more = mx.array([[5, 6, 7, 8, 9]]), mx.array([[10, 11]])
    cache = model.make_cache()
    model(prompt, cache)
    restored = [glm_dsa.LayerCache.from_state(layer.state) for layer in cache]
    hidden = model.model(more, restored)
    mtp_cache = model.make_mtp_cache()
    with pytest.raises(
        CacheError, match="the MTP cache holds 0 tokens, and the main model's 7: expected 5 before the 2"
    ):
        model.draft(hidden, mx.array([[11, 12]]), mtp_cache, 2, main=restored)
    assert mtp_cache.empty()
    whole = model.model(mx.concatenate([prompt, more], axis=1))
    following = mx.array([[6, 7, 8, 9, 10, 11, 12]])
    drafts = model.draft(whole, following, mtp_cache, 3, main=restored)  # all of them handed in
    assert len(drafts) == 3
    with pytest.raises(CacheError, match="holds 9 tokens"):  # what the chain wrote is still in it
        model.draft(hidden, following[:, -2:], mtp_cache, 1, main=restored)


def test_pads_are_no_tokens_that_an_mtp_cache_holds(model):
    main = model.make_cache(left_padding=[2, 0])
    model(mx.array([[0, 0, 5, 6, 7], [4, 5, 6, 7, 8]]), main)
    check_in_step(model.make_mtp_cache(left_padding=[2, 0]), main[0], 5, 2)
    with pytest.raises(CacheError, match=r"holds 0 tokens, and the main model's 3 \(row 0\): expected -2 before the 5"):
        check_in_step(model.make_mtp_cache(), main[0], 5, 2)


def test_a_loop_of_drafts_and_rewinds_stays_in_step(model):
    tokens = mx.array([[5, 6, 7, 8]])
    cache, mtp_cache = model.make_cache(), model.make_mtp_cache()
    hidden = model.model(tokens, cache)
    following = mx.array([[6, 7, 8, 9]])
    for accepted in (1, 3, 2):
        model.draft(hidden, following, mtp_cache, 3, main=cache)
        mtp_cache.trim(2)
        hidden = model.model(mx.array([[9, 10, 11]]), cache)[:, :accepted]
        for layer in cache:
            layer.trim(3 - accepted)
        following = mx.array([[10, 11, 12]])[:, :accepted]
    model.draft(hidden, following, mtp_cache, 1, main=cache)
    assert mtp_cache.length == cache[0].length


def test_padded_rows_are_held_each_to_its_own(model):
    tokens, pads = mx.array([[0, 0, 5, 6], [4, 5, 6, 7]]), [2, 0]
    cache, mtp_cache = model.make_cache(left_padding=pads), model.make_mtp_cache(left_padding=pads)
    hidden = model.model(tokens, cache)
    model.draft(hidden, tokens, mtp_cache, 1, main=cache)
    for other, message in (
        (model.make_mtp_cache(left_padding=[1, 0]), r"\(row 0\)"),
        (model.make_mtp_cache(), r"\(row 0\)"),
    ):
        with pytest.raises(CacheError, match=message):
            model.draft(hidden, tokens, other, 1, main=cache)
    with pytest.raises(CacheError, match="2 rows, for a batch of 1"):
        model.draft(hidden[:1], tokens[:1], model.make_mtp_cache(), 1, main=cache)


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
