"""Rows and columns beside an original's, on the kept checkpoints: every packing of theirs is sound, and single rows show."""

import itertools
import json
from functools import cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch

import glm_dsa
from glm_dsa import ModelArgs
from glm_dsa.model import parameters_of
from reference import checkpoints
from reference.kept import TRAINED
from reference.packed import Packing
from reference.stored import read_tensors
from tests.test_damage import experts_of
from verify.engines.headers import headers_of
from verify.release.gaps import gap
from verify.release.rounding import Form
from verify.release.weights import Weighing

KEPT = {"interleaved": TRAINED / "interleaved", "half-split": TRAINED / "half-split"}
PACKINGS = [
    *({"bits": bits, "group_size": group, "mode": "affine"} for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64)),
    {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    {"bits": 8, "group_size": 32, "mode": "mxfp8"},
    {"bits": 4, "group_size": 16, "mode": "nvfp4"},
]


def told(packing):
    return f"{packing['mode']}, {packing['bits']} bit in groups of {packing['group_size']}"


def build(original, folder, packing, damage=lambda tensors: None, before=lambda weights: None):
    """As mlx-lm's convert writes it, router and indexer unpacked. damage: of what is stored; before: of weights, before packing."""
    model = glm_dsa.load(original)
    packed = {
        path: module
        for path, module in model.named_modules()
        if hasattr(module, "to_quantized")
        and ".indexer." not in path
        and not module.weight.shape[-1] % packing["group_size"]
    }
    before(packed)
    nn.quantize(model, class_predicate=lambda path, module: path in packed and packing)
    tensors = parameters_of(model)
    damage(tensors)
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "mlx"})
    config = json.loads((original / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization": packing}))
    return folder


@cache
def experts_of_original(original, layer, count):
    return experts_of(read_tensors(original), layer, count)


def found_in(folder, original):
    """Findings about weights, of all layers and the top."""
    args = ModelArgs.from_file(folder)
    mine, theirs = read_tensors(folder), read_tensors(original)
    headers = headers_of(str(folder)).tensors
    weighing = Weighing(headers, mine, theirs, args.num_hidden_layers)
    findings = list(weighing.top())
    for layer in range(args.num_hidden_layers):
        if args.is_sparse(layer):
            weighing.experts(
                layer,
                0,
                experts_of(mine, layer, args.n_routed_experts),
                experts_of_original(original, layer, args.n_routed_experts),
            )
        findings += weighing.layer(layer)
    return [f"{f.severity}: {f.what}" for f in findings]


SOUND = [("interleaved", p) for p in PACKINGS] + [("half-split", PACKINGS[i]) for i in (1, 5, 12, 14)]
# Of each mode, the fewest bits and the most, both groups, both layouts; every packing, of drawn matrices: the last test here.
FIRST = [*(("interleaved", PACKINGS[i]) for i in (0, 5, 11, 12, 13, 14)), ("half-split", PACKINGS[1])]
LATER = pytest.mark.slow("verify/release", "verify/engines", "reference/packed", "reference/stored", "reference/trained")


@pytest.mark.parametrize(
    ("kept", "packing"),
    [pytest.param(*s, marks=() if s in FIRST else LATER, id=f"{s[0]}, {told(s[1])}") for s in SOUND],
)
def test_a_sound_build_has_no_finding(kept, packing, tmp_path):
    assert found_in(build(KEPT[kept], tmp_path / "build", packing), KEPT[kept]) == []


@pytest.mark.parametrize("kept", ["interleaved"])
def test_a_sound_fp8_build_has_no_finding(kept, tmp_path):
    checkpoints.write_fp8(KEPT[kept], tmp_path / "fp8", tmp_path / "unpacked")
    assert found_in(tmp_path / "fp8", KEPT[kept]) == []


# -- single rows

MXFP4, TWO_BITS = PACKINGS[12], PACKINGS[1]


def halved(name, but=(), rows=slice(None)):
    """An exponent too small in the scales of some rows."""

    def damage(tensors):
        scales = np.array(tensors[name])
        flat = scales.reshape(-1, scales.shape[-1])
        chosen = np.setdiff1d(np.arange(len(flat))[rows], but)
        flat[chosen] -= (flat[chosen] > 0).astype(flat.dtype)
        tensors[name] = mx.array(flat.reshape(scales.shape))

    return damage


def all_but_the_sampled(tensors):
    for name in [n for n in tensors if n.endswith(".scales")]:
        count = tensors[name].size // tensors[name].shape[-1]
        halved(name, np.unique(np.linspace(0, count - 1, 64).round().astype(int)))(tensors)


def zero_row(row):
    def before(modules):
        weight = np.array(modules["lm_head"].weight.astype(mx.float32))
        weight[row] = 0
        modules["lm_head"].weight = mx.array(weight).astype(mx.bfloat16)

    return before


def changed(path, change):
    def before(modules):
        weight = np.array(modules[path].weight.astype(mx.float32))
        change(weight.reshape(-1, weight.shape[-1]))
        modules[path].weight = mx.array(weight).astype(mx.bfloat16)

    return before


def negated(w):
    w[5] *= -1


def exchanged(w):
    w[[3, 9]] = w[[9, 3]]


def turned_off(w):
    w[:, 7] = 0


@pytest.mark.parametrize(
    ("packing", "how", "named"),
    [
        pytest.param(MXFP4, {"damage": all_but_the_sampled}, "times the original's",  # P3
                     marks=pytest.mark.slow("verify/release", "verify/engines")),
        (MXFP4, {"damage": halved("lm_head.scales", rows=[2, 37])}, "lm_head: 2 of 262 rows (token ids 2, 37)"),  # P4
        (TWO_BITS, {"before": zero_row(40)}, "1 of 262 rows (token ids 40) are zero"),  # P5
        (TWO_BITS, {"before": changed("lm_head", negated)}, "1 of 262 rows (token ids 5)"),
        (TWO_BITS, {"before": changed("lm_head", exchanged)}, "are not the original's"),
        (TWO_BITS, {"before": changed("model.layers.1.mlp.down_proj", negated)}, "(5)"),
        (PACKINGS[5], {"before": changed("model.layers.0.self_attn.o_proj", turned_off)}, "columns (7) are zero"),
        (MXFP4, {"damage": halved("model.layers.4.mlp.switch_mlp.down_proj.scales", rows=[300])}, "times the original's"),
    ],
    ids=["all but the sampled", "two halved", "zero", "negated", "exchanged", "a layer's", "a column", "an expert's"],
)  # fmt: skip
def test_rows_that_are_no_rounding(tmp_path, packing, how, named):
    findings = found_in(build(KEPT["interleaved"], tmp_path / "build", packing, **how), KEPT["interleaved"])
    assert findings
    assert len(findings) < 20
    assert any(named in finding for finding in findings), findings[:4]


# -- other packings than mlx's


def searched(w, bits, group):
    """Scales of the least squared error among many, as several tools have them."""
    groups = w.unflatten(-1, (-1, group))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    best, least = groups.clone(), torch.full_like(low, torch.inf)
    for by in torch.linspace(0.6, 1.05, 19):
        middle, half = (high + low) / 2, (high - low) / 2 * by
        step = 2 * half / (2**bits - 1)
        back = ((groups - middle + half) / step).round().clamp(0, 2**bits - 1) * step + middle - half
        error = (back - groups).square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, back, best), torch.minimum(error, least)
    return best.flatten(-2)


DRAWN = {
    "normal": lambda random, shape: random.standard_normal(shape),
    "heavy-tailed": lambda random, shape: random.standard_t(3, shape),
    "uniform": lambda random, shape: random.uniform(-1, 1, shape),
    "shifted": lambda random, shape: random.standard_normal(shape) + 2,
    "sparse": lambda random, shape: random.standard_normal(shape) * (random.random(shape) < 0.1),
    "rows of all magnitudes": lambda random, shape: (
        random.standard_normal(shape) * np.exp(random.normal(0, 1, (shape[0], 1)))
    ),
    "columns of all magnitudes": lambda random, shape: (
        random.standard_normal(shape) * np.exp(random.normal(0, 1, shape[1]))
    ),
}


@pytest.mark.parametrize(("bits", "group"), [*itertools.product((2, 3, 4, 8), (32, 128))])
@pytest.mark.parametrize("drawn", DRAWN)
def test_searched_scales_are_sound(drawn, bits, group):
    w = torch.from_numpy(DRAWN[drawn](np.random.default_rng(bits), (300, 256)).astype(np.float32)).bfloat16().float()
    found = gap(searched(w, bits, group), w, Form("U32", Packing(bits, group, "affine")))
    assert not found.is_fault, str(found)


@pytest.mark.parametrize("packing", PACKINGS, ids=told)
@pytest.mark.parametrize("drawn", DRAWN)
def test_mlx_packing_is_sound(drawn, packing):
    w = mx.array(DRAWN[drawn](np.random.default_rng(0), (300, 512)).astype(np.float32)).astype(mx.bfloat16)
    words, *others = mx.quantize(w, **packing)
    floats = [o.astype(mx.float32) if mx.issubdtype(o.dtype, mx.floating) else o for o in others]
    back = mx.dequantize(words, *floats, **packing).astype(mx.float32)
    form = Form("U32", Packing(packing["bits"], packing["group_size"], packing["mode"]))
    found = gap(torch.from_numpy(np.array(back)), torch.from_numpy(np.array(w.astype(mx.float32))), form)
    assert not found.is_fault, str(found)
