"""mlx-lm's own tools on this definition: its commands as real processes, its functions in this one."""

import json
import os
import pkgutil
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from mlx_lm.generate import batch_generate, generate_step, speculative_generate_step
from mlx_lm.models.cache import (
    KVCache,
    LRUPromptCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

import glm_dsa
import glm_dsa.mlx_lm
from glm_dsa.__main__ import main
from glm_dsa.errors import CacheError, CheckpointError
from glm_dsa.linear import SwitchLinear
from reference import checkpoints, hf

ROOT = Path(__file__).parent.parent
TEXT = "The lightning indexer scores every key for every query, and selects the best. "


def command(*arguments, ok=True, module="glm_dsa", cwd=None):
    """Runs `python -m glm_dsa ...` as a user would; returns what it printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True, text=True, env=environment, timeout=300, cwd=cwd, encoding="utf-8",
    )  # fmt: skip
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """GLM-5.2's shape of things, 8 layers, index_topk 16; float32, so that greedy text does not hang on rounding."""
    config = checkpoints.packable(eos_token_id=[1])
    return checkpoints.write_tokenizer(
        checkpoints.write(tmp_path_factory.mktemp("mlx_lm") / "glm", config, dtype=torch.float32)
    )


@pytest.fixture
def apart(folder, tmp_path):
    """A copy, to be damaged."""
    return shutil.copytree(folder, tmp_path / "apart")


@pytest.fixture
def loaded(registered, folder):
    return mlx_lm.load(str(folder))


def is_greedy(model, prompt, tokens):
    """Whether each token is the best of one uncached run over all of them: then the uncached greedy text is the same."""
    logits = model(mx.array([[*prompt, *tokens]]))[0, len(prompt) - 1 : -1]
    return mx.argmax(logits, axis=-1).tolist() == list(tokens)


def prompt_of(tokenizer, characters=70):
    return tokenizer.encode(TEXT * 5)[:characters]


# -- in this process


def test_mlx_lm_loads_ours(loaded):
    model, tokenizer = loaded
    assert type(model) is glm_dsa.Model
    assert type(make_prompt_cache(model)[0]) is glm_dsa.LayerCache
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_registering_twice_is_harmless(loaded):
    once = [getattr(pkgutil.resolve_name(owner), name) for owner, name in glm_dsa.mlx_lm.WRAPPERS]
    glm_dsa.mlx_lm.register()
    assert once == [getattr(pkgutil.resolve_name(owner), name) for owner, name in glm_dsa.mlx_lm.WRAPPERS]


def test_an_mlx_lm_that_has_changed_is_named(monkeypatch):
    monkeypatch.setitem(glm_dsa.mlx_lm.WRAPPERS, ("mlx_lm.generate", "gone"), lambda *_: None)
    with pytest.raises(glm_dsa.GlmDsaError, match=r"mlx_lm\.generate\.gone is no more"):
        glm_dsa.mlx_lm.register()


@pytest.mark.parametrize(("step", "count"), [(2048, 210), (7, 60)])
def test_greedy_text_is_that_of_the_uncached_run(loaded, step, count):
    """Past index_topk, by 200 tokens and by 50; the step is the prompt's alone."""
    model, tokenizer = loaded
    prompt = prompt_of(tokenizer, 12)
    tokens = [t for t, _ in generate_step(mx.array(prompt), model, max_tokens=count, prefill_step_size=step)]
    assert len(tokens) == count
    assert is_greedy(model, prompt, tokens)


def test_batched_text_is_that_of_each_alone(loaded):
    """Prompts that end below index_topk and beyond it, at different lengths; right-padded by mlx-lm, rolled left."""
    model, tokenizer = loaded
    prompts = [prompt_of(tokenizer, n) for n in (70, 9, 33, 2)]
    batched = batch_generate(model, tokenizer, prompts, max_tokens=[60, 40, 60, 50], return_token_ids=True)
    for prompt, tokens in zip(prompts, batched.token_ids, strict=True):
        assert len(tokens) >= 40
        assert is_greedy(model, prompt, tokens)


def test_a_batch_with_history(loaded):
    """Two turns: each row goes on from its own cache, of its own length."""
    model, tokenizer = loaded
    first = [prompt_of(tokenizer, n) for n in (40, 11)]
    one = batch_generate(model, tokenizer, first, max_tokens=20, return_token_ids=True, return_prompt_caches=True)
    second = [prompt_of(tokenizer, n) for n in (5, 30)]
    two = batch_generate(model, tokenizer, second, prompt_caches=one.caches, max_tokens=30, return_token_ids=True)
    for row in range(2):
        held = [*first[row], *one.token_ids[row]][: one.caches[row][0].size()]
        assert is_greedy(model, [*held, *second[row]], two.token_ids[row])


def test_a_batch_of_packed_caches(loaded):
    """Rows that were quantized, at different lengths, go on as they would alone."""
    model, tokenizer = loaded
    prompts = [prompt_of(tokenizer, n) for n in (40, 23)]

    def cached(prompt):
        cache = model.make_cache(kv_bits=8)
        model(mx.array([prompt]), cache)
        return cache

    batched = batch_generate(
        model, tokenizer, [[5], [6]], prompt_caches=[cached(p) for p in prompts], max_tokens=30, return_token_ids=True
    )
    for row, prompt in enumerate(prompts):
        alone = [t for t, _ in generate_step(mx.array([5 + row]), model, max_tokens=30, prompt_cache=cached(prompt))]
        assert batched.token_ids[row] == alone


def test_kv_bits_engage_as_a_replay_of_the_same_cuts_says(loaded):
    """mlx-lm packs what there is after each chunk from the start on: that chunk was attended in float."""
    model, tokenizer = loaded
    prompt = prompt_of(tokenizer, 60)
    cache = make_prompt_cache(model)
    steps = generate_step(
        mx.array(prompt),
        model,
        max_tokens=20,
        prompt_cache=cache,
        prefill_step_size=25,
        kv_bits=8,
        quantized_kv_start=30,
    )
    tokens, logprobs = zip(*steps, strict=True)
    assert all(c.quantization is not None and c.latents.plain.length == 0 for c in cache)

    replayed = model.make_cache()
    for cut in (slice(0, 25), slice(25, 50), slice(50, 59)):
        model(mx.array([prompt[cut]]), replayed)
        if replayed[0].length >= 30:
            replayed = [c.to_quantized(group_size=64, bits=8) for c in replayed]
    last = prompt[-1]
    for token, logprob in zip(tokens, logprobs, strict=True):
        logits = model(mx.array([[last]]), replayed)[0, -1]
        assert mx.array_equal(logits - mx.logsumexp(logits), logprob)
        last = token
    assert [c.latents.nbytes for c in cache] == [144 * 256] * 8  # a step of growth; in float it is 512 a token


def make_filled(model, prompt, more):
    cache = model.make_cache()
    model(mx.array([[*prompt, *range(3, 3 + more)]]), cache)
    return cache


def test_native_quantization_does_not_depend_on_the_cuts(loaded):
    """Handed to mlx-lm as prompt_cache: its own switch then finds nothing to do."""
    model, tokenizer = loaded
    prompt = prompt_of(tokenizer, 60)
    texts = []
    for step in (2048, 25, 7):
        cache = model.make_cache(kv_bits=8, quantized_kv_start=30)
        options = {"prefill_step_size": step, "kv_bits": 8, "quantized_kv_start": 0}
        texts.append(
            [t for t, _ in generate_step(mx.array(prompt), model, max_tokens=20, prompt_cache=cache, **options)]
        )
        assert (cache[0].latents.plain.length, cache[0].latents.packed.length) == (30, 50)
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_bits": 8, "kv_group_size": 128}, "groups of 128 do not divide"),
        ({"kv_bits": 8, "kv_group_size": 33}, "group size 33"),
        ({"kv_bits": 16}, "bits 16"),
    ],
)
def test_bits_that_cannot_be_are_refused_at_the_first_chunk(loaded, options, message):
    """And not when --quantized-kv-start is reached."""
    steps = generate_step(mx.array([3, 4, 5]), loaded[0], max_tokens=2, quantized_kv_start=5000, **options)
    with pytest.raises(CacheError, match=message):
        next(steps)


