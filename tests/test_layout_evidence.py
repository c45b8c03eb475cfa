"""The weights are asked for their layout: the gate's claim, on kept checkpoints and on what was done to them."""

import json
import shutil
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import glm_dsa
from glm_dsa import ModelArgs
from glm_dsa.model import parameters_of
from reference import checkpoints, layout, stored
from reference.kept import TRAINED
from reference.stored import read_tensors
from verify.claims.test_release_layout import CLAIM, STAGE, test_layout
from verify.core.checker import Discrepancy, Judge
from verify.core.report import FAULT, Report
from verify.engines import layout_evidence
from verify.engines.headers import headers_of
from verify.gate.options import LAYOUT
from verify.release.request import OnTrial
from verify.release.run import Trial

test_layout.__test__ = False  # the gate's, not one of these
OTHER = {"interleaved": "half-split", "half-split": "interleaved"}
SLOW = pytest.mark.slow("verify/engines/layout_evidence", "verify/claims/test_release_layout", "reference/layout")
OWN, PUBLISHED = "indexer_rope_traditional", "indexer_rope_interleave"


@pytest.fixture(scope="module", params=list(layout.LAYOUTS))
def kept(request):
    return request.param


@pytest.fixture(scope="module")
def four_bit(kept, tmp_path_factory):
    """In mlx-lm's layout, its indexers in 4 bit too."""
    model, folder = glm_dsa.load(TRAINED / kept), tmp_path_factory.mktemp("layout") / kept

    def predicate(_, module):
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0 and {"group_size": 32, "bits": 4}

    nn.quantize(model, class_predicate=predicate)
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), parameters_of(model))
    for file in ("config.json", "tokenizer.json"):
        shutil.copy(TRAINED / kept / file, folder)
    return folder


