"""A release judged layer by layer: any layout and format, and what is wrong with it named."""

import json
import re
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import glm_dsa
from glm_dsa import attention, mtp
from glm_dsa.model import parameters_of
from reference import checkpoints, hf
from reference.equations import Conventions
from verify import FOLDER
from verify.core import bounds, stages
from verify.core.checker import Discrepancy, Judge
from verify.core.exits import NotJudged
from verify.core.report import FAULT, Report
from verify.engines import base, lengths
from verify.engines.headers import headers_of
from verify.release import cost, request
from verify.release.request import OnTrial
from verify.release.resume import Saved
from verify.release.run import Trial

CONFIG = checkpoints.packable(num_hidden_layers=5, first_k_dense_replace=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("release") / "hf", CONFIG)


def packed(source, folder, bits, **others):
    """As mlx-lm converts: `others` are the bits of modules whose path holds that part; 0 leaves them as they are."""
    model = glm_dsa.load(source)

    def predicate(path, module):
        own = next((b for part, b in others.items() if part in path), bits)
        return hasattr(module, "to_quantized") and "indexer" not in path and own > 0 and {"group_size": 64, "bits": own}

    nn.quantize(model, class_predicate=predicate)
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), parameters_of(model))
    (folder / "config.json").write_text((source / "config.json").read_text())
    return folder


def trial_of(folder, **options):
    return Trial(OnTrial.of(headers_of(str(folder)), **options), seed=0)


def judged(trial):
    """The comparison at which the judge stops, or None where all layers and the head agree."""
    judge = Judge(Report(), "claim", "again", 0)
    try:
        for layer in trial.release.layers:
            reference, ours, _ = trial.layer(layer)
            judge.stages(ours, reference, local=True, replaced=reference.injections)
        reference, ours, _, _ = trial.logits()
        judge.stages(ours, reference, local=True)
    except Discrepancy:
        return judge.report.comparisons[-1]
    return None


@pytest.mark.parametrize("kind", ["bf16", "fp8", "4 bit", "mixed", "mlx, bf16"])
def test_every_format_agrees(source, tmp_path, kind):
    folder = source
    if kind == "fp8":
        checkpoints.write_fp8(source, tmp_path / "fp8", tmp_path / "plain")
        folder = tmp_path / "fp8"
    elif kind != "bf16":
        others = {"mixed": {"down_proj": 6, "o_proj": 8, "lm_head": 0}, "mlx, bf16": {"": 0}}.get(kind, {})
        folder = packed(source, tmp_path / "q", 4, **others)
    assert judged(trial_of(folder)) is None


def test_layer_by_layer_is_the_whole_run(source):
    """HF's streamed logits are those of HF's model in memory, and ours, run on its own, ends as ours does."""
    trial = trial_of(source)
    for layer in trial.release.layers:
        trial.layer(layer)
    whole = hf.forward(hf.load(source, Conventions.of(CONFIG)), trial.run.tokens).numpy()
    ours = np.array(glm_dsa.load(source, dtype=mx.float32)(mx.array(trial.run.tokens)))
    reference, _, free, _ = trial.logits()
    at = np.unique(np.linspace(0, trial.run.tokens.shape[1] - 1, 64).round().astype(int))
    assert np.abs(reference.hf["logits"] - whole[:, at]).max() < 1e-4 * np.abs(whole).max()
    assert np.abs(ours - whole).max() < 1e-3 * np.abs(whole).max()
    assert free.kl_max < 1e-6


def test_the_mtp_layer_is_the_last_of_them(source, monkeypatch):
    """Its first draft step is the whole model's; a fault in its glue is named."""
    trial = trial_of(source)
    assert trial.release.layers == [0, 1, 2, 3, 4, 5]
    for layer in range(5):
        trial.layer(layer)
    reference, _, drift = trial.layer(5)
    model, tokens = glm_dsa.load(source, dtype=mx.float32), trial.run.tokens
    following = mx.array(np.roll(tokens, -1, axis=1))
    whole = model.draft(model.model(mx.array(tokens)), following, model.make_mtp_cache(), 1)[0].hidden
    assert np.abs(np.array(whole) - reference.hf["layers.5.shared_head"]).max() < 1e-3
    assert drift.error < 1e-3
    assert trial_of(source, is_half=True).release.layers == [0, 1, 2, 3, 4]
    original = mtp.MtpLayer.step

    def swapped(self, hidden, embeddings, *rest):
        return original(self, embeddings, hidden, *rest)

    monkeypatch.setattr(mtp.MtpLayer, "step", swapped)
    assert judged(trial_of(source)).stage == "layers.5.eh_proj"


def test_sharp_attention_is_explained_by_the_equations_in_float32(source, monkeypatch):
    monkeypatch.setattr(bounds, "EXPLAINED", 1e-7)  # as if HF erred more than is usual
    trial = trial_of(source, layers={0})
    reference, ours, _ = trial.layer(0)
    assert set(reference.single) > {"self_attn.heads", "output"}
    assert all(error < bounds.EXPLAINED_AT_MOST / bounds.SAFETY for error in reference.single.values())
    for stage in ours:
        if stage in reference.hf and not stage.endswith("topk") and not stage.endswith("selection"):
            assert reference.bound(stage, True).value < 1e-3
    reference.single.clear()
    with pytest.raises(bounds.ReferencesDisagree, match="where float32 explains 1e-07 at most"):
        reference.bound("layers.0.output", True)


