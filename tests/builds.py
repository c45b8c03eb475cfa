"""Checkpoints whose files are all header: of any size, their data a hole."""

import json
import struct
from math import prod

from glm_dsa import weights
from glm_dsa.config import ModelArgs

ITEMS = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4)}
SHARD = 5 << 30


def parts_of(spec, kept):
    """(name, dtype, shape, bytes) of what a tensor is stored as."""
    dtype, item = ITEMS[kept.dtype]
    if not kept.is_packed:
        yield spec.name, dtype, spec.shape, prod(spec.shape) * item
        return
    path, rows = spec.name.removesuffix(".weight"), spec.shape[:-1]
    words = (*rows, spec.shape[-1] * kept.bits // 32)
    scales = (*rows, spec.shape[-1] // kept.group_size)
    yield f"{path}.weight", "U32", words, prod(words) * 4
    if kept.mode != "affine":
        yield f"{path}.scales", "U8", scales, prod(scales)
        return
    for part in ("scales", "biases"):
        yield f"{path}.{part}", dtype, scales, prod(scales) * item


def write_build(folder, config, formats):
    """An MLX build. `formats`: {tensor of the module inventory: its format}; those that are not in it are left out."""
    specs = (s for s in weights.module_inventory(ModelArgs.from_dict(config)) if s.name in formats)
    return write_headers(folder, config, (part for spec in specs for part in parts_of(spec, formats[spec.name])))


def write_headers(folder, config, tensors):
    """tensors: (name, dtype, shape, bytes) of each."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shards, size = [{}], 0
    for name, dtype, shape, nbytes in tensors:
        if shards[-1] and size + nbytes > SHARD:
            shards, size = [*shards, {}], 0
        shards[-1][name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [size, size + nbytes]}
        size += nbytes
    index = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        header = json.dumps(shard).encode()
        with (folder / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(header)) + header)
            stream.truncate(8 + len(header) + max(t["data_offsets"][1] for t in shard.values()))
        index |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder
