"""`python -m glm_dsa plan CONFIG_OR_DIR`: what a model takes, before anybody converts it. Counted, not estimated, from the
inventory that loads and audits, by a recipe, as llama.cpp would store it (`gguf.py`), or as the files of a build hold it.

GB are 10^9 bytes, GiB 2^30; a machine's memory is told in GB as it is sold, and has so many 2^30.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import foreign, weights
from ..cache import Widths, cache_bytes
from ..checkpoint import read_headers
from ..config import ModelArgs
from ..config_reader import read_json
from ..errors import CacheError, ConfigError, RecipeError, printable
from ..storage import Stored
from ..store import BITS, KvQuantization, fitting
from ..text import in_gb, in_gib, parse_count, table
from ..tiles import ELEMENTS
from . import gguf
from .components import Component, counted
from .formats import Format
from .recipe import Recipe
from .stored import ITEM, OnDisk, items

MEMORIES = (32, 64, 96, 128, 192, 256, 512)  # GB as sold: 2^30 bytes each
USABLE = 0.75  # of a Mac's memory every macOS lets the GPU hold; more by iogpu.wired_limit_mb
CHUNK = 2048  # tokens of a prompt at a time, as mlx-lm has it
IN_FLIGHT = 12  # arrays of the largest kind that a chunk of prefill has in memory at once, at most (measured: 5 to 13)
MOST_CONTEXT = 1 << 32
SIZES = {"": 1, "b": 1, "gb": 10**9, "gib": 1 << 30, "mb": 10**6, "mib": 1 << 20}


@dataclass(frozen=True)
class Cache:
    """Bytes of one sequence of `tokens`: the main model's latents (with rotary keys) and index keys; the MTP layer's own."""

    tokens: int
    kv_bits: int
    kept: str
    index_kept: str
    latents: int
    index_keys: int
    mtp: int

    @staticmethod
    def of(args: ModelArgs, tokens: int, kv_bits: int, item: int = ITEM, index_item: int = ITEM) -> Cache:
        """kv_bits: 16 (as the model runs), or what `KvQuantization` packs to. item, index_item: bytes of a value of the
        model's dtype, and of its indexer's keys. Raises `CacheError`."""
        quantization, kept = None, f"{8 * item} bit"
        if kv_bits != 16:
            groups = (g for g in (64, 32, 128) if args.kv_lora_rank % g == 0 and args.qk_rope_head_dim % g == 0)
            group = next(groups, None)
            if kv_bits not in BITS:
                raise CacheError(f"--kv-bits {kv_bits}: expected 16, or one of {', '.join(map(str, BITS))}")
            if group is None:
                raise CacheError(f"--kv-bits {kv_bits}: {fitting(args.kv_lora_rank, args.qk_rope_head_dim)}")
            quantization = KvQuantization(kv_bits, group)
            kept = str(quantization)

        def of_layer(layer: int) -> tuple[int, int]:
            widths = _widths(args, layer)
            return cache_bytes(widths, item, quantization)[0], cache_bytes(widths, index_item)[1]

        each = [of_layer(i) for i in range(args.num_hidden_layers)]
        latents, index_keys = (tokens * sum(column) for column in zip(*each, strict=True))
        mtp = tokens * sum(of_layer(args.num_hidden_layers)) if args.num_nextn_predict_layers else 0
        return Cache(tokens, kv_bits, kept, f"{8 * index_item} bit", latents, index_keys, mtp)

    @property
    def main(self) -> int:
        return self.latents + self.index_keys


@dataclass
class Plan:
    """components: of the main model. mtp: its MTP layer's, where there is one. loaded: bytes of the weights in memory."""

    source: str
    model_type: str
    how: str
    components: dict[str, Component]
    mtp: Component | None
    cache: Cache
    prefill: int
    loaded: int
    chunk: int
    notes: list[str] = field(default_factory=list)
    conventions: list[str] = field(default_factory=list)

    @property
    def main(self) -> Component:
        return Component.sum(self.components.values())

    @property
    def total(self) -> int:
        """Bytes of memory: weights, cache and prefill of the main model."""
        return self.loaded + self.cache.main + self.prefill

    def machines(self) -> dict[int, dict[str, Any]]:
        """{GB as sold: what is left of it, whether that holds the total, and whether macOS lends the GPU so much unasked}."""
        out = {}
        for sold in MEMORIES:
            memory = sold << 30
            out[sold] = {
                "rest_bytes": memory - self.total,
                "holds": self.total <= memory,
                "within_default": self.total <= USABLE * memory,
            }
        return out

    def as_dict(self) -> dict[str, Any]:
        main = self.main
        every = Component.sum([main, *([self.mtp] if self.mtp else [])])
        return {
            "source": self.source,
            "model_type": self.model_type,
            "as": self.how,
            "components": {name: c.as_dict() for name, c in self.components.items()},
            "without_mtp": main.as_dict() | {"gb": main.nbytes / 1e9, "gib": main.nbytes / 2**30},
            "mtp": self.mtp.as_dict() if self.mtp else None,
            "with_mtp": every.as_dict() | {"gb": every.nbytes / 1e9, "gib": every.nbytes / 2**30},
            "cache": {
                "tokens": self.cache.tokens, "kv_bits": self.cache.kv_bits, "kept": self.cache.kept,
                "latents_bytes": self.cache.latents, "index_keys_bytes": self.cache.index_keys,
                "mtp_bytes": self.cache.mtp,
            },
            "memory": {
                "weights_bytes": self.loaded, "cache_bytes": self.cache.main, "prefill_bytes_at_most_about": self.prefill,
                "chunk": self.chunk, "total_bytes": self.total,
            },
            "machines": self.machines(),
            "notes": self.notes,
            "conventions": self.conventions,
        }  # fmt: skip


