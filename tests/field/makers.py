"""How inputs are made: a draft (config, tensors, files beside them), changed step by step, then written.

A draft's tensors are torch's, for checkpoints that run, or headers alone, for releases of true size whose data is a hole.
A step takes a draft and changes it; most do for both. `tiny(a, b)` is a maker: the small checkpoint, a and b done to it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from safetensors.torch import load_file, save_file

import glm_dsa
from glm_dsa import weights
from glm_dsa.model import parameters_of
from glm_dsa.planning.formats import Format
from reference import checkpoints
from reference.kept import TRAINED
from tests.builds import parts_of, write_headers

CONFIGS = Path(__file__).parents[2] / "verify" / "configs"
BYTES = {"F64": 8, "F32": 4, "U32": 4, "I32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "U8": 1, "I8": 1, "I64": 8}
TINY = checkpoints.packable(num_hidden_layers=5, first_k_dense_replace=1)
BF16 = Format("bfloat16")


class Header(NamedTuple):
    """A tensor of which there is a header alone."""

    dtype: str
    shape: tuple[int, ...]


@dataclass
class Draft:
    """files: of text, by name; beside: safetensors files that no index lists, {name: {tensor: array}}; kept: how each module
    of a build is, where its maker knows."""

    config: dict[str, Any]
    tensors: dict[str, Any]
    files: dict[str, str] = field(default_factory=dict)
    beside: dict[str, dict[str, Any]] = field(default_factory=dict)
    kept: dict[str, Format] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        if any(isinstance(tensor, Header) for tensor in self.tensors.values()):
            parts = ((n, h.dtype, h.shape, prod(h.shape) * BYTES[h.dtype]) for n, h in self.tensors.items())
            write_headers(folder, self.config, parts)
        else:
            folder.mkdir(parents=True)
            save_file(
                {n: t.contiguous() for n, t in self.tensors.items()}, folder / "model.safetensors", {"format": "pt"}
            )
            (folder / "config.json").write_text(json.dumps(self.config))
        for name, tensors in self.beside.items():
            save_file({n: t.contiguous() for n, t in tensors.items()}, folder / name, {"format": "pt"})
        for name, text in self.files.items():
            (folder / name).write_text(text)
        return folder

    def rename(self, change: Callable[[str], str]) -> None:
        self.tensors = {change(name): tensor for name, tensor in self.tensors.items()}

    def pop(self, pattern: str) -> dict[str, Any]:
        """Takes out all tensors whose names a regular expression finds; some there must be."""
        out = {n: self.tensors.pop(n) for n in list(self.tensors) if re.search(pattern, n)}
        assert out, f"no tensor {pattern}"
        return out


Step = Callable[[Draft], None]
Maker = Callable[["Bench", Path], Path]


class Bench:
    """What rows share for a session: checkpoints that were made once, read into drafts as often as is asked."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.made: dict[Any, Path] = {}

    def folder(self, key: Any, make: Callable[[Path], Any]) -> Path:
        """A checkpoint under a key, made at the first time."""
        if key not in self.made:
            folder = self.scratch / f"shared-{len(self.made)}"
            make(folder)
            self.made[key] = folder
        return self.made[key]

    @cached_property
    def source(self) -> Path:
        """A small checkpoint in HF layout, MTP included, with a tokenizer: five layers, the last two of which share."""
        return self.small(**TINY)

    def small(self, **config: Any) -> Path:
        def make(folder: Path) -> None:
            checkpoints.write_tokenizer(checkpoints.write(folder, config))

        return self.folder(json.dumps(config, sort_keys=True), make)

    def packed(self, source: Path, packing: dict[str, Any], spares: str) -> Path:
        """An MLX build, as mlx-lm's convert writes it; modules that the expression `spares` finds stay as they are."""

        def make(folder: Path) -> None:
            model = glm_dsa.load(source)
            nn.quantize(
                model, class_predicate=lambda p, m: hasattr(m, "to_quantized") and not re.search(spares, p) and packing
            )
            folder.mkdir()
            mx.save_safetensors(str(folder / "model.safetensors"), parameters_of(model))
            config = json.loads((source / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"quantization": packing}))
            for file in source.iterdir():
                if (
                    file.suffix in (".json", ".jinja")
                    and not (folder / file.name).exists()
                    and "index" not in file.name
                ):
                    (folder / file.name).write_text(file.read_text())

        return self.folder((source, json.dumps(packing), spares), make)


def draft_of(folder: Path) -> Draft:
    """A checkpoint folder, read."""
    tensors = {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}
    texts = {f.name: f.read_text() for f in folder.iterdir() if f.suffix in (".json", ".jinja")}
    config = json.loads(texts.pop("config.json"))
    texts.pop("model.safetensors.index.json", None)
    return Draft(config, tensors, texts)


