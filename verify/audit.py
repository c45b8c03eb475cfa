"""`python -m verify audit DIR_OR_REPO`: what headers alone tell of a release. Seconds for 1.5 TB; no weight is read.

Every tensor that config.json asks for, present, of the right shape and in a format that can be read; nothing else there;
how precise each component is kept, and whether that is wise; what the model and its cache take, and where that fits.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from glm_dsa import ModelArgs, weights
from glm_dsa.checkpoint import Stored
from glm_dsa.components import Component
from glm_dsa.errors import CacheError, ConfigError, WeightsError, printable
from glm_dsa.formats import Format
from glm_dsa.output import table
from glm_dsa.plan import FLOATS, MEMORIES, USABLE, Cache
from glm_dsa.recipe import Recipe, Rule
from glm_dsa.weights import FP8_BLOCK, TensorSpec

from .release import Release

FAULT, WARNING, NOTE = "FAULT", "warning", "note"
DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
USUAL = {  # of each mode, where nothing is said
    "affine": {"group_size": 64, "bits": 4},
    "mxfp4": {"group_size": 32, "bits": 4},
    "mxfp8": {"group_size": 32, "bits": 8},
    "nvfp4": {"group_size": 16, "bits": 4},
}
LEAST_BITS = 6  # of embedding and head: below, a warning
CONTEXTS = {"32k": 32 << 10, "128k": 128 << 10, "1M": 1 << 20}


@dataclass(frozen=True)
class Finding:
    """`what`, in one line, says where, what was expected, and what to do."""

    severity: str
    what: str


@dataclass
class Audit:
    release: str
    layout: str
    mtp: str
    files: int
    findings: list[Finding]
    conventions: list[str]
    components: dict[str, Component]
    cache: dict[str, dict[str, int]]  # {"fp16" or "int8": {context: bytes}}

    @property
    def nbytes(self) -> int:
        return sum(c.nbytes for c in self.components.values())

    @property
    def verdict(self) -> str:
        faults = sum(f.severity == FAULT for f in self.findings)
        if faults:
            return f"FAULT: {faults} of {len(self.findings)} findings"
        return "headers are as they should be; nothing is said here about the weights' values"

    def fits(self) -> dict[int, dict[str, list[str]]]:
        """{GB of memory: {cache: contexts that fit beside the weights}}."""
        return {
            memory: {
                kind: [c for c, size in sizes.items() if self.nbytes + size <= USABLE * (memory << 30)]
                for kind, sizes in self.cache.items()
            }
            for memory in MEMORIES
        }


def audit(release: Release, recipe: Recipe | None = None) -> Audit:
    """Raises `ConfigError` where config.json is no model's at all, and `RecipeError` where the recipe is not for this model;
    all else is a finding."""
    try:
        args = ModelArgs.from_dict(release.config)
    except ConfigError as error:
        raise ConfigError(f"{release.origin}/config.json: {error}") from None
    return _Auditor(args, release).run(recipe)


class _Auditor:
    def __init__(self, args: ModelArgs, release: Release) -> None:
        self.args, self.release, self.found = args, release, release.tensors
        self.findings: list[Finding] = []
        self.components: dict[str, Component] = defaultdict(Component)
        self.seen: set[str] = set()
        self.packed: dict[str, dict[str, Any]] = {}
        self.policy: dict[tuple[str, str], list[str]] = defaultdict(list)  # (component, format) -> tensors
        self.kept: dict[str, Format | str] = {}  # what it is in, where that is a format that MLX builds have

    def run(self, recipe: Recipe | None = None) -> Audit:
        with_mtp = weights.has_mtp(self.args, self.found)
        missing = []
        for spec in weights.stored_inventory(self.args, self.found):
            if weights.is_mtp(self.args, spec.name) and not with_mtp:
                continue
            if spec.name in self.found:
                self._take(spec)
            else:
                missing.append(spec.name)
        self._absent(missing)
        self._surplus()
        self._precision()
        self._against_config()
        if recipe is not None:
            self._against_recipe(recipe, with_mtp)
        mtp = "none" if not self.args.num_nextn_predict_layers else "present" if with_mtp else "absent"
        if mtp == "absent":
            self._say(
                NOTE, "config.json names an MTP layer, and no tensor of it is there: nothing can be drafted with it"
            )
        order = {FAULT: 0, WARNING: 1, NOTE: 2}
        return Audit(
            release=self.release.origin,
            layout="HF" if weights.is_hf_layout(self.found) else "MLX",
            mtp=mtp,
            files=len({t.file for t in self.found.values()}),
            findings=sorted(self.findings, key=lambda f: order[f.severity]),
            conventions=[str(c) for c in self.args.conventions],
            components=dict(self.components),
            cache=cache_sizes(self.args),
        )

    def _say(self, severity: str, what: str) -> None:
        self.findings.append(Finding(severity, printable(what)))

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
        self.seen.update(parts)
        nbytes = sum(self.found[part].nbytes for part in parts if part in self.found)
        self.components[spec.component].add(spec.shape, nbytes, kind)
        self.kept.setdefault(name, kind)
        self.policy[_policy_part(name), kind].append(name)

    def _plain(self, spec: TensorSpec, found: Stored) -> str:
        self._shape(spec.name, found.shape, spec.shape)
        if found.dtype not in FLOATS:
            self._say(FAULT, f"{spec.name} is {found.dtype}: floating point is due, or packed weights with scales")
        elif found.dtype in DTYPE_NAMES:
            self.kept[spec.name] = Format(DTYPE_NAMES[found.dtype])
        return FLOATS.get(found.dtype, found.dtype)

    def _fp8(self, spec: TensorSpec, found: Stored) -> None:
        self._shape(spec.name, found.shape, spec.shape)
        scale = self.found.get(f"{spec.name}_scale_inv")
        due = tuple(-(-n // FP8_BLOCK) for n in spec.shape)
        if scale is None:
            self._say(
                FAULT, f"{spec.name}: FP8 without {spec.name}_scale_inv; cast without its scale it would be wrong"
            )
        elif scale.dtype != "F32" or scale.shape != due:
            self._say(FAULT, f"{spec.name}_scale_inv is {scale.dtype} {list(scale.shape)}: F32 {list(due)} is due")

    def _mlx_packed(self, spec: TensorSpec, path: str) -> str:
        parts = {p: self.found[p] for part in weights.PACKED if (p := f"{path}.{part}") in self.found}
        try:
            arrays: Any = {p: t.described for p, t in parts.items()}
            packing = weights.packing_of(path, arrays, spec.shape[-1])
        except WeightsError as error:
            self._say(FAULT, str(error))
            return "packed"
        for name, part in parts.items():
            last = part.shape[-1] if name.endswith(".weight") else spec.shape[-1] // packing["group_size"]
            self._shape(name, part.shape, (*spec.shape[:-1], last))
        self.packed[path] = packing
        self._parts(spec, path, packing["mode"])
        scales = {DTYPE_NAMES.get(t.dtype, "") for p, t in parts.items() if not p.endswith(".weight")}
        self.kept[spec.name] = kept = Format(scales.pop() if len(scales) == 1 else "", **packing)
        return str(kept)

    def _parts(self, spec: TensorSpec, path: str, mode: str) -> None:
        """That nothing lies beside the words that this mode does not have."""
        if mode != "affine" and f"{path}.biases" in self.found:
            self._say(FAULT, f"{path}.biases: {mode} has none; the build does not load")
        if f"{path}.global_scale" in self.found and (mode != "nvfp4" or ".switch_mlp." not in path):
            self._say(FAULT, f"{path}.global_scale: mlx keeps one for experts in nvfp4 only; the build does not load")

    def _shape(self, name: str, found: tuple[int, ...], due: tuple[int, ...]) -> None:
        if found != due:
            self._say(FAULT, f"{name} is {list(found)}: {list(due)} is due; does config.json belong to these weights?")

    # -- what is not there, and what should not be

    def _absent(self, missing: list[str]) -> None:
        indexers = [name for name in missing if ".indexer." in name]
        if indexers:
            layers = sorted({int(m[1]) for n in indexers if (m := weights.LAYER.fullmatch(n))})
            schedule = next(c for c in self.args.conventions if c.name == "indexer_schedule")
            self._say(
                FAULT,
                f"no indexer on layers {ranges(layers)} ({len(indexers)} tensors missing), where one is due: {schedule}; "
                "a loader that fills them with random numbers runs, and is wrong beyond index_topk",
            )
        for line in grouped(name for name in missing if ".indexer." not in name):
            self._say(FAULT, f"missing: {line}; a shard may be missing, or config.json is another model's")

    def _surplus(self) -> None:
        surplus = [name for name in self.found if name not in self.seen]
        shared = [n for n in surplus if ".indexer." in n and weights.is_ignorable(self.args, n)]
        if shared:
            layers = sorted({int(m[1]) for n in shared if (m := weights.LAYER.fullmatch(n))})
            self._say(
                FAULT,
                f"an indexer on shared layers {ranges(layers)} ({len(shared)} tensors): they reuse the selection of the "
                "full layer below; this definition leaves these tensors unread, others run them",
            )
        unread = [n for n in surplus if n not in shared and weights.is_ignorable(self.args, n)]
        heads = [n for n in unread if n.startswith("lm_head.")]
        if heads:
            self._say(NOTE, f"{heads[0]}, unread: config.json ties the head to the embedding")
        if tables := len(unread) - len(heads):
            self._say(NOTE, f"{tables} tables of angles (rotary_emb.inv_freq), unread")
        for line in grouped(n for n in surplus if n not in shared and n not in unread):
            self._say(FAULT, f"not expected: {line}; config.json names no such tensor")

    # -- precision

    def _precision(self) -> None:
        for (part, kind), names in sorted(self.policy.items()):
            where = f"{part}: {kind} on {len(names)} tensors ({names[0]}{', ...' if len(names) > 1 else ''})"
            if part in ("router", "correction bias", "indexer") and " bit" in kind:
                self._say(FAULT, f"{where}; it decides by near ties: policy keeps it unquantized")
            elif part == "correction bias" and kind in ("bf16", "fp16"):
                self._say(WARNING, f"{where}; published in fp32: rounded, it changes which experts win near ties")
            elif part == "indexer" and kind == "fp8":
                self._say(NOTE, f"{where}, as the published FP8 release has it")
        for part in ("embedding", "head"):
            component = self.components.get(part)
            if component and component.bits < LEAST_BITS:
                self._say(WARNING, f"{part}: {component.bits:.1f} bits a weight; at least {LEAST_BITS} are advised")

    def _against_config(self) -> None:
        """mlx-lm packs modules as config.json says before it loads; this definition goes by shapes."""
        said = self.release.config.get("quantization")
        if not self.packed:
            if isinstance(said, Mapping):
                self._say(WARNING, "config.json has a key quantization, and nothing is packed")
            return
        if not isinstance(said, Mapping):
            self._say(
                WARNING,
                "packed weights, but config.json has no key quantization: mlx-lm's own loader will not load them",
            )
            return
        keys = ("group_size", "bits", "mode")
        default = {"mode": "affine"} | {k: said[k] for k in keys if k in said}
        others = []
        for path, packing in self.packed.items():
            own = said.get(path, {})
            due = default | dict(own) if isinstance(own, Mapping) else default
            # mlx-lm's mixed recipes write None, which mlx takes as the mode's own
            usual = USUAL.get(str(due.get("mode")), {})
            due = {k: usual.get(k) if v is None else v for k, v in due.items()}
            if own is False or any(due.get(k) != packing[k] for k in keys):
                others.append(path)
        if others:
            self._say(
                WARNING,
                f"{len(others)} modules are packed otherwise than config.json's key quantization says (first: {others[0]}, "
                f"{self.packed[others[0]]}): mlx-lm's own loader goes by the key",
            )

    def _against_recipe(self, recipe: Recipe, with_mtp: bool) -> None:
        """That every tensor is kept as the recipe says: bits, group size, mode, dtype, and the dtype of scales."""
        if weights.is_hf_layout(self.found):
            self._say(FAULT, f"recipe {recipe.source}: these are the original's tensors; an MLX build is due (convert)")
            return
        others: dict[tuple[Rule | None, str, str], list[str]] = defaultdict(list)
        absent = []
        for name, (due, rule) in recipe.decided(self.args, with_mtp).items():
            kept = self.kept.get(name)
            if kept is None:
                absent.append(name)
            elif not _is_as_due(kept, due):
                others[rule, _told(kept, due), _told(due, kept)].append(name)
        for line in grouped(absent):
            self._say(
                FAULT, f"recipe {recipe.source}: {line}: not there under this name, under which convert writes it"
            )
        for (rule, kept, wanted), names in others.items():
            by = rule or ("no rule names it" if len(names) == 1 else "no rule names them")
            self._say(FAULT, f"recipe {recipe.source}: {'; '.join(grouped(names))}: {kept}, {wanted} is due: {by}")


def _is_as_due(kept: Format | str, due: Format) -> bool:
    if isinstance(kept, str) or not (kept.is_packed and due.is_packed and kept.mode != "affine"):
        return kept == due
    return kept.packing() == due.packing()  # scales of one byte, whatever the recipe's dtype


def _told(one: Format | str, other: Format | str) -> str:
    """A format; with the dtype of its scales, where that alone tells it from the other."""
    if isinstance(one, Format) and str(one) == str(other):
        return f"{one} with scales and biases in {one.dtype or 'different dtypes'}"
    return str(one)


def _policy_part(name: str) -> str:
    if name.endswith("e_score_correction_bias"):
        return "correction bias"
    if ".indexer." in name:
        return "indexer"
    return "router" if name.endswith("mlp.gate.weight") else ""


def grouped(names: Iterable[str]) -> list[str]:
    """Names that differ in their numbers only, in one line each: `model.layers.3-5.mlp.experts.0-7.up_proj.weight (24)`."""
    numbers: dict[tuple[str, ...], list[list[int]]] = defaultdict(list)
    for name in names:
        first, *rest = re.split(r"\.([0-9]{1,9})(?=\.)", name)
        numbers[first, *rest[1::2]].append([int(n) for n in rest[::2]])
    lines = []
    for (first, *texts), found in numbers.items():
        columns = (ranges(sorted(set(column))) for column in zip(*found, strict=True))
        line = first + "".join(f".{column}{text}" for column, text in zip(columns, texts, strict=True))
        lines.append(line + (f" ({len(found)} tensors)" if len(found) > 1 else ""))
    return lines


def ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 6] -> "0-2,6"."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def cache_sizes(args: ModelArgs) -> dict[str, dict[str, int]]:
    """Bytes of the KV cache of one sequence, by context, where the model runs in 16 bit."""
    sizes = {}
    for kind, bits in (("fp16", 16), ("int8", 8)):
        try:
            sizes[kind] = {context: Cache.of(args, tokens, bits).main for context, tokens in CONTEXTS.items()}
        except CacheError:  # no group of values divides this model's widths
            continue
    return sizes


# -- what is printed


def render(found: Audit) -> str:
    size = found.nbytes
    out = [
        printable(
            f"{found.release}: {found.layout} layout, {found.files} files, {size / 1e9:,.1f} GB, MTP {found.mtp}"
        ),
        "",
    ]
    rows: list[tuple[str, ...]] = [("component", "tensors", "parameters", "GB", "bits a weight", "formats")]
    for name, c in found.components.items():
        rows.append((name, f"{c.tensors:,}", f"{c.parameters:,}", f"{c.nbytes / 1e9:.3f}", f"{c.bits:.2f}", c.told()))
    total = Component.sum(found.components.values())
    rows.append(
        ("total", f"{total.tensors:,}", f"{total.parameters:,}", f"{total.nbytes / 1e9:.3f}", f"{total.bits:.2f}", "")
    )
    out += table(rows, right=(1, 2, 3, 4))
    rows = [("KV cache, GB", *CONTEXTS)]
    rows += [(kind, *(f"{size / 1e9:.2f}" for size in sizes.values())) for kind, sizes in found.cache.items()]
    out += ["", *table(rows, right=(1, 2, 3))]
    rows = [("memory", *(f"{kind} cache" for kind in found.cache))]
    for memory, kinds in found.fits().items():
        rows.append((f"{memory} GB", *(f"up to {c[-1]}" if c else "no" for c in kinds.values())))
    out += ["", f"what fits, weights and cache within {USABLE:.0%} of memory, one sequence", *table(rows)]
    out += ["", "conventions in force", *(f"  {c}" for c in found.conventions)]
    out += ["", "findings"] if found.findings else ["", "findings: none"]
    out += [f"  {f.severity}: {f.what}" for f in found.findings]
    return "\n".join([*out, "", f"verdict: {found.verdict}"])


def as_json(found: Audit) -> str:
    plain = asdict(found) | {"bytes": found.nbytes, "fits": found.fits(), "verdict": found.verdict}
    for name, component in found.components.items():
        plain["components"][name]["bits"] = round(component.bits, 4)
    return json.dumps(plain, indent=2)