# -- what is planned


def of_formats(args: ModelArgs, formats: Mapping[str, Format]) -> dict[str, Component]:
    """By component, "mtp" among them; of the tensors that have a format."""
    return counted(
        (spec, formats[spec.name].nbytes(spec.shape), str(formats[spec.name]))
        for spec in weights.module_inventory(args)
        if spec.name in formats
    )


def unpacked(args: ModelArgs, with_mtp: bool, dtype: str = "bfloat16") -> dict[str, Format]:
    """As an unpacked MLX build holds it: the correction bias in float32."""
    return {
        spec.name: Format("float32" if spec.name.endswith("e_score_correction_bias") else dtype)
        for spec in weights.module_inventory(args)
        if with_mtp or spec.component != "mtp"
    }


def prefill_bytes(args: ModelArgs, chunk: int, elements: int = ELEMENTS[mx.DeviceType.gpu], item: int = ITEM) -> int:
    """At most about so much above weights and cache: a few of the largest arrays of a chunk. The context is not in it."""
    pairs = chunk * args.num_experts_per_tok
    largest = max(
        pairs * args.hidden_size * 4,  # the experts' answers, weighed in float32
        chunk * args.num_attention_heads * (args.kv_lora_rank + args.qk_rope_head_dim) * item,  # absorbed queries
        4 * elements if args.has_indexer else 0,  # a tile of the indexer's scores
    )
    return IN_FLIGHT * largest


def _widths(args: ModelArgs, layer: int) -> Widths:
    return Widths(args.kv_lora_rank, args.qk_rope_head_dim, args.index_head_dim if args.runs_indexer(layer) else 0)


# -- the command


@foreign.explained
def plan(
    path: Path,
    recipe: Recipe | None = None,
    rules: gguf.Rules | None = None,
    context: int = 1 << 20,
    kv_bits: int = 16,
    chunk: int = CHUNK,
    size: int | None = None,
) -> Plan:
    """Of a config.json, or of the folder of a build. Without recipe or rules a folder with weights is told as it is stored,
    a config as unpacked in bfloat16. `size`: bytes of a build of that model without its MTP layer, for its bits a weight.

    Raises `GlmDsaError`.
    """
    args = ModelArgs.from_file(path)
    stored = _stored(path)
    with_mtp = args.num_nextn_predict_layers > 0 and (not stored or weights.has_mtp(args, stored))
    notes: list[str] = []
    item = index_item = ITEM
    loaded = None
    if rules is not None:
        components, notes = gguf.planned(args, rules, with_mtp)
        how = f"GGUF, {rules.told()}"
    elif stored and recipe is None:
        there = OnDisk.of(args, stored)
        components, loaded = there.components, there.loaded
        item, index_item = items(there.dtypes)
        how = f"as stored, {len({s.file for s in stored.values()})} files"
        if there.surplus:
            notes.append(
                f"not counted: {len(there.surplus)} tensors that config.json does not name ({there.surplus[0]}, ...)"
            )
    else:
        if recipe is None:
            formats, how = unpacked(args, with_mtp), "unpacked, bfloat16"
            notes = _notes(path)
        else:
            formats = recipe.formats(args, with_mtp)
            how = f"recipe {recipe.source}" + (f" ({recipe.name})" if recipe.name != recipe.source else "")
        components = of_formats(args, formats)
        item, index_item = items(
            (s, formats[s.name].dtype) for s in weights.module_inventory(args) if s.name in formats
        )
    if item > ITEM:
        notes.append("it runs, and keeps its cache, in float32: its tensors are in that, or in several dtypes")
    mtp = components.pop("mtp", None)
    main = Component.sum(components.values())
    if size is not None:
        notes.append(
            f"a build of {size:,} bytes ({in_gb(size)} GB, {in_gib(size, 3)} GiB) without MTP has "
            f"{8 * size / main.parameters:.3f} bits per weight"
        )
    cache = Cache.of(args, context, kv_bits, item, index_item)
    return Plan(
        str(path), args.model_type, how, components, mtp, cache, prefill_bytes(args, chunk, item=item),
        main.nbytes if loaded is None else loaded, chunk, notes, [str(c) for c in args.conventions],
    )  # fmt: skip


