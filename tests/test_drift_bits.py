"""What the bits of a packed build buy: held to packing each component alone, and to uniform bits of the same size."""

import json
import re
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest

import glm_dsa
from glm_dsa.model import parameters_of
from glm_dsa.planning import plan
from glm_dsa.planning import recipe as recipes
from glm_dsa.planning.components import Component
from reference import corpus
from reference.kept import TRAINED, probes
from verify import drift
from verify.audit import audit
from verify.core import compare
from verify.drift.bit_allocation import recipe
from verify.drift.build import Build
from verify.drift.checks import same_weights
from verify.drift.session import Session
from verify.engines import headers

ORIGINAL = TRAINED / "interleaved"
LENGTH = 96
GROUP = 32  # divides every width of the trained checkpoint


def tokens_of(text, length=LENGTH):
    return corpus.encode(text)[:length][None]


def logits_of(model, tokens):
    return np.array(model(mx.array(tokens))[0].astype(mx.float32))


@pytest.fixture(scope="module")
def original():
    return glm_dsa.load(ORIGINAL, dtype=mx.float32)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """4 bit throughout, but for the indexer, as mlx-lm packs."""
    folder = tmp_path_factory.mktemp("bits") / "4bit"
    folder.mkdir()
    model = glm_dsa.load(ORIGINAL)
    nn.quantize(model, GROUP, 4, class_predicate=lambda path, m: hasattr(m, "to_quantized") and "indexer" not in path)
    mx.save_safetensors(str(folder / "model.safetensors"), parameters_of(model))
    config = json.loads((ORIGINAL / "config.json").read_text())
    said = {"quantization": {"group_size": GROUP, "bits": 4, "mode": "affine"}}
    (folder / "config.json").write_text(json.dumps(config | said))
    return folder


@pytest.fixture(scope="module")
def found(build):
    return drift.compare(str(build), f"hf@{ORIGINAL}", text=probes()["texts"][0], length=LENGTH, suggest_bits=6.25)


def packed_alone(paths):
    """The original with these modules packed, made without verify.drift."""
    model = glm_dsa.load(ORIGINAL)
    nn.quantize(model, GROUP, 4, class_predicate=lambda path, m: path in paths)
    model.set_dtype(mx.float32)
    return model


def test_the_code_is_told_from_the_weights(found):
    assert not found.same_weights
    assert found.own_weights.divergence is None
    assert found.own_weights.diagnosis is None
    assert "The code is not to blame" in found.summary()
    assert found.distributions["kl_mean"] > 1e-3


def test_every_packed_weight_is_in_one_component_and_one_group_of_layers(found, build):
    packed = {n.removesuffix(".scales") for n in glm_dsa.checkpoint.read_headers(build) if n.endswith(".scales")}
    rows = found.sensitivity.rows
    listed = [path for row in rows for path in row.modules]
    assert len(listed) == len(set(listed))
    assert set(listed) == packed
    layers = sum(row.parameters for row in rows if not row.modules)
    inside = sum(row.parameters for row in rows if row.modules)
    outside = sum(r.parameters for r in rows if r.component in ("embedding", "head", "MTP join"))
    assert 0 < layers <= inside - outside
    assert {round(row.bits, 6) for row in rows} == {5.0}  # 4, and 32 bits a group of 32


def test_the_ranking_is_that_of_packing_each_component_alone(found, original):
    """By hand: each component packed anew from the original, nothing else."""
    rows = [row for row in found.sensitivity.rows if row.modules]
    tokens = tokens_of(probes()["texts"][0])
    due = logits_of(original, tokens)
    by_hand = [compare.distributions(logits_of(packed_alone(set(r.modules)), tokens), due).kl_mean for r in rows]
    assert np.allclose([row.alone for row in rows], by_hand, rtol=1e-3, atol=1e-9)
    order = [rows[i].component for i in np.argsort(by_hand)[::-1]]
    table = [line.split("  ")[0] for line in found.sensitivity.table()[1:]]
    assert [name for name in table if name != "layers"] == order


def test_the_recipe_keeps_its_budget_and_beats_uniform_bits_of_its_size(found, build, original, registered, tmp_path):
    suggested = found.sensitivity.recipe
    suggested.write(tmp_path / "recipe.toml")
    assert suggested.bits <= 6.25
    planned = plan.plan(ORIGINAL, recipes.load(tmp_path / "recipe.toml"))
    every = Component.sum([planned.main, planned.mtp])
    assert every.bits == pytest.approx(suggested.bits, abs=1e-9)
    mlx_lm.convert(str(ORIGINAL), str(tmp_path / "better"), recipe=tmp_path / "recipe.toml")
    sizes = [
        sum(t.nbytes for t in glm_dsa.checkpoint.read_headers(Path(f)).values()) for f in (tmp_path / "better", build)
    ]
    assert sizes[0] <= sizes[1]
    weights = sum(a.size for a in parameters_of(original).values())
    assert (sizes[0], weights) == (every.nbytes, every.parameters)
    audited = audit.audit(headers.headers_of(str(tmp_path / "better")), recipes.load(tmp_path / "recipe.toml"))
    assert not any("recipe" in f.what for f in audited.findings)
    better, uniform = (glm_dsa.load(folder) for folder in (tmp_path / "better", build))
    kls = []
    for text in probes()["texts"][1:3]:
        due = logits_of(original, tokens_of(text))
        kls.append([compare.distributions(logits_of(m, tokens_of(text)), due).kl_mean for m in (better, uniform)])
    ours, theirs = np.mean(kls, axis=0)
    assert ours < 0.7 * theirs
    side = drift.sides_of(str(tmp_path / "better"), None, "")[0]
    assert not same_weights(side, drift.sides_of(str(build), None, "")[0])


def test_a_budget_that_cannot_be_kept_is_refused(found, build):
    """Before anything runs, with the least that is possible; which is possible."""
    made = Build(*drift.sides_of(str(build), f"glm_dsa@{ORIGINAL}", ""))
    message = r"--suggest-bits [0-9.]+: at least ([0-9.]+) are possible: ([0-9.]+) are taken by what stays"
    with pytest.raises(ValueError, match=message) as error:
        recipe(found.sensitivity, made, 2)
    least, fixed = map(float, re.search(message, str(error.value)).groups())
    assert fixed < least
    assert recipe(found.sensitivity, made, least).bits <= least
    with pytest.raises(ValueError, match=message):
        recipe(found.sensitivity, made, round(least - 0.001, 3))


def test_a_budget_that_cannot_be_kept_is_refused_before_the_run(build, monkeypatch):
    monkeypatch.setattr(Session, "_run", None)  # would fail otherwise
    arguments = {"text": probes()["texts"][0], "length": LENGTH}
    with pytest.raises(ValueError, match="--suggest-bits 3: at least"):
        drift.compare(str(build), f"hf@{ORIGINAL}", suggest_bits=3, **arguments)
    with pytest.raises(TypeError, match="NoneType"):
        drift.compare(str(build), f"hf@{ORIGINAL}", suggest_bits=6.25, **arguments)


def test_what_is_measured_is_exchanged_and_put_back(build):
    made = Build(*drift.sides_of(str(build), f"glm_dsa@{ORIGINAL}", ""))
    tokens = tokens_of(probes()["texts"][0], 80)
    before = made.logits(tokens)
    whole = logits_of(made.whole, tokens)
    assert np.array_equal(made.logits(tokens, made.paths), whole)
    assert np.array_equal(made.alone(tokens, made.paths), before)
    assert np.array_equal(made.logits(tokens), before)
    assert np.array_equal(logits_of(made.whole, tokens), whole)