def done(draft: Draft, steps: Iterable[Step], folder: Path) -> Path:
    for step in steps:
        step(draft)
    return draft.write(folder)


# -- where a row begins


def tiny(*steps: Step) -> Maker:
    """The small checkpoint in HF layout."""
    return lambda bench, folder: done(draft_of(bench.source), steps, folder)


def small(*steps: Step, **changes: Any) -> Maker:
    """The small checkpoint with other keys, from random weights (HF's own save)."""
    config = {k: v for k, v in (TINY | changes).items() if v is not None}
    return lambda bench, folder: done(draft_of(bench.small(**config)), steps, folder)


def trained(layout: str, *steps: Step) -> Maker:
    """The kept checkpoint that was trained under this layout, with its tokenizer."""
    return lambda bench, folder: done(draft_of(TRAINED / layout), steps, folder)


def built(
    *steps: Step, bits: int = 4, mode: str = "affine", group_size: int = 64, spares: str = r"\.indexer\."
) -> Maker:
    """The small checkpoint as an MLX build, all packed alike."""
    packing = {"group_size": group_size, "bits": bits, "mode": mode}
    return lambda bench, folder: done(draft_of(bench.packed(bench.source, packing, spares)), steps, folder)


def unpacked(*steps: Step) -> Maker:
    """The small checkpoint in MLX's layout, nothing packed."""
    own: Step = lambda draft: draft.config.pop("quantization") and None  # noqa: E731
    return lambda bench, folder: done(
        draft_of(bench.packed(bench.source, {"group_size": 64, "bits": 4, "mode": "affine"}, "")), (own, *steps), folder
    )


def trained_build(layout: str, *steps: Step, bits: int = 4) -> Maker:
    packing = {"group_size": 32, "bits": bits, "mode": "affine"}
    return lambda bench, folder: done(draft_of(bench.packed(TRAINED / layout, packing, r"\.indexer\.")), steps, folder)


def sized(config: str, *steps: Step) -> Maker:
    """A published config's tensors at true size, in HF layout, by their headers."""

    def make(_: Bench, folder: Path) -> Path:
        said = json.loads((CONFIGS / f"{config}.json").read_text())
        tensors = {
            s.name: Header("F32" if s.name.endswith("e_score_correction_bias") else "BF16", s.shape)
            for s in weights.inventory(glm_dsa.ModelArgs.from_dict(said))
        }
        return done(Draft(said, tensors), steps, folder)

    return make


def config_alone(config: str) -> Maker:
    """A published config.json, without weights."""

    def make(_: Bench, folder: Path) -> Path:
        folder.mkdir()
        (folder / "config.json").write_text((CONFIGS / f"{config}.json").read_text())
        return folder

    return make


def sized_build(config: str, kept: Callable[[str], Format], *steps: Step, **changes: Any) -> Maker:
    """A published config as an MLX build at true size, by its headers; `kept` says how each module's weight is."""

    def make(_: Bench, folder: Path) -> Path:
        said = {
            k: v for k, v in (json.loads((CONFIGS / f"{config}.json").read_text()) | changes).items() if v is not None
        }
        args, tensors, formats = glm_dsa.ModelArgs.from_dict(said), {}, {}
        for spec in weights.module_inventory(args):
            form = kept(spec.name) if spec.is_packable else BF16
            form = Format("float32") if spec.name.endswith("e_score_correction_bias") else form
            tensors |= {name: Header(dtype, tuple(shape)) for name, dtype, shape, _ in parts_of(spec, form)}
            formats[spec.name.removesuffix(".weight")] = form
        return done(Draft(said, tensors, kept=formats), steps, folder)

    return make


# -- steps that many rows take


def config(**changes: Any) -> Step:
    """Keys of config.json; None takes one away."""

    def step(draft: Draft) -> None:
        draft.config = {k: v for k, v in (draft.config | changes).items() if v is not None}

    return step


def without(pattern: str) -> Step:
    return lambda draft: draft.pop(pattern) and None


def renamed(pattern: str, to: str) -> Step:
    def step(draft: Draft) -> None:
        before = set(draft.tensors)
        draft.rename(lambda name: re.sub(pattern, to, name))
        assert before != set(draft.tensors), f"no tensor {pattern}"

    return step


def file(name: str, text: str | None) -> Step:
    """A file beside the weights, as a text; None takes it away."""
    return lambda draft: draft.files.pop(name) and None if text is None else draft.files.update({name: text})


def json_file(name: str, **changes: Any) -> Step:
    """Keys of a JSON file beside the weights; None takes one away."""

    def step(draft: Draft) -> None:
        said = json.loads(draft.files.get(name, "{}")) | changes
        draft.files[name] = json.dumps({k: v for k, v in said.items() if v is not None})

    return step


def layer(name: str) -> int | None:
    found = re.search(r"layers\.(\d+)\.", name)
    return int(found[1]) if found else None
