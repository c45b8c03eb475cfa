"""Formats of other tools: refused in one line that names the format, by every reader; and no sound build is taken for one."""

import json
import math

import mlx.core as mx
import mlx.nn as nn
import pytest

import glm_dsa
import glm_dsa.__main__
from glm_dsa import ModelArgs, foreign, weights
from glm_dsa.checkpoint import read_headers
from glm_dsa.errors import CheckpointError, FormatError
from glm_dsa.model import parameters_of
from reference import checkpoints
from tests.builds import write_headers
from verify.__main__ import main
from verify.audit import audit
from verify.engines import headers as release
from verify.gate.options import Asked

CONFIG = checkpoints.packable(num_hidden_layers=2, first_k_dense_replace=1)
SIZES = {"BF16": 2, "F32": 4, "F16": 2, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I32": 4, "I64": 8}


def scaled(dtype, columns, scale, group, **more):
    """A matrix [M, N] as `weight` of a dtype, [M, N // columns], beside a `weight_scale`."""

    def parts(m, n):
        yield "weight", dtype, (m, n // columns)
        yield "weight_scale", scale, (m, n // group if group else 1)
        for name, kind in more.items():
            yield name, kind, ()

    return parts


def gptq(m, n):
    yield "qweight", "I32", (n // 8, m)
    yield "qzeros", "I32", (n // 64, m // 8)
    yield "scales", "F16", (n // 64, m)
    yield "g_idx", "I32", (n,)


def awq(m, n):
    yield "qweight", "I32", (n, m // 8)
    yield "qzeros", "I32", (n // 64, m // 8)
    yield "scales", "F16", (n // 64, m)


def packed(dtype, columns, scale, **more):
    def parts(m, n):
        yield "weight_packed", dtype, (m, n // columns)
        yield "weight_scale", scale, (m, n // 16)
        for name, (kind, shape) in more.items():
            yield name, kind, shape

    return parts


def nf4(m, n):
    yield "weight", "U8", (m * n // 2, 1)
    yield "weight.absmax", "U8", (m * n // 64,)
    yield "weight.quant_map", "F32", (16,)
    yield "weight.quant_state.bitsandbytes__nf4", "U8", (80,)


def int8(m, n):
    yield "weight", "I8", (m, n)
    yield "SCB", "F32", (m,)


def ascend(m, n):
    yield "weight", "I8", (m, n)
    yield "weight_scale", "BF16", (m, 1)
    yield "weight_offset", "BF16", (m, 1)


def jangtq(m, n):
    yield "tq_packed", "U8", (m, n // 2)
    yield "tq_norms", "F16", (m,)
    yield "tq_bits", "I32", ()


def method(name, **more):
    return {"quantization_config": {"quant_method": name, **more}}


FORMATS = {  # name: (what each matrix is stored as, config, what the line names)
    "ModelOpt NVFP4": (
        scaled("U8", 2, "F8_E4M3", 16, weight_scale_2="F32", input_scale="F32"),
        method("modelopt", quant_algo="NVFP4"),
        ("ModelOpt NVFP4", "Model Optimizer", "quant_method modelopt", "weight_scale_2"),
    ),
    "ModelOpt, config silent": (
        scaled("U8", 2, "F8_E4M3", 16, weight_scale_2="F32"),
        {},
        ("ModelOpt", "weight_scale_2"),
    ),
    "compressed-tensors, FP8 per channel": (
        scaled("F8_E4M3", 1, "BF16", 0),
        method("compressed-tensors", format="float-quantized"),
        ("compressed-tensors", "float-quantized", "weight_scale"),
    ),
    "compressed-tensors, W4A16": (
        packed("I32", 8, "BF16", weight_shape=("I64", (2,))),
        method("compressed-tensors", format="pack-quantized"),
        ("compressed-tensors", "pack-quantized", "weight_packed"),
    ),
    "compressed-tensors, NVFP4": (
        packed("U8", 2, "F8_E4M3", weight_global_scale=("F32", (1,))),
        method("compressed-tensors", format="nvfp4-pack-quantized"),
        ("compressed-tensors", "nvfp4-pack-quantized"),
    ),
    "FP8 per channel, config silent": (scaled("F8_E4M3", 1, "F32", 0), {}, ("FP8 with a scale for each channel",)),
    "Quark MXFP4": (scaled("U8", 2, "U8", 32), method("quark"), ("Quark", "AMD", "quant_method quark")),
    "Quark MXFP4, E8M0": (scaled("U8", 2, "F8_E8M0", 32), method("quark"), ("Quark",)),
    "MXFP4, config silent": (scaled("U8", 2, "U8", 32), {}, ("FP4 bytes",)),
    "GPTQ": (gptq, method("gptq", bits=4), ("GPTQ", "bits 4", "g_idx")),
    "AutoRound": (gptq, method("auto-round"), ("AutoRound",)),
    "AWQ": (awq, method("awq", bits=4), ("AWQ", "qzeros")),
    "W8A8": (
        scaled("I8", 1, "F32", 0),
        method("compressed-tensors", format="int-quantized"),
        ("compressed-tensors", "int"),
    ),
    "W8A8, config silent": (scaled("I8", 1, "F32", 0), {}, ("W8A8",)),
    "W8A8 for Ascend": (ascend, {"quantize": "w8a8_dynamic"}, ("Ascend", "msModelSlim", "weight_offset")),
    "bitsandbytes, 4 bit": (nf4, method("bitsandbytes", load_in_4bit=True), ("bitsandbytes", "absmax")),
    "bitsandbytes, 8 bit": (int8, method("bitsandbytes"), ("bitsandbytes", "SCB")),
    "JANGTQ": (jangtq, {"weight_format": "mxtq"}, ("JANGTQ", "jang-tools", "tq_packed")),
}


def write(folder, parts, config):
    """The HF layout, experts and attention in another tool's format, headers alone."""
    tensors = []
    for spec in weights.inventory(ModelArgs.from_dict(CONFIG)):
        if spec.component in ("experts", "attention") and len(spec.shape) == 2:
            path = spec.name.removesuffix(".weight")
            tensors += [(f"{path}.{n}", dtype, shape) for n, dtype, shape in parts(*spec.shape)]
        else:
            tensors.append((spec.name, "BF16", spec.shape))
    return write_headers(folder, CONFIG | config, ((n, d, s, SIZES[d] * math.prod(s)) for n, d, s in tensors))


def errors_of(folder, given, capsys):
    """What each reader says, without the name of the command."""
    for read in (glm_dsa.load, glm_dsa.__main__.count, lambda f: Asked.of(given({"--checkpoint": str(f)}))):
        with pytest.raises(FormatError) as caught:
            read(folder)
        yield str(caught.value)
    for command, name in ((main, "audit"), (glm_dsa.__main__.main, "inventory")):
        assert command([name, str(folder)]) != 0
        out, err = capsys.readouterr()
        assert out == ""
        yield err.partition(": ")[2].removesuffix("\n")


@pytest.mark.parametrize("name", FORMATS)
def test_a_foreign_format_is_refused_by_its_name_and_nothing_else(name, tmp_path, given, capsys):
    parts, config, named = FORMATS[name]
    folder = write(tmp_path / "f", parts, config)
    lines = set(errors_of(folder, given, capsys))
    assert len(lines) == 1, lines
    (line,) = lines
    assert line.startswith(f"{folder}: ")
    assert all(part in line for part in named), line
    assert line.isprintable()


FILES = {
    "GGUF": ("GLM-5.2-Q4_K_M-00001-of-00009.gguf", "GLM-5.2-Q4_K_M-00002-of-00009.gguf"),
    "pickle": ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"),
    "JANG": ("model-00001-of-00002.jang.safetensors", "jang_config.json"),
    "Ascend": ("quant_model_weight_w8a8_dynamic-00001-of-00056.safetensors", "quant_model_description.json"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("with_config", [True, False])
def test_files_of_another_kind_alone_are_named(name, with_config, tmp_path, given, capsys):
    for file in FILES[name]:
        (tmp_path / file).write_bytes(b"\0" * 64)
    if with_config:
        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(FormatError, match=name) as caught:
        glm_dsa.load(tmp_path)
    assert FILES[name][0] in str(caught.value)
    assert main(["audit", str(tmp_path)]) != 0
    assert capsys.readouterr().err == f"verify: {caught.value}\n"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """(HF's layout in bf16, FP8 in blocks, an MLX build)"""
    folder = tmp_path_factory.mktemp("sound")
    source = checkpoints.write(folder / "hf", CONFIG)
    checkpoints.write_fp8(source, folder / "fp8", folder / "plain")
    model = glm_dsa.load(source)
    nn.quantize(model, 32, 4, mode="mxfp4", class_predicate=lambda path, m: "switch_mlp" in path)
    (folder / "mlx").mkdir()
    mx.save_safetensors(str(folder / "mlx" / "model.safetensors"), parameters_of(model))
    (folder / "mlx" / "config.json").write_text((source / "config.json").read_text())
    return [source, folder / "fp8", folder / "mlx"]


STALE = [
    method("modelopt", quant_algo="NVFP4"),
    method("compressed-tensors"),
    method("gptq"),
    method("quark"),
    method("fp8"),
]


@pytest.mark.parametrize("said", STALE, ids=str)
def test_what_a_build_was_made_from_does_not_make_it_foreign(said, sound, tmp_path):
    """A config that still says so; files of other kinds beside the weights."""
    for i, folder in enumerate(sound):
        other = tmp_path / str(i)
        other.mkdir()
        for file in folder.iterdir():
            (other / file.name).symlink_to(file)
        for name in ("jang_config.json", "model.gguf", "training_args.bin", "hf_quant_config.json"):
            (other / name).write_bytes(b"{}")
        (other / "config.json").unlink()
        config = json.loads((folder / "config.json").read_text()) | said
        (other / "config.json").write_text(json.dumps(config))
        found = audit.audit(release.headers_of(str(other)))
        assert [f.what for f in found.findings if f.severity == audit.FAULT] == []
        assert glm_dsa.load(other).args.num_hidden_layers == 2


def test_damage_is_no_foreign_format(sound, tmp_path):
    """A stray of another tool's outside of the layers; a scale beside a matrix that is not packed: faults, told by name."""
    config = json.loads((sound[0] / "config.json").read_text())
    specs = [(s.name, "BF16", s.shape, 2 * math.prod(s.shape)) for s in weights.inventory(ModelArgs.from_dict(config))]
    scale = "model.layers.0.self_attn.o_proj.weight_scale"
    strays = [("x.qweight", "U32", (2,), 8), ("x.g_idx", "U32", (2,), 8), (scale, "F32", (1,), 4)]
    folder = write_headers(tmp_path / "d", config, [*specs, *strays])
    found = audit.audit(release.headers_of(str(folder)))
    faults = "\n".join(f.what for f in found.findings if f.severity == audit.FAULT)
    assert all(name in faults for name, *_ in strays)
    with pytest.raises(CheckpointError) as caught:
        glm_dsa.load(folder)
    assert not isinstance(caught.value, FormatError)


def test_a_block_scale_of_another_name_is_told_by_its_name(sound, tmp_path):
    """One of a sound release of FP8 blocks; it is no other format for that."""
    headers = read_headers(sound[1])
    one = next(n for n in headers if n.endswith("o_proj.weight_scale_inv"))
    tensors = [(n.removesuffix("_inv") if n == one else n, t.dtype, t.shape, t.nbytes) for n, t in headers.items()]
    folder = write_headers(tmp_path / "d", json.loads((sound[1] / "config.json").read_text()), tensors)
    found = audit.audit(release.headers_of(str(folder)))
    faults = [f.what for f in found.findings if f.severity == audit.FAULT]
    assert any(one.removesuffix("_scale_inv") in what for what in faults), faults


def test_a_repository_without_safetensors_is_known_by_its_files(monkeypatch):
    def refused(*_, **__):
        raise ValueError("not a safetensors repo")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refused)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refused)
    monkeypatch.setattr(release, "_in_cache", lambda *_: None)
    monkeypatch.setattr(release, "_files_of", lambda *_: ["README.md", "GLM-5.2-UD-Q2_K_XL.gguf"])
    with pytest.raises(FormatError, match=r"nobody/GLM-5\.2-GGUF: GGUF"):
        release.headers_of("nobody/GLM-5.2-GGUF")
    monkeypatch.setattr(release, "_files_of", lambda *_: ["README.md"])
    with pytest.raises(CheckpointError, match="not a safetensors repo"):
        release.headers_of("nobody/GLM-5.2-GGUF")


def test_every_method_and_part_is_of_a_format_that_says_what_to_do():
    for format in {*foreign.METHODS.values(), *(f for f, _ in foreign.PARTS.values()), *(f for _, f in foreign.FILES)}:
        assert format.tool
        assert len(format.remedy) > 20
