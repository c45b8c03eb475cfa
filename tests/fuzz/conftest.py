"""The checkpoints that are damaged, sound."""

import shutil

import mlx.core as mx
import mlx.nn as nn
import pytest

import glm_dsa
from glm_dsa import weights
from glm_dsa.model import parameters_of
from reference import checkpoints
from reference.stored import read_tensors

from .bounds import CONFIG, TINY, meaning
from .files import LAYOUTS


@pytest.fixture(scope="session")
def layouts(tmp_path_factory):
    """{layout: (its files, what it means)}: HF's in shards, FP8 in one file, mlx-lm's packed, HF's names packed as early
    builds for mlx were."""
    base = tmp_path_factory.mktemp("sound")
    checkpoints.write(base / "hf", TINY, shard_size="100KB")
    checkpoints.write_fp8(base / "hf", base / "fp8", base / "plain")
    model = glm_dsa.load(base / "hf")
    nn.quantize(model, 32, 8, class_predicate=lambda path, m: path.endswith(("q_a_proj", "down_proj", "unembed_out")))
    (base / "mlx").mkdir()
    mx.save_safetensors(str(base / "mlx" / "model.safetensors"), parameters_of(model), {"format": "mlx"})
    tensors = {name: mx.load(str(file))[name] for name, file in read_tensors(base / "hf").names.items()}
    for path in [n.removesuffix(".weight") for n in tensors if "kv_b_proj" in n or "experts." in n]:
        packed = mx.quantize(tensors[f"{path}.weight"], 32, 8)
        tensors |= {f"{path}.{part}": t for part, t in zip(weights.PACKED, packed, strict=True)}
    (base / "early").mkdir()
    mx.save_safetensors(str(base / "early" / "model.safetensors"), tensors)
    for packed in ("mlx", "early"):
        shutil.copy(base / "hf" / CONFIG, base / packed)
    return {
        name: ({f.name: f.read_bytes() for f in (base / name).iterdir()}, meaning(glm_dsa.load(base / name)))
        for name in LAYOUTS
    }
