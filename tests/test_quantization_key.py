"""config.json's key `quantization`: mlx-lm loads a build where the audit is silent of it, and only there."""

import json

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import pytest

import glm_dsa
from glm_dsa.model import parameters_of
from reference import checkpoints
from verify.audit import audit
from verify.engines import headers

OF_KEY = "quantization"
Q, EMBED, UP = "model.layers.0.self_attn.q_a_proj", "model.embed_tokens", "model.layers.1.mlp.switch_mlp.up_proj"
GATE, NORM, OUT = "model.layers.1.mlp.gate", "model.layers.0.input_layernorm", "model.layers.1.self_attn.o_proj"
PACKINGS = {  # of the mixed build; everything else is unpacked
    Q: {"group_size": 32, "bits": 8},
    EMBED: {"group_size": 64, "bits": 6},
    UP: {"group_size": 32, "bits": 4, "mode": "mxfp4"},
}
GLOBAL = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
ALONE = {"group_size": 64, "bits": 2}
SPELLED = PACKINGS | {Q: PACKINGS[Q] | {"mode": "affine"}}


def key(**said):
    return {OF_KEY: GLOBAL | said}


LOADS = {
    "D4: entries without a mode are affine, whatever the global one": key(**{Q: PACKINGS[Q], EMBED: PACKINGS[EMBED]}),
    "D4: global keys alone; all is inferred": key(),
    "global keys that fit nothing": {OF_KEY: ALONE},
    "entries in full": key(**SPELLED),
    "the usual group size, in so many words": key(**{UP: {"group_size": None, "bits": None, "mode": "mxfp4"}}),
    "true, where the global keys fit": key(**{UP: True}),
    "false for what is not packed": key(**{GATE: False, OUT: False, NORM: {}}),
    "an entry for what is no module": key(**{"model.layers.99.mlp.gate": {"bits": 4}, "model.layers.0.mlp": True}),
    "the twin beside it": key() | {"quantization_config": GLOBAL},
    "the twin beside it says otherwise": key() | {"quantization_config": ALONE},
    "the method mxfp4 alone": {"quantization_config": {"quant_method": "mxfp4"}},
    "a method whose weights these are not, of a known format": {
        "quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    },
    "modelopt in NVFP4": {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
}
REFUSED = {  # and what the audit names
    "D5: the router": (key(**{GATE: {"group_size": 64, "bits": 8}}), GATE),
    "D5: a norm": (key(**{NORM: {"group_size": 32, "bits": 8}}), NORM),
    "D5: the router, by true": (key(**{GATE: True}), GATE),
    "a module that is stored unpacked": (key(**{OUT: {"group_size": 32, "bits": 8}}), OUT),
    "other bits": (key(**{Q: {"group_size": 32, "bits": 4}}), Q),
    "other groups": (key(**{Q: {"group_size": 64, "bits": 8}}), Q),
    "other groups, unsaid": (key(**{Q: {"bits": 8}}), Q),
    "another mode": (key(**{UP: {"group_size": 32, "bits": 4}}), UP),
    "a mode that nobody has": (key(**{UP: {"group_size": 32, "bits": 4, "mode": "mxfp5"}}), UP),
    "false for what is packed": (key(**{UP: False}), UP),
    "nothing for what is packed": (key(**{UP: {}}), UP),
    "true, where the global keys do not fit": (key(**{Q: True}), Q),
    "a key that no module takes": (key(**{Q: PACKINGS[Q] | {"dtype": "bfloat16"}}), Q),
    "an entry that is a number": (key(**{Q: 8}), Q),
    "no bits": ({OF_KEY: {"group_size": 64}}, OF_KEY),
    "no object": ({OF_KEY: "4bit"}, OF_KEY),
    "no key at all": ({}, OF_KEY),
    "null": ({OF_KEY: None}, OF_KEY),
    "the twin alone, without a method": ({"quantization_config": GLOBAL}, "quant_method"),
    "a method that does not pack": ({"quantization_config": {"quant_method": "fp8"}}, OF_KEY),
    "a format that mlx-lm does not have": (
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}},
        "float-quantized",
    ),
    "modelopt in FP8": ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}, "FP8"),
}


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    folder = tmp_path_factory.mktemp("key")
    source = checkpoints.write(folder / "hf", checkpoints.packable(num_hidden_layers=2, first_k_dense_replace=1))
    model = glm_dsa.load(source)
    nn.quantize(model, class_predicate=lambda path, m: PACKINGS.get(path, False))
    (folder / "mlx").mkdir()
    mx.save_safetensors(str(folder / "mlx" / "model.safetensors"), parameters_of(model))
    return folder / "mlx", json.loads((source / "config.json").read_text())


def told(build, said):
    """What the audit says of config.json's keys."""
    folder, config = build
    (folder / "config.json").write_text(json.dumps(config | said))
    found = audit.audit(headers.headers_of(str(folder)), with_chat=False).findings
    return [f for f in found if f.severity != audit.NOTE and "mlx-lm" in f.what]


@pytest.mark.parametrize("name", LOADS)
def test_what_mlx_lm_loads_is_passed_in_silence(name, build, registered):
    assert told(build, LOADS[name]) == []
    model, _ = mlx_lm.utils.load_model(build[0], lazy=True)
    assert (model["model"]["embed_tokens"].bits) == 6


@pytest.mark.parametrize("name", REFUSED)
def test_what_mlx_lm_refuses_is_told_by_name(name, build, registered):
    said, named = REFUSED[name]
    (found,) = told(build, said)
    assert named in found.what
    # a build that says nothing, or whose config is of what it was made from, loads elsewhere
    assert found.severity == (audit.FAULT if said.get(OF_KEY) or named == "quant_method" else audit.WARNING)
    with pytest.raises(Exception):  # noqa: B017, PT011  # whatever it stumbles over
        mlx_lm.utils.load_model(build[0], lazy=True)
    assert glm_dsa.load(build[0]).args.num_hidden_layers == 2  # by shapes