def with_config(folder, target, **changes):
    """Other keys over the same tensors. None takes a key away."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).symlink_to(file.resolve())
    config = json.loads((folder / "config.json").read_text()) | changes
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return target


def claim(folder, given, layers=None, prompt=None):
    """What the gate says: (passed, failed or skipped, the reason, its report)."""
    report = Report()
    report.not_verified[LAYOUT] = "due"
    trial = Trial(OnTrial.of(headers_of(str(folder)), tokens=40, layers=layers), seed=0)
    judge = Judge(report, CLAIM, "again", 0)
    request = SimpleNamespace(config=given({} if prompt is None else {"--prompt-file": str(prompt)}))
    try:
        test_layout(trial, judge, report, request)
    except Discrepancy as error:
        return "failed", str(error), report
    except pytest.skip.Exception as error:
        return "skipped", str(error), report
    assert LAYOUT not in report.not_verified
    return "passed", report.comparisons[-1].note, report


@pytest.mark.parametrize("bits", [16, pytest.param(4, marks=SLOW)])
def test_kept_checkpoints_agree_and_turned_round_are_a_fault_with_its_key(kept, four_bit, bits, tmp_path, given):
    folder = TRAINED / kept if bits == 16 else four_bit
    outcome, line, _ = claim(folder, given)
    assert outcome == "passed"
    assert f"the weights say {kept}" in line
    assert "6 texts of 256 tokens" in line
    assert layout_evidence.SMALL in line
    turned = with_config(folder, tmp_path / "turned", **{PUBLISHED: OTHER[kept] == "interleaved"})
    outcome, line, report = claim(turned, given)
    assert outcome == "failed"
    assert f'set "{PUBLISHED}": {json.dumps(kept == "interleaved")}' in line
    assert (report.comparisons[-1].verdict, report.comparisons[-1].stage) == (FAULT, STAGE)


def test_the_builders_own_key_decides_and_is_the_one_named(tmp_path, given):
    """D1: what published half-split builds carry."""
    keys = {PUBLISHED: True, "indexer_norm_eps": 1e-6}
    build = with_config(TRAINED / "half-split", tmp_path / "d1", **keys, **{OWN: False})
    assert claim(build, given)[0] == "passed"
    outcome, line, _ = claim(with_config(TRAINED / "interleaved", tmp_path / "own", **keys, **{OWN: False}), given)
    assert (outcome, f'set "{OWN}": true' in line) == ("failed", True)
    silent = with_config(TRAINED / "interleaved", tmp_path / "silent", **{PUBLISHED: None})
    outcome, line, _ = claim(silent, given)
    assert (outcome, f'set "{PUBLISHED}": true' in line) == ("failed", True)


def shuffled(folder, target, change):
    """change(name of an indexer's tensor, the tensor, the others') -> another."""
    shutil.copytree(folder, target)
    for file in target.glob("model*.safetensors"):
        tensors = mx.load(str(file))
        ours = {n: np.array(t.astype(mx.float32)) for n, t in tensors.items() if ".indexer." in n}
        changed = {n: mx.array(np.ascontiguousarray(change(n, t))).astype(tensors[n].dtype) for n, t in ours.items()}
        mx.save_safetensors(str(file), tensors | changed, metadata={"format": "pt"})
    return target


def among_layers(folder):
    read = read_tensors(folder)
    following = {"0": "1", "1": "2", "2": "0"}

    def change(name, tensor):
        parts = name.split(".")
        parts[2] = following.get(parts[2], parts[2])
        return read(".".join(parts)) if parts[2] in following and "layers.6" not in name else tensor

    return change


def alike(config, seed):
    """The rotary rows of each head in another order, the same in queries and keys: what only positions tell is lost."""
    order = np.arange(config["index_head_dim"])
    order[: config["qk_rope_head_dim"]] = np.random.default_rng(seed).permutation(config["qk_rope_head_dim"])

    def change(name, tensor):
        if "wq_b" in name:
            return tensor.reshape(-1, len(order), tensor.shape[-1])[:, order].reshape(tensor.shape)
        return tensor if "weights_proj" in name else tensor[order]

    return change


@pytest.mark.parametrize(
    "how", ["rows", *(pytest.param(how, marks=SLOW) for how in ("among layers", "alike 0", "alike 1", "alike 3"))]
)
def test_shuffled_indexers_are_not_verified(kept, tmp_path, given, how):
    """Under either layout in config.json: no fault. The last three fooled a verdict that asked all layers together alone."""
    source = TRAINED / kept
    config, random = json.loads((source / "config.json").read_text()), np.random.default_rng(0)
    if how == "rows":
        change = lambda _, tensor: random.permutation(tensor)  # noqa: E731
    else:
        change = among_layers(source) if how == "among layers" else alike(config, int(how[-1]))
    build = shuffled(source, tmp_path / "shuffled", change)
    for folder in (build, with_config(build, tmp_path / "turned", **{PUBLISHED: OTHER[kept] == "interleaved"})):
        outcome, line, report = claim(folder, given)
        assert outcome == "skipped", line
        assert "config.json says" in line
        assert "random keys" in report.comparisons[-1].note  # what was measured is told all the same


def test_what_cannot_be_asked_is_not_verified_with_its_reason(tmp_path, given):
    """No tokenizer, a short text, ids beyond the vocabulary, layers left out; weights that were never trained."""
    kept = TRAINED / "interleaved"
    bare = with_config(kept, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    short = tmp_path / "short.txt"
    short.write_text("The gate judges what it is shown. " * 24)  # 816 tokens
    random = checkpoints.write(tmp_path / "random", checkpoints.glm_5_2(num_hidden_layers=4, vocab_size=300))
    small = checkpoints.write(tmp_path / "small", checkpoints.glm_5_2(num_hidden_layers=4, vocab_size=64))
    for folder in (random, small):
        shutil.copy(kept / "tokenizer.json", folder)
    for folder, options, reason in (
        (bare, {}, "no tokenizer.json"),
        (kept, {"prompt": short}, "816 tokens"),
        (kept, {"layers": {0, 1}}, "--layers"),
        (random, {}, "random keys"),
        (small, {}, "beyond the vocabulary of 64"),
    ):
        outcome, line, _ = claim(folder, given, **options)
        assert outcome == "skipped", line
        assert reason in line


def test_a_users_text_is_cut_into_different_pieces(tmp_path, given):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(layout_evidence.kept_texts().values())[:1300])
    outcome, line, _ = claim(TRAINED / "half-split", given, prompt=text)
    assert outcome == "passed"
    assert "5 texts of 256 tokens" in line
    with pytest.raises(ValueError, match="different pieces"):
        layout_evidence.pieces(np.ones(4000, int), 256)


def test_true_widths_stay_bounded():
    """T x T arrays of GLM-5.2's 64 heads; and texts that are long enough for them in any tokenizer of words."""
    args = SimpleNamespace(num_attention_heads=64, index_n_heads=32, index_topk=2048)
    length = layout_evidence.length_of(args)
    assert 3 * 4 * 64 * length**2 <= layout_evidence.SCORES < 2 << 30
    texts = layout_evidence.kept_texts()
    assert len(texts) >= 6
    assert all(len(text) > 6000 and text.isascii() for text in texts.values())
    tokens = [len(text) / 5 for text in texts.values()]
    assert min(tokens) > length


def test_the_embedding_is_read_by_rows(monkeypatch):
    read = read_tensors(TRAINED / "interleaved")
    monkeypatch.setattr(stored, "SLAB", 16)
    tokens = np.random.default_rng(0).integers(0, 262, (2, 9))
    whole = read(stored.EMBEDDING).astype(np.float32)
    assert np.array_equal(stored.InFloat32(read).embed(tokens), whole[tokens])


def test_the_layout_asked_is_the_one_in_force():
    config = json.loads((TRAINED / "interleaved" / "config.json").read_text())
    for keys, key in (({}, PUBLISHED), ({OWN: True}, OWN)):
        assert layout_evidence.key_of(ModelArgs.from_dict(config | keys)) == key