def test_a_fault_of_the_definition_is_named(source, tmp_path, monkeypatch):
    folder = packed(source, tmp_path / "q", 4)
    original = attention.MultiHeadLatentAttention.__init__

    def scaled(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.scale *= 1.01

    monkeypatch.setattr(attention.MultiHeadLatentAttention, "__init__", scaled)
    found = judged(trial_of(folder))
    assert found.verdict == FAULT
    assert found.stage == "layers.0.self_attn.heads"


def test_in_16_bit_it_agrees_within_what_hf_errs_there(source, monkeypatch):
    trial = trial_of(source, is_half=True)
    assert judged(trial) is None
    assert trial.run.own.dtype == mx.bfloat16
    original = attention.MultiHeadLatentAttention.__init__

    def scaled(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.scale *= 2

    monkeypatch.setattr(attention.MultiHeadLatentAttention, "__init__", scaled)
    assert judged(trial_of(source, is_half=True)).stage == "layers.0.self_attn.heads"


def test_in_16_bit_packed_weights_are_not_judged_on_a_cpu(source, tmp_path):
    """mlx sums their products in bfloat16 there; when it no longer does, this limit can go."""
    with pytest.raises(ValueError, match="--dtype bfloat16: on this device mlx's bare matmul of packed weights errs"):
        trial_of(packed(source, tmp_path / "q", 4), is_half=True)


def test_experts_come_in_chunks(source, monkeypatch):
    whole, parts = trial_of(source), trial_of(source)
    parts.run.chunk = 3
    assert whole.run.chunk == CONFIG["n_routed_experts"]
    for layer in (0, 1):
        ones, others = whole.layer(layer)[0].hf, parts.layer(layer)[0].hf
        for stage in stages.in_order(ones):
            assert np.allclose(ones[stage], others[stage], atol=1e-5), stage
    assert base.CHUNK >= 1 << 20


def test_what_it_cost_is_nothing_beside_itself_and_more_with_fewer_bits(source, tmp_path):
    folders = [source, *(packed(source, tmp_path / str(bits), bits) for bits in (4, 2))]
    original = headers_of(str(shutil.copytree(source, tmp_path / "original")))
    costs = []
    for folder in folders:
        trial = trial_of(folder, original=original, layers={0, 1, 2})
        paid = trial.logits()[-1]
        costs.append((trial.costs, paid))
    same, others = costs[0], costs[1:]
    assert same[1].kl_max < 1e-9
    assert same[1].top1 == 1.0
    assert abs(same[1].perplexity - 1) < 1e-5  # HF in float32, with one row and with two
    for layer_cost in same[0].values():
        assert max(layer_cost.attention, layer_cost.mlp, layer_cost.hidden, layer_cost.lost or 0) < 1e-4
        assert (layer_cost.selection or 1) == (layer_cost.routing or 1) == 1
    means = [paid.kl_mean for _, paid in others]
    assert means == sorted(means)
    assert means[0] > 1e-7
    for layer in same[0]:
        errors = [found[layer].mlp for found, _ in others]
        assert errors == sorted(errors)
    last = others[-1][0][0]  # the first full layer, at 2 bits: other keys are selected, and attention goes with them
    assert last.selection < 0.95
    assert last.lost > 0.01


def test_layers_may_be_passed_over_and_asked_for_out_of_turn(source):
    trial = trial_of(source, layers={0, 2})
    trial.upto(2)
    assert trial.finished == [0, 2]
    with pytest.raises(NotJudged, match="layer 0 was run, and not judged"):
        trial.layer(0)


@pytest.mark.parametrize("step", ["bounds", "weighing"])
def test_a_layer_whose_oracle_failed_is_not_run_again(source, tmp_path, monkeypatch, step):
    """Its module is let go by then: what that raises would speak against a sound release. Nor is its state saved."""

    def fails(*_):
        raise ValueError("an oracle's")

    release = OnTrial.of(headers_of(str(source)), tokens=24, layers={0, 1, 2})
    trial, judge = Trial(release, 0, Saved(tmp_path, release.identity(0))), Judge(Report(), "claim", "again", 0)
    trial.once(judge, "layers.0", lambda: trial.layer(0))
    owner, name = (trial, "_reference") if step == "bounds" else (trial.weighing, "layer")
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, fails)
        with pytest.raises(ValueError, match="an oracle's"):
            trial.layer(1)
    for again in (trial.layer, trial.upto):
        with pytest.raises(NotJudged, match="not run: layer 1 ended in an error"):
            again(1)
    trial.once(judge, "top", lambda: None)
    resumed = Trial(release, 0, Saved(tmp_path, release.identity(0)))
    fresh = Trial(release, 0)
    fresh.upto(0)
    assert (resumed.finished, list(resumed.said)) == ([0], ["layers.0"])
    assert np.array_equal(resumed.run.hf.numpy(), fresh.run.hf.numpy())


def test_what_cannot_be_judged_is_told_in_a_line(source, tmp_path):
    headers = headers_of(str(source))
    other = shutil.copytree(source, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    text = tmp_path / "text"
    text.write_text("ab")
    shared = next(i for i, t in enumerate(headers_args(headers).indexer_types) if t == "shared")
    for given, message in (
        ({"tokens": 1}, "--tokens 1: expected at least 2"),
        ({"layers": {7}}, "--layers: .* has 6 layers, from 0 on"),
        (
            {"layers": {shared}},
            f"--layers: layer {shared} shares the selection of layer {shared - 1}, which is expected too",
        ),
        ({"limits": {"kl_mean": 1.0}}, "--original is expected too"),
        ({"prompt": text}, r"expected .*tokenizer.json, to encode it with"),
    ):
        with pytest.raises(ValueError, match=message):
            OnTrial.of(headers, **given)
    (other / "config.json").write_text(json.dumps(config | {"rope_interleave": False}))
    with pytest.raises(ValueError, match="rope_interleave = false"):
        OnTrial.of(headers_of(str(other)))
    (other / "config.json").write_text(json.dumps(config | {"index_n_heads": 7}))
    with pytest.raises(ValueError, match=r"--original .*: index_n_heads = 7, .* has"):
        OnTrial.of(headers, original=headers_of(str(other)))
    (other / "config.json").write_text(json.dumps(config | {"routed_scaling_factor": 9.0}))
    faults = OnTrial.of(headers, original=headers_of(str(other))).differences()[0]
    assert len(faults) == 1
    assert re.fullmatch(r"config.json: routed_scaling_factor = .*, the original's says 9.0", faults[0].what)
    with pytest.raises(ValueError, match="kl_max has a limit already"):
        cost.parse_limits(["kl_max=1", "kl_max=2"])
    for limit in ("kl_mean", "kl_mean=x", "speed=3", "kl_mean=nan", "kl_max=-1"):
        with pytest.raises(ValueError, match=rf"--limit {limit}: expected NAME=NUMBER, NAME one of kl_mean"):
            cost.parse_limits([limit])


def headers_args(headers):
    return glm_dsa.ModelArgs.from_dict(headers.config)


def test_prompts_are_as_long_as_memory_allows(monkeypatch):
    big = json.loads((FOLDER / "configs" / "glm-5.2.json").read_text())
    args = glm_dsa.ModelArgs.from_dict(big)
    for gigabytes, length in ((8, None), (32, 2635), (1000, 8192)):
        monkeypatch.setattr(request.memory, "physical", lambda size=gigabytes * 10**9: size)
        if length is None:
            with pytest.raises(ValueError, match="add --index-topk 64, say"):
                lengths.default_length(args, 1)
        else:
            assert abs(lengths.default_length(args, 1) - length) <= 1


def test_limits_are_kept_or_named():
    paid = cost.Cost(0.01, 0.02, 0.03, 0.9, 10.0, 11.0)
    assert paid.over(cost.parse_limits(["kl_mean=0.01", "kl_p95=1", "kl_max=1", "top1=0.9", "perplexity=1.11"])) == []
    over = paid.over(cost.parse_limits(["kl_mean=0.009", "top1=0.95", "perplexity=1.05"]))
    assert [line.split()[0] for line in over] == ["kl_mean", "top1", "perplexity"]
    assert over[1] == "top1 0.9, at least 0.95 is asked for"


def test_a_resumed_run_says_its_faults_again(source, tmp_path):
    """And goes on with the layers that are left; under another identity it does not."""

    def judged_twice(trial):
        out = Report()
        judge, failures = Judge(out, "claim", "again", 0), []
        for layer in (0, 1):

            def check(layer=layer):
                reference, ours, _ = trial.layer(layer)
                judge.holds("case", f"layers.{layer}.output", layer != 0, "a fault")
                judge.stages(ours, reference, local=True, replaced=reference.injections)

            try:
                trial.once(judge, f"layers.{layer}", check)
            except Discrepancy as failure:
                failures.append(str(failure))
        return out.comparisons, failures

    release = OnTrial.of(headers_of(str(source)), layers={0, 1, 2})
    first = Trial(release, 0, Saved(tmp_path, release.identity(0)))
    again = Trial(release, 0, Saved(tmp_path, release.identity(0)))
    assert not again.finished
    found = judged_twice(first)
    assert len(found[1]) == 1
    again = Trial(release, 0, Saved(tmp_path, release.identity(0)))
    assert again.finished == [0, 1]
    assert judged_twice(again) == found
    for trial in (first, again):
        trial.layer(2)
    assert np.array_equal(first.run.hf.numpy(), again.run.hf.numpy())
    assert np.array_equal(np.array(first.run.own), np.array(again.run.own))
    for other in (release.identity(1), OnTrial.of(release.headers, layers={0, 1}).identity(0)):
        assert Saved(tmp_path, other).load() is None
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    assert Saved(tmp_path, release.identity(0)).load() is None
