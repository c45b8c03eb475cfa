"""A pruned build beside its original: experts matched by their router's rows, what was dropped told, the rest held to it."""

import json
import re
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch

import glm_dsa
from glm_dsa.model import parameters_of
from reference import checkpoints
from reference.equations import Conventions
from reference.layers import Layers
from reference.stored import read_tensors
from verify import drift
from verify.audit import audit
from verify.engines import pruning
from verify.engines.headers import headers_of
from verify.release.request import OnTrial
from verify.release.run import Trial
from verify.release.weights import Weighing

CONFIG = checkpoints.glm_5_2(num_hidden_layers=3, first_k_dense_replace=1, num_nextn_predict_layers=0)
SPARSE = (1, 2)
TOKENS = 24  # index_topk is 16
EVERY, KEPT = CONFIG["n_routed_experts"], 10


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("pruning") / "original", CONFIG, seed=4)


def kept_in(layer, moved=False):
    """Other experts in each layer; moved: in no order."""
    numbers = np.random.default_rng(layer).permutation(EVERY)[:KEPT]
    return numbers.tolist() if moved else sorted(numbers.tolist())


def pruned(original, folder, kept, do=lambda tensors: None, **config):
    """As REAP prunes: experts {layer: the numbers that stay}, their router rows and bias entries, n_routed_experts."""
    read, tensors = read_tensors(original), {}
    for name in read.names:
        match = re.fullmatch(r"(model\.layers\.(\d+)\.mlp\.)(gate|experts\.(\d+))(\..*)", name)
        numbers = kept.get(int(match[2])) if match else None
        stored = read(name, torch.float32 if name.endswith("bias") and "gate" in name else torch.bfloat16)
        if numbers is None:
            tensors[name] = stored
        elif match[4] is None:
            tensors[name] = stored[numbers]
        elif int(match[4]) in numbers:
            tensors[f"{match[1]}experts.{numbers.index(int(match[4]))}{match[5]}"] = stored
    do(tensors)
    folder.mkdir()
    checkpoints.save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    said = {"n_routed_experts": len(next(iter(kept.values())))} | config
    (folder / "config.json").write_text(json.dumps(json.loads((original / "config.json").read_text()) | said))
    return folder


def on_trial(folder, original):
    return OnTrial.of(headers_of(str(folder)), original=headers_of(str(original)), tokens=TOKENS)


def trial_of(folder, original):
    return Trial(on_trial(folder, original), seed=0)


def run(trial):
    """The faults found in the weights, and the costs."""
    for layer in trial.release.layers:
        trial.layer(layer)
    paid = trial.logits()[-1]
    findings = [f for layer in trial.release.layers for f in trial.findings[layer]] + trial.weighing.top()
    return [f.what for f in findings if f.severity == audit.FAULT], paid


def found_in(folder, original, layer=2):
    """What is said of one layer's weights, without running it."""
    layers = [Layers(f, Conventions.of(CONFIG)) for f in (folder, original)]
    mine, theirs = (of.read for of in layers)
    numberings = pruning.numberings(mine, theirs, SPARSE)
    weighing = Weighing(headers_of(str(folder)).tensors, mine, theirs, CONFIG["num_hidden_layers"], numberings)
    order = numberings[layer].order.tolist()
    weighing.experts(layer, 0, layers[0].experts(layer, 0, KEPT), layers[1].some_experts(layer, order[:KEPT]))
    weighing.experts(layer, KEPT, None, layers[1].some_experts(layer, order[KEPT:]))
    return [f.what for f in weighing.layer(layer) if f.severity == audit.FAULT]


# -- matching


def rows(count, seed=0):
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(seed))


def test_equal_rows_are_matched_in_any_order_and_twins_by_their_bias():
    theirs, bias = rows(16), torch.arange(16.0)
    theirs[9] = theirs[3]
    numbers = [12, 9, 0, 3, 7]
    found = pruning.numbered(theirs[numbers], theirs, bias[numbers], bias)
    assert (found.own.tolist(), dict(found.strangers)) == (numbers, {})
    assert found.dropped.tolist() == [e for e in range(16) if e not in numbers]
    assert sorted(found.order.tolist()) == list(range(16))
    assert (found.order[found.places] == np.arange(16)).all()