def test_speculative_decoding_changes_nothing(loaded, tmp_path):
    """The draft's tokens are rewound where they were wrong: in every part of the cache."""
    model, tokenizer = loaded
    draft = glm_dsa.load(checkpoints.write(tmp_path / "draft", checkpoints.packable(), seed=1), dtype=mx.float32)
    prompt = prompt_of(tokenizer, 40)
    for options in ({}, {"kv_bits": 8, "quantized_kv_start": 0}):
        alone = [t for t, _ in generate_step(mx.array(prompt), model, max_tokens=24, **options)]
        drafted = [t for t, *_ in speculative_generate_step(mx.array(prompt), model, draft, max_tokens=24, **options)]
        assert drafted[:24] == alone
    agreeing = list(speculative_generate_step(mx.array(prompt), model, model, max_tokens=24))
    assert sum(was_drafted for *_, was_drafted in agreeing) > 12


def test_a_draft_model_of_another_kind_is_rewound_too(loaded):
    """mlx-lm's own cache beside ours, one token shorter than the key, as ours is."""
    model, tokenizer = loaded
    store, key, draft = LRUPromptCache(), prompt_of(tokenizer, 30), KVCache()
    draft.update_and_fetch(mx.zeros((1, 1, 28, 8)), mx.zeros((1, 1, 28, 8)))
    cache = model.make_cache()
    model(mx.array([key[:29]]), cache)
    store.insert_cache("glm", key, [*cache, draft])
    reused, rest = store.fetch_nearest_cache("glm", [key[0], 9, 10])
    assert {c.offset for c in reused} == {1}
    assert rest == [9, 10]


