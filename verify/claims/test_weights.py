"""Weights: every tensor of a checkpoint arrives, bit for bit, from every layout; anything odd is refused by name."""

import json
import shutil
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch

import glm_dsa
from glm_dsa import weights
from glm_dsa.model import parameters_of
from reference import checkpoints
from reference.stored import read_tensors, weights_of
from verify.cases import Case
from verify.engines.definition import Ours, to_numpy

CLAIM = "weights and formats"
pytestmark = pytest.mark.any_layout  # both layouts have the same tensors


def save_mlx(model, folder, config) -> None:
    """As mlx-lm saves: parameters under their module names, quantization in config.json."""
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), parameters_of(model), metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))


def same(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[n].dtype == theirs[n].dtype and mx.array_equal(ours[n], theirs[n]).item() for n in ours
    )


def test_every_tensor_arrives(case: Case, judge):
    """HF layout -> modules, against the tensors read by the safetensors library and split by numpy."""
    read, args = weights_of(case.folder), case.args
    ours = parameters_of(glm_dsa.load(case.folder, **case.spec.overrides))
    due: dict[str, np.ndarray] = {}
    for name in read_tensors(case.folder).names:
        tensor = read(name)
        if name.endswith("kv_b_proj.weight"):
            heads = tensor.reshape(args.num_attention_heads, -1, args.kv_lora_rank)
            stem = name.removesuffix("kv_b_proj.weight")
            due[stem + "embed_q.weight"] = heads[:, : args.qk_nope_head_dim].transpose(0, 2, 1)
            due[stem + "unembed_out.weight"] = heads[:, args.qk_nope_head_dim :]
        elif ".mlp.experts." in name:
            stem, rest = name.split(".experts.")
            expert, projection = rest.split(".", 1)
            stack = f"{stem}.switch_mlp.{projection}"
            due.setdefault(stack, np.zeros((args.n_routed_experts, *tensor.shape)))[int(expert)] = tensor
        else:
            due[name] = tensor
    judge.holds(
        case.name,
        "names",
        ours.keys() == due.keys(),
        f"{len(due)} parameters (differing: {sorted(ours.keys() ^ due.keys())[:3]})",
    )
    for name, tensor in due.items():
        judge.values(case.name, name, to_numpy(ours[name]), tensor, 0.0)


def test_mlx_layout_round_trip(case: Case, judge, tmp_path):
    """A checkpoint in mlx-lm's layout, bf16, loads to the same bits; so does one without MTP tensors."""
    model = glm_dsa.load(case.folder)
    save_mlx(model, tmp_path / "mlx", case.config)
    again = glm_dsa.load(tmp_path / "mlx")
    judge.holds(
        case.name, "mlx layout", same(parameters_of(again), parameters_of(model)), "the same bits after a round trip"
    )
    main = {n: t for n, t in parameters_of(model).items() if not weights.is_mtp(case.args, n)}
    shutil.copytree(tmp_path / "mlx", tmp_path / "bare")
    mx.save_safetensors(str(tmp_path / "bare" / "model.safetensors"), main)
    bare = glm_dsa.load(tmp_path / "bare")
    judge.holds(
        case.name,
        "no mtp",
        bare.mtp is None and same(parameters_of(bare), main),
        "without MTP tensors there is no MTP layer",
    )


def test_quantized_per_module(case: Case, judge, tmp_path):
    """Mixed bits and an unquantized rest load as stored, packed, and run as the dequantized weights do."""
    model = glm_dsa.load(case.folder, dtype=mx.float32)
    quantization: dict = {"group_size": 32, "bits": 4, "mode": "affine"}

    def predicate(path: str, module: nn.Module):
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % 32:
            return False
        if "down_proj" in path or "unembed_out" in path:
            return {"group_size": 32, "bits": 8, "mode": "affine"}
        return "lm_head" not in path and "indexer" not in path

    quantized = {p for p, m in model.named_modules() if predicate(p, m)}
    dense = parameters_of(model)
    nn.quantize(model, group_size=32, bits=4, class_predicate=predicate)
    packed = parameters_of(model)
    save_mlx(model, tmp_path / "q", {**case.config, "quantization": quantization})
    again = glm_dsa.load(tmp_path / "q")
    judge.holds(
        case.name, "packed", same(parameters_of(again), packed), f"{len(quantized)} modules load packed, bit for bit"
    )
    for path in quantized:
        bits = 8 if "down_proj" in path or "unembed_out" in path else 4
        dense[f"{path}.weight"] = mx.dequantize(
            packed[f"{path}.weight"], packed[f"{path}.scales"], packed[f"{path}.biases"], group_size=32, bits=bits
        )
    plain = glm_dsa.load(case.folder, dtype=mx.float32)
    plain.load_weights(list(dense.items()))
    tokens = mx.array(case.tokens(12))
    reference = case.reference(case.lengths[0])
    bound = reference.bound("logits", local=False)
    judge.values(case.name, "logits (packed, and dequantized)", to_numpy(again(tokens)), to_numpy(plain(tokens)), bound)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4", "nvfp4 with global scales"])
