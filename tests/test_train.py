"""The trainer: what the indexer is taught is what HF selects by, and an interrupted run ends where an uninterrupted one does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from reference import checkpoints, corpus, hf
from reference.capture import capture
from reference.stored import read_tensors
from reference.training import train
from reference.training import trainee as pupil

SMALL = checkpoints.glm_5_2(
    hidden_size=32, intermediate_size=32, moe_intermediate_size=16, kv_lora_rank=32, q_lora_rank=32, index_topk=8,
    num_hidden_layers=5, vocab_size=262, initializer_range=0.2,
)  # fmt: skip
NORM = "parameter/model.norm.weight"
PHASES = tuple(
    train.Phase(mode, mode, 2, 2, 24, 0.5, 4, (1e-2, 1e-3), filler=True, drafts=True)
    for mode in ("dense", "warm-up", "sparse")
)


@pytest.fixture(autouse=True)
def short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {side: corpus.encode(f"def f(x): return {side}\n" * 40) for side in (False, True)}
    monkeypatch.setattr(corpus, "standard_library", lambda held_out: texts[held_out])


@pytest.mark.parametrize("rope", ["interleaved", "half-split"])
def test_the_scores_taught_are_those_by_which_hf_selects(rope: str) -> None:
    trainee = pupil.Trainee(SMALL, rope, seed=0)
    tokens = torch.as_tensor(np.random.default_rng(0).integers(6, 262, (2, 24)))
    with capture(trainee.model) as stages:
        trainee.losses(tokens, torch.ones_like(tokens, dtype=torch.bool), "sparse", drafts=False)
    layer = trainee.model.model.layers[0].self_attn
    inputs: dict = {}
    hook = layer.indexer.register_forward_pre_hook(lambda m, args: inputs.update(args=args))
    with capture(trainee.model) as theirs:
        hf.forward(trainee.model, tokens)
    hook.remove()
    taught = pupil.Teachable(layer.indexer)
    selected = taught(*inputs["args"])
    assert np.array_equal(np.sort(selected), np.sort(theirs["layers.0.self_attn.selection"]))
    seen = np.tril(np.ones((24, 24), bool))
    scores = taught.scores.detach().numpy()[:, seen]
    assert np.abs(scores - theirs["layers.0.self_attn.indexer.scores"][:, seen]).max() < 1e-5 * np.abs(scores).max()
    # and the trainer's own loop over HF's layers chooses as HF's forward does
    for i in (0, 1, 2, 3, 4):
        stage = f"layers.{i}.self_attn.selection"
        assert np.array_equal(np.sort(stages[stage]), np.sort(theirs[stage]))


def test_only_the_indexer_learns_from_following() -> None:
    trainee = pupil.Trainee(SMALL, "interleaved", seed=0)
    tokens = torch.as_tensor(np.random.default_rng(0).integers(6, 262, (2, 24)))
    for mode in ("warm-up", "sparse"):
        trainee.losses(tokens, torch.ones_like(tokens, dtype=torch.bool), mode, drafts=True)["indexer"].backward()
        moved = {n for n, p in trainee.parameters().items() if p.grad is not None and p.grad.abs().max() > 0}
        assert moved == {n for n in trainee.parameters() if ".indexer." in n}
        for parameter in trainee.parameters().values():
            parameter.grad = None


def test_following_is_zero_at_the_target_and_positive_elsewhere() -> None:
    scores = torch.randn(1, 6, 6) + hf.additive_causal_mask(1, 6, 6, torch.float32)[0]
    attention = torch.softmax(scores, -1)
    assert float(pupil.follow(scores, attention, None)) == pytest.approx(0, abs=1e-6)
    assert float(pupil.follow(scores + 3 * torch.randn(1, 6, 6), attention, None)) > 0.1
    # over a selection: what lies outside does not count
    selected = torch.zeros(1, 6, 1, dtype=torch.int32)
    assert float(pupil.follow(scores, torch.ones(1, 6, 6), selected)) == pytest.approx(0, abs=1e-6)


def test_a_shared_layers_attention_is_followed_by_the_full_one_below() -> None:
    assert pupil.served([0, 1, 2, 6, 8], 9) == {0: [0], 1: [1], 2: [2, 3, 4, 5], 6: [6, 7], 8: [8]}


def test_biases_move_against_the_load() -> None:
    trainee = pupil.Trainee(SMALL, "interleaved", seed=0)
    router = trainee.model.model.layers[-1].mlp.gate
    trainee.loads = {router: torch.tensor([9, 1, *[5] * 14])}
    trainee.balance()
    bias = router.e_score_correction_bias
    assert bias[:2].tolist() == pytest.approx([-pupil.BIAS_STEP, pupil.BIAS_STEP])
    assert not bias[2:].any()


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = train.train(tmp_path / "whole", SMALL, PHASES)
    for _ in range(3):
        parts = train.train(tmp_path / "parts", SMALL, PHASES, stop_after=2)
        with (tmp_path / "parts" / train.LOG).open("a") as log:  # killed between two savings: this line is not to stay
            log.write('{"step": 99}\n{"step": 1')
    train.train(tmp_path / "parts", SMALL, PHASES, stop_after=0)
    for (name, a), b in zip(whole.parameters().items(), parts.parameters().values(), strict=True):
        assert torch.equal(a, b), name
    lines = [json.loads(line) for line in (tmp_path / "parts" / train.LOG).read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert {"text", "indexer", "mtp"} <= set(lines[-1])
    fresh = pupil.Trainee(SMALL, "interleaved", 0).parameters()
    assert all(not torch.equal(p, fresh[n]) for n, p in whole.parameters().items() if p.dim() >= 2)  # everything learns


def test_a_users_mistakes_are_told_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / train.STATE).write_bytes(b"no safetensors")
    for arguments, message in (
        (["--out", str(tmp_path / "file")], "File exists"),
        (["--out", str(tmp_path / "damaged")], "state.safetensors: damaged, or not this trainer's"),
        (["--out", str(tmp_path), "--seed", "-1"], "expected a whole number, not negative, below 2^63"),
        (["--out", str(tmp_path), "--seed", str(1 << 63)], "below 2^63"),
    ):
        with pytest.raises(SystemExit):
            train.main(arguments)
        assert message in capsys.readouterr().err


def test_a_state_of_another_recipe_is_refused(tmp_path: Path) -> None:
    train.train(tmp_path, SMALL, PHASES, stop_after=1)
    with pytest.raises(ValueError, match=r"state.safetensors: the state of another recipe"):
        train.train(tmp_path, SMALL, PHASES, seed=1)


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    with train.alone_in(tmp_path), pytest.raises(ValueError, match="another run is training in this folder"):
        train.train(tmp_path, SMALL, PHASES, stop_after=1)
    train.train(tmp_path, SMALL, PHASES, stop_after=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, metadata: tensors.update({NORM: tensors[NORM][None]}), NORM),
        (lambda tensors, metadata: tensors.update({NORM: tensors[NORM] * torch.nan}), NORM),
        (lambda tensors, metadata: tensors.update({NORM: tensors[NORM].bfloat16()}), NORM),
        (lambda tensors, metadata: tensors.pop(NORM), NORM),
        (lambda tensors, metadata: metadata.update(step="9999"), "step 9999"),
        (lambda tensors, metadata: metadata.pop("step"), "'step'"),
    ],
)
def test_a_damaged_state_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    train.train(tmp_path, SMALL, PHASES, stop_after=1)
    tensors = load_file(tmp_path / train.STATE)
    with safe_open(tmp_path / train.STATE, "pt") as state:
        metadata = dict(state.metadata())
    change(tensors, metadata)
    save_file(tensors, tmp_path / train.STATE, metadata)
    with pytest.raises(ValueError, match=rf"state.safetensors: damaged, or not this trainer's.*{message}"):
        train.train(tmp_path, SMALL, PHASES)


def test_a_training_that_diverges_keeps_its_last_state(tmp_path: Path) -> None:
    train.train(tmp_path, SMALL, PHASES, stop_after=1)
    before = (tmp_path / train.STATE).read_bytes()
    wild = tuple(replace(phase, rate=(1e30, 1e30)) for phase in PHASES)
    with pytest.raises(ValueError, match="the training has diverged"):
        train.train(tmp_path / "wild", SMALL, wild)
    assert (tmp_path / train.STATE).read_bytes() == before
    assert not (tmp_path / "wild" / train.STATE).exists()


def test_what_is_written_loads_in_hf_with_all_its_parts(tmp_path: Path) -> None:
    trainee = train.train(tmp_path, SMALL, PHASES, stop_after=1)
    folder = pupil.export(trainee, tmp_path / "checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "def f(x):\n\treturn 'é€😀'\x00\n"
    assert np.array_equal(tokenizer.encode(text), corpus.encode(text))
    trained, stored = trainee.model.state_dict(), hf.load(folder, with_mtp=True).state_dict()
    assert trained.keys() == stored.keys()
    for name, tensor in trained.items():
        as_stored = tensor if name.endswith("e_score_correction_bias") else tensor.bfloat16().float()
        assert torch.equal(stored[name], as_stored), name
    assert len(list(folder.glob("*.safetensors"))) >= 2
    weights = read_tensors(folder)
    assert {f"model.layers.5.{n}.weight" for n in ("enorm", "hnorm", "eh_proj", "shared_head.norm")} <= set(
        weights.names
    )