@pytest.mark.parametrize("options", [{}, {"kv_bits": 8, "quantized_kv_start": 0}])
def test_prompts_are_reused_after_speculative_decoding(loaded, options):
    """mlx-lm's key is then longer than what the caches hold; under kv_bits it keeps a list of its own beside them."""
    model, tokenizer = loaded
    store, prompt = LRUPromptCache(), prompt_of(tokenizer, 40)
    cache = [*model.make_cache(), *model.make_cache()]
    steps = speculative_generate_step(mx.array(prompt), model, model, max_tokens=7, prompt_cache=cache, **options)
    key = [*prompt, *(token for token, *_ in steps)]
    store.insert_cache("glm", key, cache)
    assert all((c.quantization is not None) == bool(options) for c in cache)
    for other in ([*key, 9, 10], [*key[:20], 9, 10], [prompt[0], 9, 10]):
        reused, rest = store.fetch_nearest_cache("glm", other)
        main_cache = reused[: len(model.layers)]
        assert main_cache[0].length + len(rest) == len(other)
        tokens = [t for t, _ in generate_step(mx.array(rest), model, max_tokens=12, prompt_cache=main_cache)]
        if not options:
            assert is_greedy(model, other, tokens)


@pytest.mark.parametrize("quantized", [None, 0, 20])
def test_prompt_caches_are_saved_and_loaded(loaded, tmp_path, quantized):
    model, tokenizer = loaded
    prompt = mx.array([prompt_of(tokenizer)])
    options = {} if quantized is None else {"kv_bits": 8, "quantized_kv_start": quantized}
    cache = model.make_cache(**options)
    model(prompt, cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache, {"model": "x"})
    again, metadata = load_prompt_cache(str(tmp_path / "cache.safetensors"), return_metadata=True)
    assert metadata == {"model": "x"}
    for token in (5, 6, 7):
        assert mx.array_equal(model(mx.array([[token]]), again), model(mx.array([[token]]), cache))
    assert trim_prompt_cache(again, 3) == 3


def test_a_prompt_cache_of_another_model_is_refused(loaded, tmp_path):
    """Other weights, other conventions, fewer layers, another definition: before anything changes."""
    model, tokenizer = loaded
    prompt = mx.array([prompt_of(tokenizer)])

    def saved(other):
        cache = other.make_cache()
        other(prompt, cache)
        save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
        return load_prompt_cache(str(tmp_path / "cache.safetensors"))

    seed_1 = checkpoints.write(tmp_path / "other", checkpoints.packable(), seed=1, dtype=torch.float32)
    others = [
        (glm_dsa.load(seed_1), "the cache was made by model"),
        (glm_dsa.load(seed_1, indexer_rope="half-split"), "weights or conventions differ"),
        (
            glm_dsa.Model(glm_dsa.ModelArgs.from_dict(checkpoints.packable(num_hidden_layers=4))),
            "4 caches for 8 layers",
        ),
        (
            glm_dsa.Model(glm_dsa.ModelArgs.from_dict(checkpoints.packable(kv_lora_rank=128))),
            "it is another model",
        ),
    ]
    for other, message in others:
        cache = saved(other)
        with pytest.raises(CacheError, match=message):
            model(mx.array([[5]]), cache)
        assert cache[0].length == prompt.shape[1]
    with pytest.raises(CacheError, match="a KVCache, made by another definition"):
        model(mx.array([[5]]), [KVCache() for _ in model.layers])