def _stored(path: Path) -> dict[str, Stored]:
    """Headers of a folder that has weights."""
    if not path.is_dir():
        return {}
    has_weights = any(path.glob("model*.safetensors")) or any(path.glob("*.safetensors.index.json"))
    return read_headers(path) if has_weights else {}


def _notes(path: Path) -> list[str]:
    """What a config alone leaves open. Raises `ConfigError` where it says that its weights are packed, and not how each is."""
    file = path / "config.json" if path.is_dir() else path
    said = read_json(file)
    if isinstance(said.get("quantization"), dict):
        raise ConfigError(
            f"{file}: it says that its weights are packed, and the files say how: give the build's folder, or --recipe"
        )
    packed = said.get("quantization_config")
    if not isinstance(packed, dict):
        return []
    if packed.get("quant_method") != "fp8":
        raise ConfigError(
            f"{file}: packed by a quant_method that is not read here (fp8 is): give --recipe, to plan another build"
        )
    return ["published as fp8; loading unpacks it to bfloat16, as is planned here"]


def tokens(text: str) -> int:
    """ "1M" -> 2^20, "128k" -> 2^17, "1000000" -> 10^6. Raises `RecipeError`."""
    try:
        return parse_count(text, MOST_CONTEXT)
    except ValueError as error:
        raise RecipeError(f"--context {text}: {error}") from None


def nbytes(text: str) -> int:
    """ "392.992GiB", "328.48 GB", "421972000000" -> bytes. Raises `RecipeError`."""
    match = re.fullmatch(r"(\d{1,16}(?:\.\d{1,6})?)\s*([A-Za-z]*)", text.strip())
    unit = match[2].lower() if match else ""
    found = round(float(match[1]) * SIZES[unit]) if match and unit in SIZES else 0
    if not found:
        raise RecipeError(f"--size {text}: expected bytes, e.g. 392.992GiB, 421.97GB, 421972000000")
    return found


# -- what is printed


def render(found: Plan, as_json: bool = False) -> str:
    if as_json:
        return json.dumps(found.as_dict(), indent=2)
    out = [printable(f"{found.source}: {found.model_type}, {found.how}"), ""]
    rows: list[tuple[str, ...]] = [("component", "tensors", "parameters", "bits", "GB", "GiB", "kept as")]
    rows += [_row(name, c) for name, c in found.components.items()]
    main = found.main
    rows.append(_row("together" if found.mtp is None else "without MTP", main))
    if found.mtp is not None:
        rows += [_row("mtp", found.mtp), _row("with MTP", Component.sum([main, found.mtp]))]
    out += table(rows, right=(1, 2, 3, 4, 5))
    cache = found.cache
    sizes = [
        ("weights", found.loaded, ""),
        ("latents, rotary keys", cache.latents, cache.kept),
        *([("index keys", cache.index_keys, cache.index_kept)] if cache.index_keys else []),
        ("prefill", found.prefill, f"chunks of {found.chunk:,}, on a GPU: at most about"),
        ("together", found.total, ""),
    ]
    rows = [(f"memory, {cache.tokens:,} tokens", "GB", "GiB", "")]
    rows += [(name, in_gb(n), in_gib(n), how) for name, n, how in sizes]
    out += ["", *table(rows, right=(1, 2))]
    if found.mtp is not None:
        out.append(
            f"(with the MTP layer {in_gb(found.mtp.nbytes + cache.mtp)} GB more: its weights, and {in_gb(cache.mtp)} of cache)"
        )
    rows = [("machine", "rest, GB", "")]
    for sold, fits in found.machines().items():
        how = "holds it" if fits["within_default"] else "holds it, with iogpu.wired_limit_mb raised"
        if fits["holds"]:
            rows.append((f"{sold} GB", in_gb(fits["rest_bytes"], 1), how))
    none = f"no machine of up to {MEMORIES[-1]} GB holds it"
    out += ["", *(table(rows, right=(1,)) if len(rows) > 1 else [none])]
    if found.notes:
        out += ["", "notes", *(f"  {printable(note)}" for note in found.notes)]
    return "\n".join([*out, "", "conventions", *(f"  {c}" for c in found.conventions)])


def _row(name: str, c: Component) -> tuple[str, ...]:
    return (
        name, f"{c.tensors:,}", f"{c.parameters:,}", f"{c.bits:.3f}", in_gb(c.nbytes), in_gib(c.nbytes, 3),
        c.told(),
    )  # fmt: skip