def test_other_modes(case: Case, judge, gate, tmp_path, mode):
    """Packings whose scales are one byte: the mode follows from the shapes, config.json need not name it."""
    model = glm_dsa.load(case.folder, dtype=mx.float32)
    has_scales, kind = mode.endswith("scales"), mode.split()[0]
    bits, group_size = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}[kind]

    def predicate(path: str, module: nn.Module):
        if ("switch_mlp" not in path and "q_b_proj" not in path) or module.weight.shape[-1] % group_size:
            return False
        extra = {"global_scale": True} if has_scales and "switch_mlp" in path else {}
        return {"group_size": group_size, "bits": bits, "mode": kind, **extra}

    nn.quantize(model, class_predicate=lambda path, module: hasattr(module, "to_quantized") and predicate(path, module))
    save_mlx(model, tmp_path / "q", {**case.config, "quantization": {"group_size": group_size, "bits": bits}})
    again = glm_dsa.load(tmp_path / "q")
    judge.holds(
        case.name, f"packed ({mode})", same(parameters_of(again), parameters_of(model)), "loads packed, bit for bit"
    )
    if has_scales:
        gate.not_verified["a run of nvfp4 with global scales"] = "mlx 0.32 multiplies it on a GPU only; it was loaded"
        return
    tokens = mx.array(case.tokens(12))
    judge.values(case.name, f"logits ({mode})", to_numpy(again(tokens)), to_numpy(model(tokens)), 0.0)


@pytest.mark.needs("mtp")
def test_an_mlx_build_with_the_mtp_layer_of_hf(case: Case, judge, tmp_path):
    """MTP added to a build that was converted without: its tensors keep HF's names, experts one by one."""
    model = glm_dsa.load(case.folder)
    main = {n: t for n, t in parameters_of(model).items() if not weights.is_mtp(case.args, n)}
    read = read_tensors(case.folder)
    files = {str(read.names[n]) for n in read.names if weights.is_mtp(case.args, n)}
    loaded: list[Any] = [mx.load(file) for file in sorted(files)]
    mtp = {n: t for tensors in loaded for n, t in tensors.items() if weights.is_mtp(case.args, n)}
    (tmp_path / "mixed").mkdir()
    mx.save_safetensors(str(tmp_path / "mixed" / "model.safetensors"), main)
    mx.save_safetensors(str(tmp_path / "mixed" / "model-mtp.safetensors"), mtp)
    (tmp_path / "mixed" / "config.json").write_text(json.dumps(case.config))
    again = parameters_of(glm_dsa.load(tmp_path / "mixed"))
    judge.holds(case.name, "mixed layouts", same(again, parameters_of(model)), "the same bits as from HF's layout")


def test_early_mlx_builds(case: Case, judge):
    """Builds from before `embed_q` keep a quantized kv_b_proj: values stay as they are packed, keys are unpacked and turned."""
    if case.args.kv_lora_rank % 32:
        pytest.skip(
            f"{case.name}: groups of 32 do not divide kv_lora_rank = {case.args.kv_lora_rank}: no such build can be"
        )
    read, attention = read_tensors(case.folder), "model.layers.0.self_attn"
    kv_b = mx.array(read(f"{attention}.kv_b_proj.weight", torch.float32).numpy())
    words, scales, biases = mx.quantize(kv_b, 32, 8)
    for dtype in (mx.float32, mx.bfloat16):  # of scales and biases
        rounded = scales.astype(dtype), biases.astype(dtype)
        packed = {f"{attention}.kv_b_proj.{p}": t for p, t in zip(weights.PACKED, (words, *rounded), strict=True)}
        split = weights.to_modules(case.args, packed, mx.float32)
        in_full = [part.astype(mx.float32) for part in rounded]
        meant = mx.dequantize(words, in_full[0], in_full[1], group_size=32, bits=8)
        heads = meant.reshape(case.args.num_attention_heads, -1, kv_b.shape[1])
        w_uk, w_uv = mx.split(heads, [case.args.qk_nope_head_dim], axis=1)
        held = [split[f"{attention}.unembed_out.{part}"] for part in weights.PACKED]
        floats = [part.astype(mx.float32) for part in held[1:]]
        again = mx.dequantize(held[0], floats[0], floats[1], group_size=32, bits=8)
        judge.values(case.name, f"unembed_out ({dtype})", to_numpy(again), to_numpy(w_uv), 0.0)
        keys, due = split[f"{attention}.embed_q.weight"], w_uk.swapaxes(-1, -2)
        judge.values(case.name, f"embed_q ({dtype})", to_numpy(keys), to_numpy(due), 0.0)
        is_plain = f"{attention}.embed_q.scales" not in split
        judge.holds(case.name, "embed_q", is_plain, "turned, it stays unpacked: packed anew it would be other weights")