def test_a_cache_whose_layers_disagree_is_refused(loaded):
    """As an interrupted run leaves it."""
    model, _ = loaded
    cache = make_filled(model, [3, 4], 10)
    cache[5].trim(1)
    with pytest.raises(CacheError, match="between 11 and 12 tokens"):
        model(mx.array([[5]]), cache)
    with pytest.raises(CacheError, match="a cache of 1 rows, for a batch of 2"):
        model(mx.array([[5], [6]]), make_filled(model, [3], 4))


def test_prompts_are_reused_as_the_server_does(loaded):
    """The nearest cache is copied and trimmed; text from it equals text from scratch."""
    model, tokenizer = loaded
    store, prompt = LRUPromptCache(), prompt_of(tokenizer, 60)
    cache = model.make_cache()
    model(mx.array([prompt]), cache)
    store.insert_cache("glm", prompt, cache)
    other = [*prompt[:35], *prompt_of(tokenizer, 9)]
    reused, rest = store.fetch_nearest_cache("glm", other)
    assert reused[0].size() == 35
    tokens = [t for t, _ in generate_step(mx.array(rest), model, max_tokens=30, prompt_cache=reused)]
    assert is_greedy(model, other, tokens)
    assert store.nbytes == sum(c.nbytes for c in cache)


def test_a_config_as_transformers_saves_it(registered, tmp_path):
    """Which drops keys that stock mlx-lm asks for; in bf16, which its experts cannot do on a CPU."""
    dropped = dict.fromkeys(("scoring_func", "topk_method", "moe_layer_freq"))
    plain = checkpoints.write(tmp_path / "plain", checkpoints.packable(num_nextn_predict_layers=0, **dropped))
    saved = checkpoints.write_tokenizer(shutil.copytree(plain, tmp_path / "saved"))
    hf.config_for(json.loads((plain / "config.json").read_text())).save_pretrained(saved)
    assert "scoring_func" not in json.loads((saved / "config.json").read_text())
    model, tokenizer = mlx_lm.load(str(saved))
    tokens = mx.array([prompt_of(tokenizer)])
    assert model(tokens).dtype == mx.bfloat16
    assert mx.array_equal(model(tokens), glm_dsa.load(plain)(tokens))
    assert len(mlx_lm.generate(model, tokenizer, TEXT, max_tokens=5)) > 0


def test_perplexity(loaded):
    """mlx-lm's function (its command reads datasets from the hub), against HF's own losses."""
    from mlx_lm.perplexity import eval_ppl

    model, tokenizer = loaded
    tokens = np.array(tokenizer.encode(TEXT * 3)[:200]).reshape(2, 100)
    perplexity, _ = eval_ppl(model, mx.array(tokens), batch_size=1)
    theirs = hf.load(Path(tokenizer.name_or_path), glm_dsa_conventions())
    losses = [
        torch.nn.functional.cross_entropy(hf.forward(theirs, row[None, :-1])[0], torch.tensor(row[1:]))
        for row in tokens
    ]
    assert perplexity == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-4)


def glm_dsa_conventions():
    from reference.equations import Conventions

    return Conventions(indexer_rope="interleaved")


# -- conversion


def here(*arguments):
    """The same as `command`, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", sys.argv)
        assert main(list(map(str, arguments))) == 0


def convert(source, target, *options):
    here("convert", "--hf-path", source, "--mlx-path", target, *options)
    return target


def packed_bits(folder):
    """{module: bits} of a checkpoint, by mlx-lm's own loader."""
    model = glm_dsa.load(folder)
    return {name: m.bits for name, m in model.named_modules() if hasattr(m, "bits")}


@pytest.fixture(scope="module")
def four_bit(unregistered, folder):
    return convert(folder, folder.parent / "four_bit", "-q")


