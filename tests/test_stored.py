"""The oracle's own reading: packed matrices as their formats define them, and tensors under HF's names out of any layout."""

import json

import mlx.core as mx
import numpy as np
import pytest
import torch

import glm_dsa
from glm_dsa.model import parameters_of
from reference import checkpoints
from reference.packed import Packing, dequantize, unpack
from reference.stored import read_tensors

AFFINE = [(bits, group, "affine") for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]


def as_torch(array):
    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(array.astype(mx.float32))).bfloat16()
    return torch.from_numpy(np.array(array))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize(("bits", "group", "mode"), [*AFFINE, (4, 32, "mxfp4"), (8, 32, "mxfp8"), (4, 16, "nvfp4")])
def test_unpacked_as_mlx_does(bits, group, mode, dtype):
    x = mx.random.normal((5, 7, 256), key=mx.random.key(bits)).astype(dtype)
    parts = [as_torch(part) for part in mx.quantize(x, group_size=group, bits=bits, mode=mode)]
    packing = Packing.of(parts[0].shape, parts[1], 256)
    assert packing == Packing(bits, group, mode)
    ours = dequantize(*parts[:2], parts[2] if mode == "affine" else None, packing)
    packed = mx.quantize(x, group_size=group, bits=bits, mode=mode)
    floats = [part.astype(mx.float32) if mode == "affine" and i else part for i, part in enumerate(packed)]
    theirs = np.array(mx.dequantize(*floats, group_size=group, bits=bits, mode=mode, dtype=mx.float32))
    # affine: one product and one sum, rounded once or twice; the others are exact
    assert np.abs(ours.numpy() - theirs).max() <= (5e-7 if mode == "affine" else 0)
    if mode == "affine":
        exact = dequantize(*parts, packing, dtype=torch.float64).numpy()
        assert np.abs(ours.numpy() - exact).max() <= 5e-7


def test_global_scales_of_nvfp4():
    x = mx.random.normal((3, 6, 64), key=mx.random.key(1))
    scale = mx.abs(x).max(axis=(-2, -1)).astype(mx.float32)
    packed = [
        mx.quantize(w, group_size=16, bits=4, mode="nvfp4", global_scale=g) for w, g in zip(x, scale, strict=True)
    ]
    theirs = [
        mx.dequantize(w, s, None, group_size=16, bits=4, mode="nvfp4", global_scale=g, dtype=mx.float32)
        for (w, s), g in zip(packed, scale, strict=True)
    ]
    words, scales = (torch.stack([as_torch(parts[i]) for parts in packed]) for i in (0, 1))
    ours = dequantize(words, scales, None, Packing(4, 16, "nvfp4"), as_torch(scale))
    assert np.abs(ours.numpy() - np.array(mx.stack(theirs))).max() <= 1e-6


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_follow_one_another_in_a_stream_of_bits(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, 64)
    stream = "".join(format(code, f"0{bits}b")[::-1] for code in codes)  # least bit first
    raw = bytes(int(stream[i : i + 8][::-1], 2) for i in range(0, len(stream), 8))
    assert np.array_equal(unpack(torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(torch.uint32), bits), codes)


@pytest.mark.parametrize(("words", "scales"), [((4, 9), (4, 1)), ((4, 8), (4, 3)), ((4, 14), (4, 1))], ids=str)
def test_parts_that_do_not_belong_together_are_refused(words, scales):
    with pytest.raises(ValueError, match="do not pack rows of 64"):
        Packing.of(words, torch.zeros(scales, dtype=torch.uint8), 64)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    config = checkpoints.packable(num_hidden_layers=4, first_k_dense_replace=1)
    return checkpoints.write(tmp_path_factory.mktemp("stored") / "hf", config)


def test_an_mlx_build_reads_under_hfs_names(source, tmp_path):
    """Stacked experts one by one, kv_b_proj joined, each bit as HF's own file has it; also by rows."""
    (tmp_path / "mlx").mkdir()
    model = glm_dsa.load(source)
    mx.save_safetensors(str(tmp_path / "mlx" / "model.safetensors"), parameters_of(model))
    (tmp_path / "mlx" / "config.json").write_text((source / "config.json").read_text())
    theirs, ours = read_tensors(source), read_tensors(tmp_path / "mlx")
    for name in theirs.names:
        due = theirs(name, torch.float32)
        assert torch.equal(ours(name, torch.float32), due), name
        assert torch.equal(ours(name, torch.float32, slice(1, 3)), due[1:3]), name
        assert name in ours
    assert "model.layers.0.mlp.experts.0.gate_proj.weight" not in ours, "layer 0 is dense"
    with pytest.raises(ValueError, match=r"no tensor model.layers.9"):
        ours("model.layers.9.input_layernorm.weight")


def test_a_packed_build_reads_as_mlx_unpacks_it(source, tmp_path):
    import mlx.nn as nn

    model = glm_dsa.load(source, dtype=mx.float32)
    bits = {"q_a_proj": 8, "o_proj": 3, "down_proj": 6}

    def predicate(path, module):
        own = next((b for part, b in bits.items() if part in path), 4)
        return hasattr(module, "to_quantized") and "indexer" not in path and {"group_size": 64, "bits": own}

    nn.quantize(model, class_predicate=predicate)
    (tmp_path / "q").mkdir()
    mx.save_safetensors(str(tmp_path / "q" / "model.safetensors"), parameters_of(model))
    (tmp_path / "q" / "config.json").write_text((source / "config.json").read_text())
    read = read_tensors(tmp_path / "q")
    for name, module in model.named_modules():
        if not hasattr(module, "bits"):
            continue
        due = np.array(mx.dequantize(module.weight, module.scales, module.biases, module.group_size, module.bits))
        if ".switch_mlp." in name:
            stack, projection = name.split(".switch_mlp.")
            ours = [read(f"{stack}.experts.{e}.{projection}.weight", torch.float32).numpy() for e in range(len(due))]
        elif name.endswith(("embed_q", "unembed_out")):
            config, attention = json.loads((source / "config.json").read_text()), name.rpartition(".")[0]
            joined = read(f"{attention}.kv_b_proj.weight", torch.float32).numpy()
            joined = joined.reshape(config["num_attention_heads"], -1, config["kv_lora_rank"])
            nope = config["qk_nope_head_dim"]
            ours = joined[:, :nope].swapaxes(-1, -2) if name.endswith("embed_q") else joined[:, nope:]
        else:
            ours = read(f"{name}.weight", torch.float32).numpy()
        assert np.abs(np.stack(ours) - due).max() <= 1e-6 * np.abs(due).max(), name