def test_nearly_equal_rows_are_matched_and_rows_like_none_are_named():
    theirs, bias = rows(16), torch.zeros(16)
    mine = theirs[[4, 8, 11, 2]] + 0.05 * rows(4, 1)
    assert pruning.numbered(mine, theirs, bias[:4], bias).own.tolist() == [4, 8, 11, 2]
    mine[1] = (theirs[8] + theirs[9]) / 2  # two merged
    mine[3] = rows(1, 2)
    found = pruning.numbered(mine, theirs, bias[:4], bias)
    assert set(found.strangers) == {1, 3}
    assert found.own[1] in (8, 9)
    assert found.kept.tolist() == [4, 11]
    assert pruning.lines({5: found}) == [
        "layer 5: 2 of 16 experts kept, and 2 that are not among them",
        "dropped in layer 5: 0-3, 5-10, 12-15",
    ]
    (line,) = pruning.strangers({5: found})
    assert line.startswith(
        "model.layers.5.mlp.gate.weight, rows 1, 3: expected rows of the original's router, got 2 like none"
    )


def test_a_row_between_two_alike_belongs_to_neither():
    theirs, bias = rows(8), torch.zeros(8)
    theirs[5] = theirs[2] + 0.1 * rows(1, 3)[0]
    between = (theirs[[2]] + theirs[[5]]) / 2
    assert set(pruning.numbered(between, theirs, bias[:1], bias).strangers) == {0}


def test_what_was_dropped_takes_a_few_lines_however_many_layers():
    one = pruning.Numbering(np.roll(np.arange(256), -3), 128)
    assert pruning.lines(dict.fromkeys(range(3, 78), one)) == [
        "layers 3-77: 128 of 256 experts kept",
        "dropped in layers 3-77: 0-2, 131-255",
    ]
    others = {i: pruning.Numbering(np.random.default_rng(i).permutation(256), 128) for i in range(3, 78)}
    lines = pruning.lines(others)
    assert len(lines) == 5
    assert max(map(len, lines)) < 140
    assert lines[1].endswith(", ... (128)")
    assert lines[-1].startswith("dropped in layers 6-77: ")


# -- a release beside its original


def test_a_pruned_build_is_held_to_its_original(original, tmp_path):
    kept = {layer: kept_in(layer, moved=True) for layer in SPARSE}
    trial = trial_of(pruned(original, tmp_path / "p", kept), original)
    assert {i: n.own.tolist() for i, n in trial.release.numberings.items()} == kept
    assert trial.release.differences()[0] == []
    assert trial.release.pruned()[0].startswith(f"layers 1-2: {KEPT} of {EVERY} experts kept; in another order")
    trial.run.chunk = 3  # the release's end in a chunk of one, the original's in others
    faults, paid = run(trial)
    assert faults == []
    assert paid.kl_max > 1e-4  # it is another model
    assert all(0.05 < trial.costs[i].dropped < 0.8 and trial.costs[i].routing < 1 for i in SPARSE)
    assert (trial.costs[0].dropped, trial.costs[0].routing) == (None, None)
    assert "most in layer" in trial.dropped()


def test_the_original_computes_what_it_does_without_a_pruned_build(original, tmp_path):
    """All of its experts, in its own order: those that the release has, and those that it dropped."""
    beside = trial_of(pruned(original, tmp_path / "p", {i: kept_in(i, True) for i in SPARSE}), original)
    alone = trial_of(shutil.copytree(original, tmp_path / "same"), original)
    assert alone.release.numberings == {}
    alone.run.tokens = beside.run.tokens
    for trial in (beside, alone):
        for layer in trial.release.layers:
            trial.layer(layer)
    ends = [trial.run.first[1].numpy() for trial in (beside, alone)]
    assert np.abs(ends[0] - ends[1]).max() < 1e-4 * np.abs(ends[1]).max()
    assert alone.dropped() == ""


def test_a_build_in_another_order_that_dropped_nothing_costs_nothing(original, tmp_path):
    order = np.random.default_rng(0).permutation(EVERY).tolist()
    trial = trial_of(pruned(original, tmp_path / "p", dict.fromkeys(SPARSE, order)), original)
    faults, paid = run(trial)
    assert faults == []
    assert paid.kl_max < 1e-8
    assert all(trial.costs[i].routing == 1 and trial.costs[i].dropped is None for i in SPARSE)
    assert trial.release.pruned() == [
        f"layers 1-2: {EVERY} of {EVERY} experts kept; in another order than the original's in layers 1-2"
    ]


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def of(layer, expert):
    return [f"model.layers.{layer}.mlp.experts.{expert}.{p}.weight" for p in PROJECTIONS]


def exchange(tensors):
    for a, b in zip(of(2, 3), of(2, 6), strict=True):
        tensors[a], tensors[b] = tensors[b], tensors[a]


def halve(tensors):
    for name in of(2, 3):
        tensors[name] = tensors[name] / 2


def replace_by_a_dropped_one(tensors, read, number):
    for name, other in zip(of(2, 3), of(2, number), strict=True):
        tensors[name] = read(other, torch.bfloat16)