def test_convert_to_4_bit(four_bit):
    """All that can be packed but the indexer; router and correction bias stay as they were."""
    bits = packed_bits(four_bit)
    assert set(bits.values()) == {4}
    assert not any(".indexer." in name or name.endswith(".gate") for name in bits)
    for layer in range(9):
        attention = {f"model.layers.{layer}.self_attn.{n}" for n in ("q_a_proj", "embed_q", "unembed_out", "o_proj")}
        assert attention <= set(bits)
    assert "model.layers.8.eh_proj" in bits
    bias = dict(tree_flatten(glm_dsa.load(four_bit).parameters()))["model.layers.5.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == mx.float32


def test_convert_to_a_mixed_recipe(folder, tmp_path, capsys):
    options = ["-q", "--quant-predicate", "mixed_3_6", "--q-group-size", "64"]
    mixed = convert(folder, tmp_path / "mixed", *options)
    bits = packed_bits(mixed)
    assert set(bits.values()) == {3, 6}
    assert bits["lm_head"] == bits["model.layers.8.mlp.switch_mlp.down_proj"] == 6
    assert not any(".indexer." in name for name in bits)
    here("generate", "--model", mixed, "--prompt", TEXT, "-m", 5)
    assert "Generation: 5 tokens" in capsys.readouterr().out


def test_a_custom_predicate_may_pack_the_indexer_and_is_warned(registered, folder, tmp_path, caplog):
    target = tmp_path / "all"
    mlx_lm.convert(
        str(folder), str(target), quantize=True, quant_predicate=lambda path, module: {"bits": 8, "group_size": 32}
    )
    bits = packed_bits(target)
    assert bits["model.layers.0.self_attn.indexer.wk"] == 8
    assert "15 modules of the indexer are quantized now" in caplog.text


def test_a_conversion_that_packs_nothing_is_an_error(registered, folder, tmp_path):
    with pytest.raises(glm_dsa.GlmDsaError, match="nothing was quantized"):
        mlx_lm.convert(str(folder), str(tmp_path / "out"), quantize=True, q_group_size=48)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [("--q-bits", "8"), ("--quant-predicate", "mixed_3_6", "--q-group-size", "64")])
def test_a_build_that_is_packed_is_not_packed_again(registered, four_bit, tmp_path, capsys, monkeypatch, options):
    """mlx-lm would leave it as it is, and say "Quantized model"."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    target = tmp_path / "out"
    assert main(["convert", "--hf-path", str(four_bit), "--mlx-path", str(target), "-q", *options]) == 10
    err = capsys.readouterr().err
    assert "expected unpacked weights, got a build in 4 bit; convert the original, or unpack it first with -d" in err
    assert not target.exists()


def test_dequantized_it_loads_and_says_the_same(registered, four_bit, tmp_path):
    target = convert(four_bit, tmp_path / "dequantized", "--dequantize")
    assert "quantization" not in json.loads((target / "config.json").read_text())
    assert packed_bits(target) == {}
    tokens = mx.array([list(range(3, 60))])
    packed, plain = (mlx_lm.load(str(f))[0] for f in (four_bit, target))
    ours, theirs = packed(tokens), plain(tokens)
    assert mx.abs(ours - theirs).max() < 1e-4 * mx.abs(theirs).max()


def test_a_converted_model_equals_its_source_unquantized(folder, tmp_path):
    """Nothing is lost on the way through mlx-lm's converter: every parameter, MTP included, bit for bit."""
    same = convert(folder, tmp_path / "same")
    ours, theirs = (dict(tree_flatten(glm_dsa.load(f).parameters())) for f in (same, folder))
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[name], theirs[name]) for name in ours)


# -- processes


def test_generate(loaded, folder):
    model, tokenizer = loaded
    out = command(
        "generate", "--model", folder, "--prompt", TEXT, "-m", 40, "--temp", 0, "--ignore-chat-template",
        "--kv-bits", 8, "--kv-group-size", 64, "--quantized-kv-start", 90,
    )  # fmt: skip
    tokens = [
        t for t, _ in generate_step(
            mx.array(tokenizer.encode(TEXT)), model, max_tokens=40, kv_bits=8, quantized_kv_start=90
        )
    ]  # fmt: skip
    assert out.startswith("==========\n" + tokenizer.decode(tokens)[:10])
    assert "[glm-dsa] KV cache: 8 bit in groups of 64 from here on, the 90 tokens so far included: " in out
    assert "144 bytes a token and layer instead of 512" in out


def test_kv_bits_that_were_never_reached_are_said_so(folder, capsys):
    here("generate", "--model", folder, "--prompt", "x", "-m", 3, "--kv-bits", 8)
    said = "not quantized. --kv-bits begins at token 5000 (--quantized-kv-start), this run ended at"
    assert said in capsys.readouterr().err