@pytest.mark.needs("shared")
def test_shared_layers_may_carry_dead_indexers(case: Case, judge, tmp_path):
    shared = next(i for i in range(case.args.num_hidden_layers) if not case.args.runs_indexer(i))
    folder = tmp_path / "dead"
    shutil.copytree(case.folder, folder)
    read = read_tensors(folder)
    extra = {
        n.replace("layers.0.", f"layers.{shared}."): read(n, torch.bfloat16)
        for n in read.names
        if "layers.0.self_attn.indexer" in n
    }
    checkpoints.add_shard(folder, "model-extra.safetensors", extra)
    ours = parameters_of(glm_dsa.load(folder))
    judge.holds(
        case.name,
        "extra indexers",
        same(ours, parameters_of(glm_dsa.load(case.folder))),
        f"{len(extra)} dead tensors change nothing",
    )


@pytest.mark.parametrize("shape", [(576, 256), (128, 128), (130, 257), (48, 64)], ids=str)
def test_fp8_blocks(judge, shape):
    """e4m3 bytes with block scales, shapes that are no multiple of 128 included, against torch's own float8."""
    generator = torch.Generator().manual_seed(sum(shape))
    rows, columns = shape
    scale = torch.rand(-(-rows // 128), -(-columns // 128), generator=generator) * 0.1 + 1e-3
    packed = (torch.randn(shape, generator=generator) * 100).to(torch.float8_e4m3fn)
    spread = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    due = (packed.float() * spread).to(torch.bfloat16).float().numpy()
    ours = weights.dequantize_fp8(mx.array(packed.view(torch.uint8).numpy()), mx.array(scale.numpy()))
    judge.values("fp8", f"weight {list(shape)}", to_numpy(ours), due, 0.0)


def test_fp8_checkpoint(case: Case, judge, tmp_path):
    """A checkpoint as GLM-5.2-FP8 is stored runs as the one with its dequantized weights does."""
    fp8, plain = tmp_path / "fp8", tmp_path / "plain"
    checkpoints.write_fp8(case.folder, fp8, plain)
    tokens = case.tokens(12)
    ours = Ours(fp8, **case.spec.overrides).forward(tokens)["logits"]
    judge.values(case.name, "logits (fp8)", ours, Ours(plain, **case.spec.overrides).forward(tokens)["logits"], 0.0)
    dense = Ours(case.folder, **case.spec.overrides).forward(tokens)["logits"]
    judge.holds(
        case.name, "logits (fp8)", np.abs(ours - dense).max() > 1e-3, "fp8 really was read: it differs from bf16"
    )


def test_mlx_lm_loads_it_through_its_own_loader(case: Case, judge):
    """mlx-lm's `load_model`, strict, handed these classes: sanitize, then strict loading, then a run."""
    from mlx_lm.utils import load_model

    model, _ = load_model(case.folder, strict=True, get_model_classes=lambda config: (glm_dsa.Model, glm_dsa.ModelArgs))
    ours = parameters_of(glm_dsa.load(case.folder))
    judge.holds(case.name, "mlx-lm", same(parameters_of(model), ours), "the same parameters as through glm_dsa.load")
    judge.holds(case.name, "mlx-lm", len(model.make_cache()) == len(model.layers), "one cache for each layer")


def test_files_are_not_touched(case: Case, judge):
    before = {f.name: f.stat().st_mtime_ns for f in case.folder.iterdir()}
    glm_dsa.load(case.folder)
    after = {f.name: f.stat().st_mtime_ns for f in case.folder.iterdir()}
    judge.holds(case.name, "folder", before == after, "loading writes nothing")


def test_what_16_bit_and_packing_leave_alone(case: Case, judge):
    """The correction bias stays float32 whatever the model is cast to; a conversion leaves the indexer unpacked."""
    half = parameters_of(glm_dsa.load(case.folder, dtype=mx.float16, **case.spec.overrides))
    other = sorted(
        {str(t.dtype) for n, t in half.items() if ("e_score_correction_bias" in n) != (t.dtype == mx.float32)}
    )
    judge.holds(
        case.name, "dtypes", not other, f"float32 for the correction bias, float16 for the rest (also: {other})"
    )
    model = case.ours.model
    for name in half:
        judge.holds(
            case.name,
            name,
            model.cast_predicate(name) == ("e_score_correction_bias" not in name),
            "cast, but for the bias",
        )
    packed = [p for p, m in model.named_modules() if ".indexer." in p and model.quant_predicate(p, m)]
    judge.holds(case.name, "packing", not packed, f"no part of an indexer is packed unless asked for ({packed[:2]})")


def test_a_tied_head_that_is_stored_all_the_same(judge, tmp_path):
    """Some conversions write lm_head.weight beside a tied embedding."""
    folder = checkpoints.write(tmp_path / "tied", checkpoints.tiny(num_hidden_layers=1, tie_word_embeddings=True))
    bare = parameters_of(glm_dsa.load(folder))
    judge.holds("tied", "names", "lm_head.weight" not in bare, "the embedding is the head")
    head = read_tensors(folder)("model.embed_tokens.weight", torch.bfloat16).clone()
    checkpoints.add_shard(folder, "model-head.safetensors", {"lm_head.weight": head})
    judge.holds("tied", "names", same(parameters_of(glm_dsa.load(folder)), bare), "the same with the head stored too")
