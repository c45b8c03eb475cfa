"""Published kinds of builds, by their headers at true size: none is condemned; with one thing wrong each is."""

import json
from pathlib import Path

import pytest

from glm_dsa import ModelArgs, weights
from glm_dsa.planning.formats import Format
from tests.builds import write_build
from verify.audit import audit
from verify.engines import headers

CONFIGS = Path(__file__).parent.parent / "verify" / "configs"
PLAIN, FLOAT = Format("bfloat16"), Format("float32")


def affine(bits, group_size=64):
    return Format("bfloat16", bits, group_size)


def q4(spec):
    """4 bit, and the indexer in 8, as most are."""
    return affine(8 if spec.part == "indexer" else 4)


def mxfp4_q8(spec):
    """Experts in mxfp4, the rest in 8 bit by groups of 32."""
    return Format("bfloat16", 4, 32, "mxfp4") if spec.part == "experts" else affine(8, 32)


def mixed(spec):
    """About 2.7 bits: experts in 2 and 3, the indexer unpacked, the rest in 6 and 8."""
    if spec.part == "experts":
        return affine(3 if "down_proj" in spec.name else 2)
    return PLAIN if spec.part == "indexer" else affine(8 if spec.part in ("embedding", "head") else 6)


def formats_of(args, kind):
    out = {}
    for spec in weights.module_inventory(args):
        if spec.component != "mtp":
            out[spec.name] = kind(spec) if spec.is_packable else PLAIN
            if spec.name.endswith("e_score_correction_bias"):
                out[spec.name] = FLOAT
    return out


def entries(formats, default, with_mode):
    """What mlx-lm's convert writes: an entry for what is packed otherwise than most."""
    said = default.packing()
    for name, kept in formats.items():
        if kept.is_packed and kept != default:
            packing = kept.packing()
            said[name.removesuffix(".weight")] = (
                packing if with_mode else {k: packing[k] for k in ("group_size", "bits")}
            )
    return said


BUILDS = {  # (config, how each is kept, what most are, whether entries have a mode)
    "GLM-5.2, 4 bit": ("glm-5.2", q4, affine(4), True),
    "GLM-5-MXFP4-Q8": ("glm-5", mxfp4_q8, Format("bfloat16", 4, 32, "mxfp4"), False),
    "GLM-5.2, 2.7 bit": ("glm-5.2", mixed, affine(2), True),
    "GLM-4.7-Flash, 4 bit": ("glm-4.7-flash", q4, affine(4), True),
}


def written(folder, name, change=lambda formats, said: None):
    file, kind, default, with_mode = BUILDS[name]
    config = json.loads((CONFIGS / f"{file}.json").read_text())
    formats = formats_of(ModelArgs.from_dict(config), kind)
    said = entries(formats, default, with_mode)
    change(formats, said)
    return write_build(folder, config | {"quantization": said, "quantization_config": said}, formats)


def told(folder, strict=False):
    findings = audit.audit(headers.headers_of(str(folder)), strict=strict, with_chat=False).findings
    return {severity: [f.what for f in findings if f.severity == severity] for severity in (audit.FAULT, audit.WARNING)}


@pytest.mark.parametrize("name", BUILDS)
def test_a_published_kind_of_build_passes(name, tmp_path):
    found = told(written(tmp_path / "b", name))
    assert found[audit.FAULT] == []
    assert not any("mlx-lm" in what for what in found[audit.WARNING])


def test_an_indexer_in_eight_bits_passes_but_under_strict_policy(tmp_path):
    folder = written(tmp_path / "b", "GLM-4.7-Flash, 4 bit")
    assert (
        told(folder, strict=True)[audit.FAULT] == told(folder)[audit.WARNING]
    )  # it has no indexer: head and embedding alone
    folder = written(tmp_path / "c", "GLM-5.2, 4 bit")
    assert any("indexer: 8 bit" in what for what in told(folder)[audit.WARNING])
    assert any("indexer: 8 bit" in what for what in told(folder, strict=True)[audit.FAULT])


def name_router(formats, said):
    said["model.layers.9.mlp.gate"] = {"group_size": 64, "bits": 8}


def say_other_bits(formats, said):
    said["model.layers.9.self_attn.o_proj"] = {"group_size": 64, "bits": 5}


def drop_indexer(formats, said):
    for name in [n for n in formats if ".layers.2.self_attn.indexer." in n]:
        del formats[name]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (name_router, "model.layers.9.mlp.gate"),
        (say_other_bits, "layers.9.self_attn.o_proj"),
        (drop_indexer, "layers 2"),
    ],
)
def test_with_one_thing_wrong_it_does_not(change, named, tmp_path):
    (line,) = told(written(tmp_path / "b", "GLM-5.2, 4 bit", change))[audit.FAULT]
    assert named in line