@pytest.mark.slow("glm_dsa/mlx_lm", "glm_dsa/cache")
def test_a_prompt_cache_by_commands(registered, folder, tmp_path, monkeypatch, capsys):
    file = tmp_path / "cache.safetensors"
    common = ["--model", folder, "--prompt-cache-file", file]
    command("cache_prompt", *common, "--prompt", TEXT, "--kv-bits", 8, "--quantized-kv-start", 0)
    out = command("generate", *common, "--prompt", "And more.", "-m", 8)
    assert "Generation: 8 tokens" in out
    monkeypatch.setattr(sys, "argv", sys.argv)
    assert main(["generate", *map(str, common), "--prompt", "And more.", "--kv-bits", "4"]) == 10
    assert "packed already, 8 bit in groups of 64; ask for the same" in capsys.readouterr().err


@pytest.mark.slow("glm_dsa/mlx_lm", "glm_dsa/linear")
def test_lora_trains_fuses_and_loads(registered, four_bit, tmp_path):
    """A few steps on the quantized model, experts included."""
    for split in ("train", "valid"):
        lines = [json.dumps({"text": f"{split} {i}: {TEXT}"}) for i in range(4)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    adapters, fused = tmp_path / "adapters", tmp_path / "fused"
    out = command(
        "lora", "--model", four_bit, "--train", "--data", tmp_path, "--adapter-path", adapters, "--iters", 3,
        "--batch-size", 1, "--num-layers", 1, "--steps-per-report", 1, "--steps-per-eval", 100, "--val-batches", 1,
        "--max-seq-length", 64, "--learning-rate", 1e-3,
    )  # fmt: skip
    assert "Trainable parameters" in out
    trained = mx.load(str(adapters / "adapters.safetensors"))
    assert mx.abs(trained["model.layers.7.mlp.switch_mlp.down_proj.lora_b"]).max() > 0
    assert mx.abs(trained["model.layers.7.self_attn.q_b_proj.lora_b"]).max() > 0
    command("fuse", "--model", four_bit, "--adapter-path", adapters, "--save-path", fused, "--dequantize")
    tokens = mx.array([list(range(3, 60))])
    adapted = mlx_lm.load(str(four_bit), adapter_path=str(adapters))[0](tokens)
    merged = mlx_lm.load(str(fused))[0](tokens)
    untrained = mlx_lm.load(str(four_bit))[0](tokens)
    assert mx.abs(adapted - merged).max() < 1e-3 * mx.abs(adapted - untrained).max()


@pytest.mark.parametrize(
    ("bits", "mode", "group"), [(3, "affine", 32), (4, "affine", 64), (8, "affine", 64), (4, "mxfp4", 32)]
)
def test_fused_experts_keep_their_packing(registered, bits, mode, group):
    mx.random.seed(0)
    packed = SwitchLinear(4, 64, 128).to_quantized(group_size=group, bits=bits, mode=mode)
    lora = packed.to_lora(r=2, scale=3.0, dropout=0.0)
    lora.lora_b = mx.random.normal(lora.lora_b.shape)
    x, experts = mx.random.normal((6, 1, 128)), mx.array([0, 1, 2, 3, 1, 0])
    plain, again = lora.fuse(dequantize=True), lora.fuse()
    error = mx.abs(plain(x, experts) - lora(x, experts)).max() / mx.abs(lora(x, experts)).max()
    assert error < (1e-5 if mode == "affine" else 1e-2)  # mlx unpacks mxfp4 to bfloat16
    assert again.packing() == packed.packing()
    assert mx.array_equal(again.weight, plain.to_quantized(**packed.packing()).weight)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda f: None, "no prompt cache that can be read"),
        (lambda f: f.write_bytes(b""), "no prompt cache that can be read"),
        (lambda f: f.write_text("text"), "no prompt cache that can be read"),
        (lambda f: mx.save_safetensors(str(f), {"a": mx.zeros(3)}), "no prompt cache that can be read"),
    ],
)
def test_files_that_are_no_prompt_caches(registered, folder, tmp_path, capsys, monkeypatch, write, message):
    monkeypatch.setattr(sys, "argv", sys.argv)
    write(tmp_path / "cache.safetensors")
    assert main(["generate", "--model", str(folder), "--prompt-cache-file", str(tmp_path / "cache.safetensors")]) == 10
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


