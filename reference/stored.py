"""Tensors of a checkpoint under HF's names, out of any layout and format: HF's (bf16, fp16, fp32, FP8 blocks), or mlx-lm's
(experts stacked, kv_b_proj split, matrices packed; the halves of kv_b_proj under mlx-lm's names too), and what tools make of
either (`places`). Nothing is kept: a piece is read, unpacked and handed out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from .packed import Packing, dequantize
from .places import BLOCK, places

INDEX = "model.safetensors.index.json"
EMBEDDING, SLAB = "model.embed_tokens.weight", 8192  # rows of it that are read at once
EXPERT = re.compile(r"(.*\.mlp)\.experts\.(\d+)\.(\w+)\.weight")
HALF = re.compile(r"(.*\.self_attn)\.(embed_q|unembed_out)\.weight")
Rows = slice | int | None


class read_tensors:
    """By HF's name: float64 NumPy arrays for the equations, or torch tensors of a given dtype; whole, or `rows` of one.

    names: {tensor: file}, as HF or mlx-lm would have called it. Raises ValueError for a name that is not there, and for parts
    that do not belong together.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        config = self.folder / "config.json"
        self.config: dict[str, Any] = json.loads(config.read_text()) if config.is_file() else {}
        files = self._shards()
        self.places = places(files, self._heads(files), self.config)
        self.names = {name: place.file for name, place in self.places.items()}

    def _heads(self, files: Sequence[Path]) -> list[Path]:
        return sorted(file for file in self.folder.glob("mtp*.safetensors") if file not in files)

    def _shards(self) -> list[Path]:
        """As HF and mlx-lm choose: what the index lists, or else what is called model*; not what may lie beside them."""
        index = self.folder / INDEX
        if not index.is_file():
            return sorted(self.folder.glob("model*.safetensors"))
        listed = {self.folder / file for file in json.loads(index.read_text())["weight_map"].values()}
        there = sorted(file for file in listed if file.is_file())  # none of them: an index of another build
        return there or sorted(self.folder.glob("model*.safetensors"))

    def __call__(self, name: str, dtype: torch.dtype | None = None, rows: Rows = None) -> Any:
        """rows: of the first axis; an int leaves the axis out."""
        tensor = self._meant(name, dtype or torch.float64, rows)
        return tensor.to(dtype) if dtype is not None else tensor.to(torch.float64).numpy()

    def __contains__(self, name: str) -> bool:
        joined = name.endswith(".kv_b_proj.weight") and name.replace("kv_b_proj", "embed_q") in self.names
        half = HALF.fullmatch(name)
        split = half is not None and f"{half[1]}.kv_b_proj.weight" in self.names
        return joined or split or self.place(name)[0] in self.names

    def packing(self, name: str) -> tuple[Packing, torch.Tensor] | None:
        """How a matrix is packed, and its scales; None where it is not. Raises ValueError as above."""
        stored, expert = self.place(name)
        path = stored.removesuffix(".weight")
        if f"{path}.scales" not in self.names:
            return None
        words = self.shape(stored)
        scales = self._stored(f"{path}.scales", expert)
        return self._packing(path, words, scales), scales

    def place(self, name: str) -> tuple[str, int | None]:
        """Where HF's tensor is stored: under its own name, or as one expert of a stack."""
        expert = EXPERT.fullmatch(name)
        if name not in self.names and expert is not None:
            return f"{expert[1]}.switch_mlp.{expert[3]}.weight", int(expert[2])
        return name, None

    def _meant(self, name: str, dtype: torch.dtype, rows: Rows) -> torch.Tensor:
        stored, expert = self.place(name)
        if expert is not None:
            whole = self._matrix(stored, dtype, expert)
            return whole if rows is None else whole[rows]
        if name.endswith(".kv_b_proj.weight") and name not in self.names:
            whole = self._joined(name.removesuffix(".kv_b_proj.weight"), dtype)
            return whole if rows is None else whole[rows]
        half = HALF.fullmatch(name)
        if half is not None and name not in self.names and f"{half[1]}.kv_b_proj.weight" in self.names:
            whole = self._split(half[1], half[2] == "embed_q", dtype)
            return whole if rows is None else whole[rows]
        if f"{name}_scale_inv" in self.names:
            whole = self._fp8(name)
            return whole if rows is None else whole[rows]
        return self._matrix(stored, dtype, rows)

    def _matrix(self, name: str, dtype: torch.dtype, rows: Rows) -> torch.Tensor:
        """Plain or packed; `rows` of the first axis."""
        path = name.removesuffix(".weight")
        if f"{path}.scales" not in self.names or not name.endswith(".weight"):
            return self._stored(name, rows)
        words, scales = self._stored(name, rows), self._stored(f"{path}.scales", rows)
        biases = self._stored(f"{path}.biases", rows) if f"{path}.biases" in self.names else None
        whole = self._stored(f"{path}.global_scale", rows) if f"{path}.global_scale" in self.names else None
        packing = self._packing(path, words.shape, scales)
        return dequantize(words, scales, biases, packing, whole, torch.promote_types(dtype, torch.float32))

    def _packing(self, path: str, words: Sequence[int], scales: torch.Tensor) -> Packing:
        try:
            return Packing.of(words, scales, self.width(path))
        except ValueError as error:
            raise ValueError(f"{self.folder}: {path}: {error}") from None

    def _joined(self, attention: str, dtype: torch.dtype) -> torch.Tensor:
        """kv_b_proj = [W_uk; W_uv] of each head, out of embed_q = W_uk^T and unembed_out = W_uv."""
        w_uk = self._matrix(f"{attention}.embed_q.weight", dtype, None).transpose(-1, -2)
        return torch.cat([w_uk, self._matrix(f"{attention}.unembed_out.weight", dtype, None)], 1).flatten(0, 1)

    def _split(self, attention: str, keys: bool, dtype: torch.dtype) -> torch.Tensor:
        """The other way round: one of embed_q and unembed_out, out of kv_b_proj."""
        nope, value = self.config["qk_nope_head_dim"], self.config["v_head_dim"]
        heads = self._meant(f"{attention}.kv_b_proj.weight", dtype, None).unflatten(0, (-1, nope + value))
        return heads[:, :nope].transpose(-1, -2) if keys else heads[:, nope:]

    def _fp8(self, name: str) -> torch.Tensor:
        """Blocks times their scales, rounded to bf16: what FP8 checkpoints are unpacked to (DeepSeek's weight_dequant)."""
        scale, tensor = self._stored(f"{name}_scale_inv"), self._stored(name).float()
        spread = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        return (tensor * spread[: tensor.shape[0], : tensor.shape[1]]).bfloat16()

    def width(self, path: str) -> int:
        """How many values a row of a packed matrix holds: its shape leaves that open (4 bit in 64s, 8 bit in 32s)."""
        c, leaf = self.config, path.rsplit(".", 1)[-1]
        inner = c["intermediate_size"]
        if ".experts." in path or ".switch_mlp." in path:
            inner = c["moe_intermediate_size"]
        elif ".shared_experts." in path:
            inner = c["moe_intermediate_size"] * (c.get("n_shared_experts") or 1)
        widths = {
            "q_b_proj": c["q_lora_rank"], "wq_b": c["q_lora_rank"], "kv_b_proj": c["kv_lora_rank"],
            "embed_q": c["qk_nope_head_dim"], "unembed_out": c["kv_lora_rank"], "eh_proj": 2 * c["hidden_size"],
            "o_proj": c["num_attention_heads"] * c["v_head_dim"], "down_proj": inner,
        }  # fmt: skip
        return widths.get(leaf, c["hidden_size"])

    def shape(self, name: str) -> list[int]:
        place = self.places[name]
        with safe_open(place.file, "pt") as shard:
            shape = shard.get_slice(place.name).get_shape()
        shape = shape if place.expert is None else shape[1:]
        return shape if place.rows is None else [*shape[:-2], place.rows[1] - place.rows[0], shape[-1]]

    def _stored(self, name: str, rows: Rows = None) -> torch.Tensor:
        if name not in self.places:
            raise ValueError(f"{self.folder}: no tensor {name} in its *.safetensors; are all shards there?")
        file, stored, expert, part = self.places[name]
        with safe_open(file, "pt") as shard:
            if expert is None and part is None:
                return shard.get_tensor(stored) if rows is None else shard.get_slice(stored)[rows]
            kept, of_matrix = shard.get_slice(stored), slice(None) if part is None else slice(*part)
            if expert is None and len(kept.get_shape()) > 2:
                return kept[slice(None) if rows is None else rows, of_matrix]
            whole = kept[of_matrix] if expert is None else kept[expert, of_matrix]
        return whole if rows is None else whole[rows]


class InFloat32:
    """The equations' weights out of a checkpoint of any size: in float32, nothing kept, of the embedding only rows."""

    def __init__(self, read: read_tensors) -> None:
        self.read = read

    def __call__(self, name: str) -> np.ndarray:
        weight: np.ndarray = self.read(name, torch.float32).numpy()
        return weight

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        """int [.., T] -> [.., T, hidden]."""
        wanted, at = np.unique(tokens, return_inverse=True)
        rows = []
        for start in np.unique(wanted // SLAB) * SLAB:
            inside = wanted[(wanted >= start) & (wanted < start + SLAB)]
            slab = self.read(EMBEDDING, torch.float32, slice(int(start), int(inside[-1]) + 1)).numpy()
            rows.append(slab[inside - start])
        return np.concatenate(rows)[at.reshape(tokens.shape)]


def weights_of(folder: str | Path) -> Callable[[str], np.ndarray]:
    """`read_tensors` that keeps what it read: for checkpoints that fit in memory in float64."""
    read, kept = read_tensors(folder), {}

    def get(name: str) -> np.ndarray:
        if name not in kept:
            kept[name] = read(name)
        return kept[name]

    return get
