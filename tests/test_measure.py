"""The measurements of the small checkpoint, each on a case whose answer is known."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest

from reference import checkpoints, corpus, hf, layout
from reference.capture import capture
from reference.equations import Conventions
from reference.kept import TRAINED, probes
from reference.stored import read_tensors, weights_of
from reference.training import card, measure
from verify.gate import plugin as gate

FOLDERS = sorted(file.parent for file in TRAINED.glob("*/config.json"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write(tmp_path_factory.mktemp("ck"), checkpoints.glm_5_2(vocab_size=262), seed=3)


def test_bits_of_a_trigram_model(monkeypatch):
    """Two bytes tell the third, but for what the back-off keeps; the first two are not asked."""
    text = corpus.encode("abcabcabcabd" * 300)
    monkeypatch.setattr(corpus, "standard_library", lambda held_out: text)
    known, unknown = measure.trigram_bits(np.stack([corpus.encode("bcabca"), corpus.encode("xyzxyz")]))
    # after "bc" comes a, after "ca" b, after "ab" c three times in four: (0 + 0 + 0.415 + 0) / 4 places
    assert known == pytest.approx(np.log2(4 / 3) / 4, abs=0.01)
    assert unknown > 8


def test_bits_of_a_model(folder):
    model, tokens = hf.load(folder), np.arange(6, 46)[None]
    logits = hf.forward(model, tokens)[0].double().log_softmax(-1)
    due = -np.mean([float(logits[i - 1, tokens[0, i]]) for i in range(2, 40)]) / np.log(2)
    assert measure.bits_per_byte(model, tokens)[0] == pytest.approx(due)


def test_a_needle_lies_where_it_is_said_to(monkeypatch):
    monkeypatch.setattr(corpus, "standard_library", lambda held_out: corpus.encode("def f(x): return x\n" * 40))
    prompts, values = measure.needles(np.random.default_rng(0), 5, 128)
    for prompt, value in zip(prompts, values, strict=True):
        asks, said = len(prompt) - 1, len(prompt) - 1 - 128
        assert np.array_equal(prompt[said : said + corpus.VALUE], value)
        question = prompt[asks - corpus.KEY : asks + 1]
        assert np.array_equal(question, prompt[said - corpus.KEY - 1 : said])
        text, key = corpus.decode(prompt), corpus.decode(question)
        assert text.count(key) == 2  # said once, asked once
        assert key[: corpus.KEY] in corpus.keys(held_out=True)


def test_what_replaces_the_indexers_choice(folder):
    model, tokens = hf.load(folder), np.arange(6, 106)[None]
    topk = model.config.index_topk
    with measure.choosing(model, "recent"), capture(model) as seen:
        hf.forward(model, tokens)
    recent = np.sort(seen["layers.3.self_attn.selection"][0])  # a shared layer
    assert all(np.array_equal(recent[q], np.arange(q - topk + 1, q + 1)) for q in range(topk, 100))
    with measure.choosing(model, "random"), capture(model) as seen:
        hf.forward(model, tokens)
    chosen = seen["layers.0.self_attn.selection"][0]
    assert not np.array_equal(np.sort(chosen[60:]), np.sort(seen["layers.1.self_attn.selection"][0][60:]))
    assert all(len(set(chosen[q])) == topk and q in chosen[q] and chosen[q].max() <= q for q in range(topk, 100))
    assert len({tuple(sorted(chosen[q])) for q in range(60, 100)}) == 40
    with capture(model) as seen:  # and all is as before
        hf.forward(model, tokens)
    assert not np.array_equal(np.sort(seen["layers.0.self_attn.selection"][0][60:]), np.sort(chosen[60:]))


def as_half_split(config, read):
    """The weights of an interleaved indexer, reordered so that they mean the same under half-split RoPE."""
    rotary, width = config["qk_rope_head_dim"], config["index_head_dim"]
    order = np.concatenate([np.arange(0, rotary, 2), np.arange(1, rotary, 2), np.arange(rotary, width)])

    def get(name):
        tensor = read(name)
        if ".indexer." not in name or "weights_proj" in name:
            return tensor
        if name.endswith("wq_b.weight"):
            return tensor.reshape(-1, width, tensor.shape[-1])[:, order].reshape(tensor.shape)
        return tensor[order]

    return get


def test_captured_mass_follows_the_weights(folder):
    """Rows of wq_b and wk reordered: what was captured under one layout is captured under the other."""
    config, read = json.loads((folder / "config.json").read_text()), weights_of(folder)
    tokens = np.random.default_rng(0).integers(6, 262, (2, 64))
    before = layout.captured_mass(config, read, tokens)
    after = layout.captured_mass(config, as_half_split(config, read), tokens)
    assert before["interleaved"].keys() == set(range(8))
    for layer in range(8):
        assert np.allclose(before["interleaved"][layer], after["half-split"][layer], atol=1e-9)
    assert not np.allclose(before["interleaved"][0], before["half-split"][0], atol=1e-3)
    assert all((mass > 0).all() and (mass < 1).all() for layers in before.values() for mass in layers.values())


def test_captured_mass_is_the_share_of_attention_on_the_choice(folder):
    """By hand, from HF's dense attention and HF's selection: a full layer, and one that shares."""
    config, read = json.loads((folder / "config.json").read_text()), weights_of(folder)
    tokens, topk = np.random.default_rng(0).integers(6, 262, (1, 64)), 5
    conventions = Conventions(indexer_rope="interleaved")
    mass = layout.captured_mass(config, read, tokens, layers=4, topk=topk)
    model, kept, queries = hf.load(folder, conventions, index_topk=64), {}, np.arange(2 * topk, 64)
    for i in (0, 2, 3):
        attention = model.model.layers[i].self_attn
        attention.register_forward_hook(lambda m, a, out, i=i: kept.update({i: out[1].mean(1)[0].numpy()}))
    with capture(model) as seen:
        hf.forward(model, tokens)
    for i, full in ((0, 0), (2, 2), (3, 2)):
        scores = seen[f"layers.{full}.self_attn.indexer.scores"][0]
        due = [kept[i][q, np.argsort(-scores[q])[:topk]].sum() for q in queries]
        assert mass["interleaved"][i][0] == pytest.approx(np.mean(due), abs=1e-4)


def test_the_first_layers_need_no_others_weights(folder):
    config, read = json.loads((folder / "config.json").read_text()), read_tensors(folder)
    asked = []

    def get(name):
        asked.append(name)
        return read(name)

    mass = layout.captured_mass(config, get, np.random.default_rng(0).integers(6, 262, (3, 40)), layers=4)
    assert len(mass["half-split"]) == 4
    assert len(asked) == len(set(asked)), "each tensor is read once, whatever the number of texts"
    assert not any("experts" in name or ".mlp." in name for name in asked if name.startswith("model.layers.3."))
    assert not any(name.startswith(("model.layers.4.", "lm_head", "model.norm")) for name in asked)


def test_an_fp8_checkpoint_captures_what_its_blocks_mean(folder, tmp_path):
    checkpoints.write_fp8(folder, tmp_path / "fp8", tmp_path / "plain")
    config = json.loads((folder / "config.json").read_text())
    tokens = np.random.default_rng(0).integers(6, 262, (1, 40))
    packed, plain = (
        layout.captured_mass(config, read_tensors(tmp_path / f), tokens, layers=3) for f in ("fp8", "plain")
    )
    for layer in range(3):
        assert packed["interleaved"][layer] == pytest.approx(plain["interleaved"][layer], abs=0.02)


@pytest.mark.parametrize(
    ("length", "options", "message"),
    [
        (64, {"topk": 32}, "64 tokens do not suffice to tell choices of 32 apart: expected at least 65"),
        (7, {}, "7 tokens do not suffice"),
        (64, {"topk": 0}, "64 tokens do not suffice"),
        (64, {"layers": 9}, "layers = 9: the model has 8"),
        (64, {"layers": 0}, "layers = 0: the model has 8"),
    ],
)
def test_what_cannot_tell_a_layout_is_refused(folder, length, options, message):
    config, read = json.loads((folder / "config.json").read_text()), weights_of(folder)
    with pytest.raises(ValueError, match=message):
        layout.captured_mass(config, read, np.zeros((1, length), int), **options)
    assert layout.captured_mass(config, read, np.zeros((1, 65), int), layers=1, topk=32)["interleaved"][0].shape == (1,)


def test_what_has_no_layout_is_refused(folder, tmp_path):
    config, read = json.loads((folder / "config.json").read_text()), read_tensors(folder)
    with pytest.raises(ValueError, match="no indexer"):
        layout.captured_mass({k: v for k, v in config.items() if k != "index_topk"}, read, np.zeros((1, 64), int))
    with pytest.raises(ValueError, match="no tensor model"):
        layout.captured_mass(config, read_tensors(tmp_path), np.zeros((1, 64), int))


def of_layers(*layers, chance=0.1):
    """(interleaved, half-split) masses by text of each layer -> what `captured_mass` gives."""
    found = {
        rope: {i: np.array(masses[side]) for i, masses in enumerate(layers)} for side, rope in enumerate(layout.LAYOUTS)
    }
    return found | {"chance": {i: np.full(len(masses[0]), chance) for i, masses in enumerate(layers)}}


def test_evidence_names_no_layout_without_grounds(folder):
    low, high = [0.2, 0.21, 0.19, 0.2], [0.75, 0.8, 0.9, 0.8]
    far = layout.evidence(of_layers((low, high), (low, high)))
    assert (far.layout, far.doubt) == ("half-split", "")
    assert far.ratio == pytest.approx(0.8125 / 0.2)
    half = np.array(high) / 2
    for layers, why in (
        ([([0.7, 0.9, 0.8, 0.7], high)] * 2, "too near"),
        ([([0.8] * 8, [0.82] * 8)] * 2, "too near"),
        ([(np.array(low) / 2, half)] * 2, "never learned"),
        ([(low, high), (low, high), (low, half / 2)], "never learned"),
        ([(low[:3], high[:3])] * 2, "3 texts"),
        ([(low, high)], "one layer"),
        ([(low, high), (low, high), (high, half + 0.2)], "different layouts"),
    ):
        found = layout.evidence(of_layers(*layers))
        assert found.layout is None, layers
        assert why in found.doubt
    config, read = json.loads((folder / "config.json").read_text()), weights_of(folder)
    random = layout.captured_mass(config, read, np.random.default_rng(0).integers(6, 262, (8, 96)))
    assert layout.evidence(random).layout is None, "indexers that never learned"


@pytest.mark.parametrize("kept", FOLDERS, ids=lambda f: f.name)
@pytest.mark.slow("reference/layout", "verify/engines/layout_evidence")
def test_indexers_that_never_learned_have_no_layout(kept):
    """Each would favour one by luck of its weights, at ratios up to 1.6; what they catch is what chance does."""
    config, read = json.loads((kept / "config.json").read_text()), weights_of(kept)
    texts = np.stack([corpus.encode(text)[:200] for text in probes()["texts"][:4]])
    assert layout.evidence(layout.captured_mass(config, read, texts, layers=3)).layout == kept.name

    def changed(change):
        return functools.cache(lambda name: change(name, read(name)) if ".indexer." in name else read(name))

    for seed in range(3):
        random = np.random.default_rng(seed)
        shuffled = changed(lambda _, tensor, random=random: random.permutation(tensor.ravel()).reshape(tensor.shape))
        assert layout.evidence(layout.captured_mass(config, shuffled, texts, layers=3)).layout is None
    negated = changed(lambda name, tensor: -tensor if "weights_proj" in name else tensor)
    assert layout.evidence(layout.captured_mass(config, negated, texts, layers=3)).layout is None
    broken = changed(lambda name, tensor: tensor * np.nan)
    with pytest.raises(ValueError, match="layer 0: its indexer's scores are not finite"):
        layout.captured_mass(config, broken, texts, layers=3)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((4, 65)), "float64 \\[4, 65\\]: expected whole numbers"),
        (np.zeros(65, int), "expected whole numbers \\[texts, length\\]"),
        (np.zeros((0, 65), int), "whole numbers"),
        (np.full((1, 65), -1), "tokens from -1 to -1: expected from 0 to below vocab_size"),
        (np.full((1, 65), 10**6), "from 0 to below vocab_size"),
        (np.zeros((2, 65), int), "two texts are the same"),
    ],
)
def test_texts_that_are_none_are_refused(folder, tokens, message):
    config, read = json.loads((folder / "config.json").read_text()), weights_of(folder)
    with pytest.raises(ValueError, match=message):
        layout.captured_mass(config, read, tokens)


def test_intervals():
    every, none = layout.interval(np.ones(100, bool)), layout.interval(np.zeros(100, bool))
    assert (every.low, every.high) == pytest.approx((0.963, 1.0), abs=1e-3)
    assert (none.low, none.high) == pytest.approx((0.0, 0.037), abs=1e-3)
    assert layout.interval(np.arange(100) < 50).low == pytest.approx(0.404, abs=1e-3)
    drawn = layout.interval(np.random.default_rng(0).normal(3, 1, 400))
    assert drawn.low == pytest.approx(drawn.mean - 0.098, abs=0.02)
    assert drawn.high == pytest.approx(drawn.mean + 0.098, abs=0.02)


# -- what is kept in the repository


def test_there_are_checkpoints_to_keep():
    assert FOLDERS


@pytest.mark.parametrize("kept", FOLDERS, ids=lambda f: f.name)
def test_the_card_says_what_was_measured(kept):
    assert (kept / "README.md").read_text() == card.card(kept, json.loads((kept / card.MEASURED).read_text()))
    measured = json.loads((kept / card.MEASURED).read_text())
    assert measured["sha256"] == measure.digests(kept)
    assert sum(f.stat().st_size for f in kept.iterdir()) < 8e6
    assert len(list(kept.glob("*.safetensors"))) >= 2
    theirs = gate.FOLDER / "configs" / "glm-5.2.json"
    assert json.loads(theirs.read_text()).keys() == json.loads((kept / "config.json").read_text()).keys()


@pytest.mark.parametrize("kept", FOLDERS, ids=lambda f: f.name)
def test_it_has_learned_what_it_was_to_learn(kept):
    measured = json.loads((kept / card.MEASURED).read_text())
    bits, recall, mass = (measured[k] for k in ("bits_per_byte", "recall", "captured_mass"))
    assert bits["saved, against the trigram model"]["low"] > 0.5
    assert bits["trained"]["high"] < bits["untrained twin"]["low"]
    assert recall["4"]["learned"]["mean"] >= max(0.6, 3 * recall["4"]["recent"]["mean"])
    rope = "interleaved" if json.loads((kept / "config.json").read_text())["indexer_rope_interleave"] else "half-split"
    assert mass["layout"] == rope
    assert mass["ratio"] >= 1.3
    first, second, third = (measured["accepted"][step]["mean"] for step in "123")
    assert 1 > first > second > third > 0


def test_probes_are_what_the_gate_takes_them_for():
    training = set(corpus.keys(held_out=False))
    for probe in probes()["needles"]:
        prompt, key = probe["prompt"], probe["prompt"][-corpus.KEY - 1 : -1]
        assert key not in training
        assert prompt.count(f"{key}=") == 2
        assert len(prompt) - 1 - prompt.index(f"{key}={probe['value']}\n") - corpus.KEY - 1 == 4 * 64
    for text in [*probes()["texts"], *(p["prompt"] for p in probes()["needles"])]:
        assert text.isascii()
        assert corpus.decode(corpus.encode(text)) == text


def test_a_users_mistakes_are_told_in_a_line(tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    for file in ("config.json", card.TRAINING):
        (empty / file).write_text("{}")
    for arguments, message in (
        ([str(tmp_path)], "config.json: no such file; due is the folder `checkpoint` of reference.train"),
        ([str(tmp_path), "--texts", "0"], "expected a number of at least 4"),
        ([str(empty)], "training.json: not what reference.train writes"),
        ([str(tmp_path), "--probes", str(tmp_path / "file")], "expected one of them"),
        (["--probes", str(tmp_path / "no" / "file")], "No such file or directory"),
    ):
        with pytest.raises(SystemExit):
            measure.main(arguments)
        assert message in capsys.readouterr().err
