"""Checkpoints of GLM-5.2's true widths, in mlx-lm's layout and packed, for measuring what it takes to judge them.

    python -m reference.shapes --out DIR --layers 3 --bits 4        12 GB; --layers 4: 18 GB

Weights are seeded blocks, tiled, with a scale of their own for each group; matrices have gains near 1 on inputs of unit
variance, as trained ones do. Written piece by piece: 50 MB of memory.
"""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from . import checkpoints, hf, stored

GLM_5_2 = checkpoints.glm_5_2(
    hidden_size=6144, intermediate_size=12288, moe_intermediate_size=2048, kv_lora_rank=512, q_lora_rank=2048,
    qk_head_dim=256, qk_nope_head_dim=192, qk_rope_head_dim=64, v_head_dim=256, num_attention_heads=64,
    num_key_value_heads=64, index_head_dim=128, index_n_heads=32, index_topk=2048, n_routed_experts=256,
    num_experts_per_tok=8, vocab_size=154880, num_nextn_predict_layers=0, first_k_dense_replace=1, index_topk_freq=None,
    index_skip_topk_offset=None, index_share_for_mtp_iteration=None,
)  # fmt: skip
GROUP = 64
BLOCK, COUNT = (
    4_194_301,
    1_048_573,
)  # bytes, or values, of a seeded block: primes, so that no two experts are tiled alike
UNPACKED = ("norm", ".indexer.", "mlp.gate.")
SHARD = 5 << 30


class Piece(NamedTuple):
    """A tensor to write: its dtype as safetensors spells it, and where its values come from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: str  # "words", "scales", "biases", "plain"
    gain: float

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * {"U32": 4, "BF16": 2, "F32": 4}[self.dtype]


def config_of(layers: int, **changes: Any) -> dict[str, Any]:
    """A dense full layer, then experts: every second one shares the selection of the layer below."""
    types = ["full"] + ["full" if i % 2 else "shared" for i in range(1, layers)]
    return GLM_5_2 | {"num_hidden_layers": layers, "indexer_types": types} | changes


def pieces(config: dict[str, Any], bits: int) -> Iterator[Piece]:
    """What mlx-lm's layout holds of HF's parameters."""
    with torch.device("meta"):
        model = hf.build(config)
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("inv_freq"):
            continue
        for own, shape in _in_mlx_layout(name, tuple(parameter.shape), config):
            gain = 0.03 if "kv_a_proj" in own or "q_a_proj" in own else 1.6 if "q_b_proj" in own else 1.0
            if own.endswith("e_score_correction_bias"):
                yield Piece(own, "F32", shape, "plain", 0.15)
            elif len(shape) < 2 or any(part in own for part in UNPACKED):
                is_norm = "norm" in own and own.endswith(".weight")
                yield Piece(
                    own, "BF16", shape, "norm" if is_norm else "plain", 0.3 if len(shape) < 2 else shape[-1] ** -0.5
                )
            else:
                path, width = own.removesuffix(".weight"), shape[-1]
                deviation = ((4**bits - 1) / 12) ** 0.5  # of codes drawn evenly
                scale = gain * width**-0.5 / deviation
                groups = (*shape[:-1], width // GROUP)
                yield Piece(f"{path}.weight", "U32", (*shape[:-1], width * bits // 32), "words", 0)
                yield Piece(f"{path}.scales", "BF16", groups, "scales", scale)
                yield Piece(f"{path}.biases", "BF16", groups, "biases", -scale * (2**bits - 1) / 2)


def _in_mlx_layout(name: str, shape: tuple[int, ...], config: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    heads, latent, nope, value = (
        config[k] for k in ("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")
    )
    if name.endswith("experts.gate_up_proj"):
        stack, half = name.replace("experts.gate_up_proj", "switch_mlp"), (shape[0], shape[1] // 2, shape[2])
        return [(f"{stack}.gate_proj.weight", half), (f"{stack}.up_proj.weight", half)]
    if name.endswith("experts.down_proj"):
        return [(name.replace("experts.down_proj", "switch_mlp.down_proj.weight"), shape)]
    if name.endswith("kv_b_proj.weight"):
        attention = name.removesuffix("kv_b_proj.weight")
        return [
            (f"{attention}embed_q.weight", (heads, latent, nope)),
            (f"{attention}unembed_out.weight", (heads, value, latent)),
        ]
    return [(name, shape)]


def write(folder: Path, layers: int, bits: int, seed: int = 0, **changes: Any) -> Path:
    """Raises ValueError for bits that do not fill words evenly."""
    if bits not in (2, 4, 8):
        raise ValueError(f"{bits} bits: expected 2, 4 or 8")
    folder.mkdir(parents=True)
    config = config_of(layers, **changes)
    shards: list[list[Piece]] = [[]]
    for piece in pieces(config, bits):
        if shards[-1] and sum(p.nbytes for p in shards[-1]) + piece.nbytes > SHARD:
            shards.append([])
        shards[-1].append(piece)
    index: dict[str, str] = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / file, shard, seed)
        index |= dict.fromkeys((p.name for p in shard), file)
    (folder / stored.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=1))
    said = {"quantization": {"group_size": GROUP, "bits": bits, "mode": "affine"}}
    (folder / "config.json").write_text(json.dumps(config | said, indent=2))
    return folder


def _write_shard(file: Path, shard: Sequence[Piece], seed: int) -> None:
    header, at = {}, 0
    for piece in shard:
        header[piece.name] = {"dtype": piece.dtype, "shape": list(piece.shape), "data_offsets": [at, at + piece.nbytes]}
        at += piece.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for piece in shard:
            _fill(stream, piece, np.random.default_rng([seed, *piece.name.encode()]))


def _fill(stream: BinaryIO, piece: Piece, random: np.random.Generator) -> None:
    if piece.kind == "words":
        block = random.integers(0, 256, min(BLOCK, piece.nbytes), np.uint8).tobytes()
    else:
        count = min(COUNT, int(np.prod(piece.shape, dtype=np.int64)))
        if piece.kind == "plain":
            values = random.standard_normal(count, np.float32) * piece.gain
        elif piece.kind == "norm":
            values = 1 + piece.gain * random.uniform(-1, 1, count).astype(np.float32)
        else:  # scale and bias of a group belong together: one factor for both, from the same seed
            name = piece.name.rpartition(".")[0]
            factor = np.random.default_rng(list(name.encode())).uniform(0.6, 1.4, count).astype(np.float32)
            values = factor * piece.gain
        dtype = torch.float32 if piece.dtype == "F32" else torch.bfloat16
        block = torch.from_numpy(values).to(dtype).view(torch.uint8).numpy().tobytes()
    left = piece.nbytes
    while left:
        left -= stream.write(block[: min(left, len(block))])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m reference.shapes", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="a folder that is not there yet")
    parser.add_argument(
        "--layers", metavar="N", type=int, default=3, help="default 3: full dense, full and shared experts"
    )
    parser.add_argument("--bits", type=int, default=4, choices=(2, 4, 8))
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(argv)
    try:
        print(write(chosen.out, chosen.layers, chosen.bits, chosen.seed))
    except (ValueError, OSError) as error:
        parser.exit(1, f"{chosen.out}: {error}\n")


if __name__ == "__main__":
    main()