class Server:
    """`python -m glm_dsa server`, on a free port of the loopback address."""

    def __init__(self, folder, log, *options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"http://127.0.0.1:{free.getsockname()[1]}"
        port = self.address.rpartition(":")[2]
        arguments = [sys.executable, "-m", "glm_dsa", "server", "--model", str(folder), "--port", port, *options]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(arguments, stdout=out, stderr=out, env=environment)

    def __enter__(self):
        for _ in range(300):
            assert self.process.poll() is None, self.log.read_text()
            try:
                urllib.request.urlopen(f"{self.address}/health", timeout=5).read()  # noqa: S310
                return self
            except OSError:
                time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(30)

    def ask(self, text, tokens=40):
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 0}
        request = urllib.request.Request(  # noqa: S310
            f"{self.address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310
            answer = json.loads(answer.read())
        used = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return answer["choices"][0]["message"]["content"], used


@pytest.mark.slow("glm_dsa/mlx_lm", "glm_dsa/cache")
def test_server_with_four_clients_and_prompt_reuse(loaded, folder, tmp_path):
    questions = [TEXT, TEXT + "And then?", "What?", TEXT * 2]
    with Server(folder, tmp_path / "log") as server, ThreadPoolExecutor(4) as clients:
        at_once = list(clients.map(server.ask, questions))
        again = [server.ask(question) for question in questions]
    assert [text for text, _ in at_once] == [text for text, _ in again]
    assert all(used > 0 for _, used in again)
    model, tokenizer = loaded
    for question, (text, _) in zip(questions, at_once, strict=True):
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
        assert text == mlx_lm.generate(model, tokenizer, prompt, max_tokens=40)


def test_server_with_a_packed_cache(loaded, folder, tmp_path):
    """Nothing is kept for reuse: under --kv-bits mlx-lm's text depends on what was cached before, and so on who came first."""
    questions = [TEXT, TEXT + "And then?", "What?", TEXT]
    options = ["--kv-bits", "8", "--quantized-kv-start", "0", "--prompt-cache-size", "0"]
    with Server(folder, tmp_path / "log", *options) as server, ThreadPoolExecutor(4) as clients:
        answers = list(clients.map(server.ask, questions))
    model, tokenizer = loaded
    for question, (text, used) in zip(questions, answers, strict=True):
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
        assert text == mlx_lm.generate(model, tokenizer, prompt, max_tokens=40, kv_bits=8, quantized_kv_start=0)
        assert used == 0
    assert "KV cache: 8 bit in groups of 64 from here on" in (tmp_path / "log").read_text()


SHARDED = """
import sys
import mlx.core as mx
import glm_dsa.mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.utils import sharded_load
glm_dsa.mlx_lm.register()
group = mx.distributed.init(backend="ring")
model, tokenizer = sharded_load(sys.argv[1], tensor_group=group)
prompt = mx.array(tokenizer.encode(sys.argv[2]))
print(group.size(), [t for t, _ in generate_step(prompt, model, max_tokens=30, prefill_step_size=50)])
print("held:", sum(value.size for name, value in tree_flatten(model.parameters()) if ".layers." in name))
"""


@pytest.mark.slow("glm_dsa/mlx_lm", "glm_dsa/sharding")
def test_two_processes_share_the_work(loaded, folder, tmp_path):
    """mlx.launch, with mlx-lm's own sharded loading: the same text, beyond index_topk, from little more than half of the
    layers in each (routers, indexers and latent projections are in both)."""
    model, tokenizer = loaded
    (tmp_path / "script.py").write_text(SHARDED)
    launch = [Path(sys.executable).parent / "mlx.launch", "-n", "2", "--backend", "ring", "--python", sys.executable]
    done = subprocess.run(
        [*map(str, launch), "--env", f"PYTHONPATH={ROOT}", str(tmp_path / "script.py"), str(folder), TEXT],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    alone = [t for t, _ in generate_step(mx.array(tokenizer.encode(TEXT)), model, max_tokens=30)]
    assert done.stdout.count(f"2 {alone}") == 2, done.stdout + done.stderr
    whole = sum(value.size for name, value in tree_flatten(model.parameters()) if ".layers." in name)
    held = [int(number) for number in re.findall(r"held: (\d+)", done.stdout)]
    assert len(held) == 2
    assert all(whole / 2 < part < 0.65 * whole for part in held), (held, whole)


def test_what_cannot_be_divided_is_left_whole():
    class Group:
        def size(self):
            return 3

        def rank(self):
            return 0

    model = glm_dsa.Model(glm_dsa.ModelArgs.from_dict(checkpoints.packable(num_hidden_layers=4)))
    before = {name: value.shape for name, value in tree_flatten(model.parameters())}
    with pytest.raises(glm_dsa.GlmDsaError, match=r"layers.0: 4 heads cannot be divided among 3 processes"):
        model.shard(Group())
    assert {name: value.shape for name, value in tree_flatten(model.parameters())} == before


@pytest.mark.slow("glm_dsa/mlx_lm")
def test_attached_any_mlx_lm_loads_it(registered, folder, tmp_path, capsys):
    target = tmp_path / "attached"
    shutil.copytree(folder, target)
    before = json.loads((target / "config.json").read_text())
    assert main(["attach", str(target)]) == 0
    assert str(target / "glm_dsa_model.py") in capsys.readouterr().out
    assert json.loads((target / "config.json").read_text()) == before | {"model_file": "glm_dsa_model.py"}
    options = ["--model", target, "--prompt", TEXT, "-m", 5, "--trust-remote-code", "--kv-bits", 8]
    assert "Generation: 5 tokens" in command("generate", *options, "--quantized-kv-start", 0, module="mlx_lm")
    out = command("generate", *options[:-3], module="mlx_lm", ok=False)  # not trusted, not run
    assert "trust_remote_code=True" in out
    main(["attach", str(target)])  # again: harmless
    glm_dsa.mlx_lm.register()
    assert type(mlx_lm.load(str(target))[0]) is glm_dsa.Model  # registered, it needs no trust
    (target / "glm_dsa_model.py").write_text("raise SystemExit('not ours')")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        mlx_lm.load(str(target))
    main(["attach", str(target), "--force"])
    left = {p.name for p in target.iterdir()} - {"__pycache__"}  # Python's, of an imported model_file
    assert left == {p.name for p in folder.iterdir()} | {"glm_dsa_model.py"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "llama"),
        (lambda f: (f / "glm_dsa_model.py").mkdir(), "is there already, and no file"),
        (lambda f: (f / "glm_dsa_model.py").write_text("mine"), "is there already, and not what would be written"),
        (
            lambda f: (f / "config.json").write_text(json.dumps(checkpoints.packable(model_file="mine.py"))),
            "model_file is 'mine.py' already; --force",
        ),
    ],
)
def test_what_cannot_be_attached_is_left_as_it_is(apart, damage, message):
    damage(apart)
    before = {p.name: p.is_file() and p.read_bytes() for p in apart.iterdir()}
    with pytest.raises(CheckpointError, match=message):
        glm_dsa.mlx_lm.attach(apart)
    assert {p.name: p.is_file() and p.read_bytes() for p in apart.iterdir()} == before