def average(tensors):
    gate = tensors["model.layers.2.mlp.gate.weight"]
    gate[3] = (gate[3] + gate[6]) / 2
    for a, b in zip(of(2, 3), of(2, 6), strict=True):
        tensors[a] = (tensors[a] + tensors[b]) / 2


def change_a_row(tensors):
    tensors["model.layers.2.mlp.gate.weight"][3] *= 1.02


def change_the_bias(tensors):
    tensors["model.layers.2.mlp.gate.e_score_correction_bias"][3] += 0.1


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("exchange", [r"experts\.3 \(by the router the original's {3}\): what the original has in expert {6} of this layer",
                      r"experts\.6 \(by the router the original's {6}\): what the original has in expert {3} of this layer"]),
        ("halve", [rf"experts\.3\.{p} \(by the router the original's {{3}}\): .*0\.5" for p in PROJECTIONS]),
        ("dropped", [r"experts\.3 \(by the router the original's {3}\): what the original has in expert {gone} of this layer"]),
        ("average", [r"model\.layers\.2\.mlp\.gate\.weight, row 3: expected rows of the original's router"]),
        ("row", [r"model\.layers\.2\.mlp\.gate: .*\(at \[3, "]),
        ("bias", [r"model\.layers\.2\.mlp\.gate\.e_score_correction_bias: .*\(at \[3\]"]),
    ],
)  # fmt: skip
def test_damage_is_named_by_both_numbers(original, tmp_path, what, named):
    kept = {layer: kept_in(layer) for layer in SPARSE}
    gone = next(e for e in range(EVERY) if e not in kept[2])
    read = read_tensors(original)
    do = {
        "exchange": exchange, "halve": halve, "average": average, "row": change_a_row, "bias": change_the_bias,
        "dropped": lambda tensors: replace_by_a_dropped_one(tensors, read, gone),
    }[what]  # fmt: skip
    faults = found_in(pruned(original, tmp_path / "p", kept, do), original)
    numbers = {"{3}": str(kept[2][3]), "{6}": str(kept[2][6]), "{gone}": str(gone)}
    for key, number in numbers.items():
        named = [line.replace(key, number) for line in named]
    assert len(faults) == len(named), faults
    for line in named:
        assert any(re.search(line, fault) for fault in faults), (line, faults)


def test_experts_that_were_not_moved_with_their_router_take_one_line(original, tmp_path):
    def shift(tensors):
        stacks = {n: tensors[n] for e in range(KEPT) for n in of(2, e)}
        for e in range(KEPT):
            for name, other in zip(of(2, e), of(2, (e + 1) % KEPT), strict=True):
                tensors[name] = stacks[other]

    folder = pruned(original, tmp_path / "p", {layer: kept_in(layer) for layer in SPARSE}, shift)
    (fault,) = found_in(folder, original)
    assert fault.startswith(
        f"model.layers.2.mlp.experts: {KEPT} experts are others of the original's in this layer: 0 "
    )


def test_other_models_are_refused_in_a_line(original, tmp_path):
    kept = {layer: kept_in(layer) for layer in SPARSE}
    other = checkpoints.write(tmp_path / "other", CONFIG, seed=5)
    with pytest.raises(ValueError, match="expected the model that") as refused:
        on_trial(pruned(original, tmp_path / "p", kept), other)
    assert str(other) in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match=r"--original .*: n_routed_experts = 10"):
        on_trial(original, tmp_path / "p")  # the other way round


def test_groups_that_were_adapted_are_told_and_other_keys_are_faults(tmp_path):
    grouped = checkpoints.write(tmp_path / "g", CONFIG | {"n_group": 4, "topk_group": 2}, seed=4)
    kept = {layer: kept_in(layer) for layer in SPARSE}
    folder = pruned(grouped, tmp_path / "p", kept, n_group=1, topk_group=1, routed_scaling_factor=2.0)
    release = on_trial(folder, grouped)
    assert [finding.what.split()[1] for finding in release.differences()[0]] == ["routed_scaling_factor"]
    assert release.pruned()[-2:] == [
        "config.json: n_group = 1, the original's says 4",
        "config.json: topk_group = 1, the original's says 2",
    ]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """With an MTP layer, at widths that can be packed."""
    config = checkpoints.packable(num_hidden_layers=2, first_k_dense_replace=1)
    return checkpoints.write(tmp_path_factory.mktemp("pruning") / "wide", config, seed=4)


