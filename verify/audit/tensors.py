"""A release's tensors, by their headers, against what config.json asks for: there, of the right shape, in a format that can
be read; and nothing else there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from glm_dsa import ModelArgs, weights
from glm_dsa.errors import WeightsError
from glm_dsa.planning.components import Component
from glm_dsa.planning.formats import Format
from glm_dsa.planning.stored import FLOATS
from glm_dsa.storage import Stored
from glm_dsa.weights import FP8_BLOCK, TensorSpec

from ..core.findings import FAULT, NOTE, Findings, ranges

DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
SHAPE = "{tensors} {detail}; does config.json belong to these weights?"


class Tensors:
    """specs: those that are there, under the names that they are stored by; kept: {name: the format, or what it is instead};
    packed: {path of a packed matrix: its group_size, bits and mode}."""

    def __init__(self, args: ModelArgs, found: Mapping[str, Stored], findings: Findings) -> None:
        self.args, self.found, self.findings = args, found, findings
        self.components: dict[str, Component] = defaultdict(Component)
        self.specs: dict[str, TensorSpec] = {}
        self.kept: dict[str, Format | str] = {}
        self.packed: dict[str, dict[str, Any]] = {}
        self.with_mtp = weights.has_mtp(args, found)
        self._seen: set[str] = set()
        missing = []
        for spec in weights.stored_inventory(args, found):
            if weights.is_mtp(args, spec.name) and not self.with_mtp:
                continue
            if spec.name in found:
                self._take(spec)
            else:
                missing.append(spec.name)
        self._absent(missing)
        surplus = [name for name in found if name not in self._seen]
        self.unread_indexers = [n for n in surplus if ".indexer." in n and weights.is_ignorable(args, n)]
        self._surplus([n for n in surplus if n not in set(self.unread_indexers)])

    # -- one tensor, with its scales

    def _take(self, spec: TensorSpec) -> None:
        name, found = spec.name, self.found[spec.name]
        path = name.removesuffix(".weight")
        parts = [name]
        if found.dtype == "F8_E4M3":
            parts, kind = [name, f"{name}_scale_inv"], "fp8"
            self._fp8(spec, found)
        elif f"{path}.scales" in self.found and name.endswith(".weight"):
            parts += [p for part in ("scales", "biases", "global_scale") if (p := f"{path}.{part}") in self.found]
            kind = self._mlx_packed(spec, path)
        else:
            kind = self._plain(spec, found)
        self._seen.update(parts)
        nbytes = sum(self.found[part].nbytes for part in parts if part in self.found)
        self.components[spec.component].add(spec.shape, nbytes, kind)
        self.kept.setdefault(name, kind)
        self.specs[name] = spec

    def _plain(self, spec: TensorSpec, found: Stored) -> str:
        self._shape(spec.name, found.shape, spec.shape)
        if found.dtype not in FLOATS:
            kind = "{tensors} is {detail}: expected floating point, or packed weights with scales"
            self.findings.tensor(FAULT, kind, spec.name, found.dtype)
        elif found.dtype in DTYPE_NAMES:
            self.kept[spec.name] = Format(DTYPE_NAMES[found.dtype])
        return FLOATS.get(found.dtype, found.dtype)

    def _fp8(self, spec: TensorSpec, found: Stored) -> None:
        self._shape(spec.name, found.shape, spec.shape)
        scale = self.found.get(f"{spec.name}_scale_inv")
        due = tuple(-(-n // FP8_BLOCK) for n in spec.shape)
        if scale is None:
            kind = "{tensors}: FP8 without its _scale_inv; cast without its scale it would be wrong"
            self.findings.tensor(FAULT, kind, spec.name)
        elif scale.dtype != "F32" or scale.shape != due:
            detail = f"is {scale.dtype} {list(scale.shape)}: expected F32 {list(due)}"
            self.findings.tensor(FAULT, "{tensors} {detail}", f"{spec.name}_scale_inv", detail)

    def _mlx_packed(self, spec: TensorSpec, path: str) -> str:
        if not spec.is_packable:
            kind = "{tensors}: packed, which neither this definition nor mlx-lm has for it: the build does not load"
            self.findings.tensor(FAULT, kind, spec.name)
        parts = {p: self.found[p] for part in weights.PACKED if (p := f"{path}.{part}") in self.found}
        try:
            arrays: Any = {p: t.described for p, t in parts.items()}
            packing = weights.packing_of(path, arrays, spec.shape[-1])
        except WeightsError as error:
            detail = str(error).removeprefix(f"{path}: ")
            self.findings.tensor(FAULT, "{tensors}: {detail}", spec.name, detail)
            return "packed"
        for name, part in parts.items():
            last = part.shape[-1] if name.endswith(".weight") else spec.shape[-1] // packing["group_size"]
            self._shape(name, part.shape, (*spec.shape[:-1], last))
        self.packed[path] = packing
        self._parts(path, packing["mode"])
        scales = {DTYPE_NAMES.get(t.dtype, "") for p, t in parts.items() if not p.endswith(".weight")}
        self.kept[spec.name] = kept = Format(scales.pop() if len(scales) == 1 else "", **packing)
        return str(kept)

    def _parts(self, path: str, mode: str) -> None:
        """That nothing lies beside the words that this mode does not have."""
        if mode != "affine" and f"{path}.biases" in self.found:
            self.findings.tensor(FAULT, "{tensors}: {detail} has none; the build does not load", f"{path}.biases", mode)
        if f"{path}.global_scale" in self.found and (mode != "nvfp4" or ".switch_mlp." not in path):
            kind = "{tensors}: mlx keeps one for experts in nvfp4 only; the build does not load"
            self.findings.tensor(FAULT, kind, f"{path}.global_scale")

    def _shape(self, name: str, found: tuple[int, ...], due: tuple[int, ...]) -> None:
        if found != due:
            self.findings.tensor(FAULT, SHAPE, name, f"is {list(found)}: expected {list(due)}")

    # -- what is not there, and what should not be

    def _absent(self, missing: list[str]) -> None:
        indexers = [name for name in missing if ".indexer." in name]
        if indexers:
            schedule = next(c for c in self.args.conventions if c.name == "indexer_schedule")
            self.findings.say(
                FAULT,
                f"no indexer on layers {ranges(layers_of(indexers))} ({len(indexers)} tensors missing); expected one: "
                f"{schedule}; a loader that fills them with random numbers runs, and is wrong beyond index_topk",
            )
        for name in missing:
            if ".indexer." not in name:
                kind = "missing: {tensors}; a shard may be missing, or config.json is another model's"
                self.findings.tensor(FAULT, kind, name)

    def _surplus(self, surplus: list[str]) -> None:
        unread = [n for n in surplus if weights.is_ignorable(self.args, n)]
        heads = [n for n in unread if n.startswith("lm_head.")]
        if heads:
            self.findings.say(NOTE, f"{heads[0]}, unread: config.json ties the head to the embedding")
        if tables := len(unread) - len(heads):
            self.findings.say(NOTE, f"{tables} tables of angles (rotary_emb.inv_freq), unread")
        for name in (n for n in surplus if not weights.is_ignorable(self.args, n)):
            self.findings.tensor(FAULT, "not expected: {tensors}; config.json names no such tensor", name)


def layers_of(names: list[str]) -> list[int]:
    return sorted({int(m[1]) for n in names if (m := weights.LAYER.fullmatch(n))})