def test_half_an_attachment_is_taken_back(apart, folder, monkeypatch):
    replace = os.replace

    def fail(source, target):
        if str(target).endswith("config.json"):
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be written: Permission denied"):
        glm_dsa.mlx_lm.attach(apart)
    assert {p.name for p in apart.iterdir()} == {p.name for p in folder.iterdir()}


def test_attaching_by_force(apart):
    (apart / "config.json").write_text(json.dumps(checkpoints.packable(model_file="mine.py")))
    glm_dsa.mlx_lm.attach(apart, force=True)
    assert json.loads((apart / "config.json").read_text())["model_file"] == "glm_dsa_model.py"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--model", "/no/such/folder", "--prompt", "x"], "no such folder, and no name of the hub either"),
        (["generate", "--model", "x", "--prompt", "x", "--max-kv-size", "5"], "it would do nothing here; leave it out"),
        (["generate", "--model", "x", "--prompt", "x", "--max-kv=5"], "it would do nothing here; leave it out"),
        (
            ["cache_prompt", "--model", "x", "--prompt", "x", "--prompt-cache-file", "/no/such/f"],
            "folder does not exist",
        ),
        (["gptq", "--model", "x"], "mlx-lm's gptq cannot be used: it fails on modules"),
    ],
)
def test_mistakes_are_one_line(registered, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", sys.argv)
    assert main(arguments) == 10
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_without_mlx_lm_it_is_said_what_to_install():
    script = (
        "import sys; sys.modules['mlx_lm'] = None\n"
        "from glm_dsa.__main__ import main\n"
        "sys.exit(main(['generate', '--model', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 10
    assert done.stderr == "glm-dsa: glm_dsa.mlx_lm needs mlx-lm: pip install 'glm-dsa[mlx-lm]'\n"