def test_a_packed_build_is_held_to_its_original_and_so_is_its_mtp_layer(wide, tmp_path):
    kept = {1: kept_in(1), 2: kept_in(2)}
    plain = pruned(wide, tmp_path / "p", kept)
    model, folder = glm_dsa.load(plain), tmp_path / "4bit"
    nn.quantize(model, 64, 4, class_predicate=lambda path, m: hasattr(m, "to_quantized") and "indexer" not in path)
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), parameters_of(model))
    shutil.copy(plain / "config.json", folder)
    trial = trial_of(folder, wide)
    assert trial.release.layers == [0, 1, 2]
    assert {i: n.own.tolist() for i, n in trial.release.numberings.items()} == kept
    faults, _ = run(trial)
    assert faults == []


def test_an_mtp_layer_that_kept_all_of_its_experts_is_not_judged(wide, tmp_path):
    release = on_trial(pruned(wide, tmp_path / "p", {1: kept_in(1)}), wide)
    assert release.layers == [0, 1]


# -- drift


PROMPT = np.random.default_rng(1).integers(3, 160, TOKENS).tolist()


def drifted(candidate, reference):
    return drift.compare(str(candidate), str(reference), tokens=PROMPT, repair=False)


def test_drift_compares_routing_by_the_reference_s_numbers(original, tmp_path):
    kept = {layer: kept_in(layer, True) for layer in SPARSE}
    recordings = {}
    folder = pruned(original, tmp_path / "p", kept)
    found = drift.compare(str(folder), str(original), tokens=PROMPT, repair=False, keep=recordings.update)
    assert not found.agrees
    assert found.config == []  # fewer experts are what pruning is
    assert found.own_weights.divergence is None
    assert found.experts[0].startswith(f"layers 1-2: {KEPT} of {EVERY} experts kept")
    assert "go to dropped ones" in found.experts[-2]
    assert found.experts[-1].startswith("what pruning leaves as it was agrees at every stage")
    for layer in SPARSE:
        own = recordings["candidate own"][f"layers.{layer}.mlp.gate.topk"]
        assert set(own.ravel()) <= set(kept[layer])
        weights = recordings["candidate own"][f"layers.{layer}.mlp.gate.weights"]
        assert weights.shape[1] == EVERY
        assert ((weights != 0).nonzero()[1].reshape(own.shape) == np.sort(own)).all()
    logits = {c.stage: c for c in found.comparisons if c.kind == "mlp.gate.logits" and c.run == "local"}
    assert max(c.error for c in logits.values()) < 1e-4
    shares = {c.layer: c.routing for c in found.choices}
    assert all(0 < shares[layer] < 1 for layer in SPARSE)


def test_drift_names_a_difference_that_is_not_of_pruning(original, tmp_path):
    kept = {layer: kept_in(layer) for layer in SPARSE}

    def norm(tensors):
        tensors["model.layers.2.input_layernorm.weight"] = tensors["model.layers.2.input_layernorm.weight"] * 1.1

    def experts(tensors):
        for e in range(KEPT):
            for name in of(2, e):
                tensors[name] = tensors[name] * 1.1

    for do, named in ((norm, "layers.2.input_layernorm"), (experts, "layers.2.mlp.experts")):
        folder = pruned(original, tmp_path / do.__name__, kept, do)
        found = drifted(f"hf@{folder}", f"hf@{original}")
        assert named in found.experts[-1], found.experts


def test_drift_agrees_where_only_the_order_is_another(original, tmp_path):
    order = np.random.default_rng(0).permutation(EVERY).tolist()
    found = drifted(pruned(original, tmp_path / "p", dict.fromkeys(SPARSE, order)), original)
    assert found.agrees
    assert found.same_weights
    assert "in another order" in found.experts[0]


def test_drift_refuses_other_models_and_the_pruned_build_as_reference(original, tmp_path):
    folder = pruned(original, tmp_path / "p", {layer: kept_in(layer) for layer in SPARSE})
    other = checkpoints.write(tmp_path / "other", CONFIG, seed=5)
    with pytest.raises(ValueError, match="expected the model that"):
        drifted(folder, other)
    with pytest.raises(ValueError, match="n_routed_experts = 16 and 10; put the pruned build first"):
        drifted(original, folder)


def test_drift_calls_no_pruned_build_the_same_model_though_nothing_shows(original, tmp_path):
    """On this prompt nobody asks for the expert that was dropped."""

    def avoid(tensors):
        for layer in SPARSE:
            tensors[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"][5] -= 10

    whole = pruned(original, tmp_path / "whole", {layer: list(range(EVERY)) for layer in SPARSE}, avoid)
    kept = [e for e in range(EVERY) if e != 5]
    found = drifted(f"hf@{pruned(whole, tmp_path / 'p', dict.fromkeys(SPARSE, kept))}", f"hf@{whole}")
    assert found.distributions["kl_max"] < 1e-8
    assert "0.0% go to dropped ones" in found.experts[-2]
    assert not found.agrees
    assert not found.same_weights
