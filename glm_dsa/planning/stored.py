"""What the files of a build hold, by component: bytes, formats, and what a model of them computes in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from .. import weights
from ..config import ModelArgs
from ..errors import ConfigError, WeightsError
from ..storage import Stored
from ..weights import TensorSpec
from .components import Component, counted
from .formats import Format

ITEM = 2  # bytes of a value where the model runs in 16 bit
FLOATS = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F64": "fp64"}
FORMATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float32"}


@dataclass
class OnDisk:
    """loaded: bytes of the main model once it is loaded (FP8 is unpacked then). dtypes: (tensor, what it computes in).
    surplus: tensors that the config does not name."""

    components: dict[str, Component]
    loaded: int
    dtypes: list[tuple[TensorSpec, str]]
    surplus: list[str]

    @staticmethod
    def of(args: ModelArgs, stored: Mapping[str, Stored]) -> OnDisk:
        """Raises `ConfigError` where the files are not this model's."""
        with_mtp = weights.has_mtp(args, stored)
        rows: list[tuple[TensorSpec, int, str]] = []
        found = OnDisk({}, 0, [], [])
        seen: set[str] = set()
        for spec in weights.stored_inventory(args, stored):
            if spec.component == "mtp" and not with_mtp:
                continue
            names = weights.stored_parts(spec.name, stored)
            if spec.name not in names:
                raise ConfigError(
                    f"{spec.name}: missing; python -m verify audit says what else is wrong with these files"
                )
            size = sum(stored[name].nbytes for name in names)
            kind, dtype = _kept_as(spec, stored)
            rows.append((spec, size, kind))
            found.dtypes.append((spec, dtype))
            if spec.component != "mtp":
                found.loaded += _loaded(args, spec, size, kind, len(names) > 1)
            seen.update(names)
        found.components = counted(rows)
        found.surplus = [n for n in stored if n not in seen and not weights.is_ignorable(args, n)]
        return found


def _loaded(args: ModelArgs, spec: TensorSpec, size: int, kind: str, is_packed: bool) -> int:
    """Bytes once it is loaded: FP8 is unpacked, and of a packed kv_b_proj the half that is turned (`weights._split_kv_b`)."""
    if kind == "fp8":
        return prod(spec.shape) * ITEM
    if not is_packed or not spec.name.endswith("kv_b_proj.weight"):
        return size
    keys = args.num_attention_heads * args.qk_nope_head_dim
    return keys * args.kv_lora_rank * ITEM + size * (spec.shape[0] - keys) // spec.shape[0]


def _kept_as(spec: TensorSpec, stored: Mapping[str, Stored]) -> tuple[str, str]:
    """(the format's name, the dtype that it computes in: "" where scales of one byte leave that to the rest).

    Raises `ConfigError` where its shape is not the config's."""
    first, path, due = stored[spec.name], spec.name.removesuffix(".weight"), spec.shape
    if f"{path}.scales" in stored and first.dtype == "U32":
        names = (n for part in weights.PACKED if (n := f"{path}.{part}") in stored)
        described: Any = {name: stored[name].described for name in names}
        try:
            packing = weights.packing_of(path, described, spec.shape[-1])
        except WeightsError as error:
            raise ConfigError(f"{error}; does config.json belong to these weights?") from None
        due = (*spec.shape[:-1], spec.shape[-1] * packing["bits"] // 32)
        dtype = FORMATS.get(stored[f"{path}.scales"].dtype, "")
        kind = str(Format(dtype, **packing))
    else:
        dtype = FORMATS.get(first.dtype, "bfloat16")
        kind = "fp8" if first.dtype == "F8_E4M3" else FLOATS.get(first.dtype, first.dtype)
    if first.shape != due:
        raise ConfigError(
            f"{spec.name} is {list(first.shape)}: expected {list(due)}; does config.json belong to these weights?"
        )
    return kind, dtype


def items(dtypes: Iterable[tuple[TensorSpec, str]]) -> tuple[int, int]:
    """Bytes of a value of the model's dtype, and of its indexer's keys, by what its tensors are kept in. Values of two dtypes
    that meet make float32, and so does float32 itself; the router is computed in float32 whatever it is kept in."""
    main, index = set(), set()
    for spec, dtype in dtypes:
        if spec.name.endswith("indexer.k_norm.weight") and spec.component != "mtp":
            index.add(dtype)
        elif dtype and spec.component not in ("mtp", "router", "indexer"):
            main.add(dtype)
    return (ITEM if len(main) == 1 and "float32" not in main else 4), (4 if "float32" in index else ITEM)
