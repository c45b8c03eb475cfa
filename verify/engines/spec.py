"""One side of a comparison, as the command line spells it: an implementation, a checkpoint, or both, and how it runs.

./release                                    this project's definition on a checkpoint
hf@./release                                 HF's modules on its weights, unpacked; `equations@`: float64
mlx_lm.models.glm_moe_dsa@./release          somebody's code (a .py file too)
./release,kv_bits=8,device=gpu               options, separated by commas
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from glm_dsa import ModelArgs
from glm_dsa.config import OVERRIDES
from glm_dsa.errors import CheckpointError, printable
from glm_dsa.store import KvQuantization
from reference.equations import Conventions

from .conventions import conventions_of
from .headers import Release, headers_of
from .pruning import Numberings
from .third_party import Implementation

OURS, HF, EQUATIONS = "glm_dsa", "hf", "equations"
ORACLES = (HF, EQUATIONS)
DTYPES = ("float32", "bfloat16", "float16")
SMALL = 1 << 30  # bytes of a checkpoint that is held in memory whole
OPTION = re.compile(r",(\w+)=([^,=]*)$")
CONVENTIONS = tuple(name for name in OVERRIDES if name != "indexer_types")
KNOWN = ("dtype", "device", "kv_bits", "kv_group_size", "revision", *CONVENTIONS)


@dataclass(frozen=True)
class Side:
    """implementation: OURS, HF, EQUATIONS, or somebody's MODULE or FILE.py. options: dtype, device, kv_bits, kv_group_size,
    revision. overrides: conventions, as `ModelArgs.from_dict` takes them. within: what surrounds its runs; it is
    given HF's model, where that is what runs. numberings: of the layers whose experts are not numbered as those of the
    side that it is held to."""

    text: str
    implementation: str
    checkpoint: str
    options: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    within: Callable[[Any], AbstractContextManager[Any]] = nullcontext
    numberings: Numberings = field(default_factory=dict)

    @cached_property
    def release(self) -> Release:
        """Raises `CheckpointError`."""
        found = headers_of(self.checkpoint, self.options.get("revision"))
        if found.folder is None:
            raise CheckpointError(
                f"{found.origin}: not downloaded; expected its weights here (its headers can be audited)"
            )
        return found

    @property
    def folder(self) -> Path:
        assert self.release.folder is not None
        return self.release.folder

    @cached_property
    def args(self) -> ModelArgs:
        """Raises `ConfigError`."""
        return self.release.args(**self.overrides)

    @property
    def conventions(self) -> Conventions:
        return conventions_of(self.args)

    @property
    def changes(self) -> dict[str, Any]:
        """Config keys that the oracles are to read otherwise than they stand there."""
        return {k: v for k, v in self.overrides.items() if k == "index_topk"}

    @property
    def dtype(self) -> str:
        return str(self.options.get("dtype", "float64" if self.implementation == EQUATIONS else "float32"))

    @property
    def device(self) -> str:
        return str(self.options.get("device", "cpu"))

    @property
    def is_small(self) -> bool:
        return sum(t.nbytes for t in self.release.tensors.values()) <= SMALL

    @property
    def runs(self) -> str:
        """What runs there, in words."""
        names = {OURS: "this definition", HF: "HF's modules", EQUATIONS: "the equations"}
        who = names.get(self.implementation, f"{self.implementation}, somebody's code")
        kv = f", KV cache in {self.options['kv_bits']} bit" if "kv_bits" in self.options else ""
        asked = "".join(f", {name} = {value}" for name, value in self.overrides.items())
        return f"{who} on {self.checkpoint}, {self.dtype} on {self.device}{kv}{asked}"

    def same_weights(self, other: Side) -> bool:
        return self.folder.resolve() == other.folder.resolve()

    @classmethod
    def of(cls, release: Release, implementation: str, **how: Any) -> Side:
        """On a checkpoint whose headers were read."""
        side = cls(f"{implementation}@{release.origin}", implementation, release.origin, **how)
        side.__dict__["release"] = release
        return side

    def in_dtype(self, dtype: str) -> Side:
        return self._again(options={**self.options, "dtype": dtype})

    def _again(self, **changes: Any) -> Side:
        """With other fields; headers that were read are not read again."""
        side = replace(self, **changes)
        if "release" in self.__dict__:
            side.__dict__["release"] = self.release
        return side

    def on(self, implementation: str, **changes: Any) -> Side:
        """Another implementation on the same weights, as they are meant; nothing of how this side runs is kept."""
        kept = {k: v for k, v in self.options.items() if k == "revision"}
        text = f"{implementation}@{self.checkpoint}"
        return self._again(text=text, implementation=implementation, options=kept, within=nullcontext, **changes)


def sides_of(candidate: str, against: str | None, default: str) -> tuple[Side, Side]:
    """(candidate, reference). Each that names no checkpoint runs on the other's, or on `default`; without a reference,
    HF's modules on the candidate's weights are it (the equations, where HF is the candidate). Raises ValueError, in one
    line."""
    first = _parsed(candidate)
    oracle = EQUATIONS if first.implementation == HF else HF
    second = (
        _parsed(against)
        if against is not None
        else replace(first, text=oracle, implementation=oracle, options={}, overrides=_of_both(first))
    )
    checkpoint = first.checkpoint or second.checkpoint or default
    first, second = (replace(s, checkpoint=s.checkpoint or checkpoint) for s in (first, second))
    if against is None:
        kept = {k: v for k, v in first.options.items() if k == "revision"}
        second = replace(second, text=f"{oracle}@{checkpoint}", options=kept)
    for side in (first, second):
        _check(side)
    return first, second


def _of_both(first: Side) -> dict[str, Any]:
    """What the default reference takes over: how many keys are selected. Conventions are the checkpoint's."""
    return {k: v for k, v in first.overrides.items() if k == "index_topk"}


def _parsed(text: str) -> Side:
    rest, found = text, dict[str, str]()
    while match := OPTION.search(rest):
        if match[1] in found:
            raise ValueError(f"{printable(text)}: {match[1]} stands there twice")
        found[match[1]], rest = match[2], rest[: match.start()]
    unknown = next((name for name in found if name not in KNOWN), None)
    if unknown is not None:
        raise ValueError(f"{printable(text)}: no option is named {unknown}; known are {', '.join(KNOWN)}")
    options = {name: _option(text, name, value) for name, value in found.items() if name not in CONVENTIONS}
    overrides = {name: _plain(value) for name, value in found.items() if name in CONVENTIONS}
    if "@" in rest:
        implementation, _, checkpoint = rest.partition("@")
        if not implementation or not checkpoint:
            raise ValueError(f"{printable(text)}: expected IMPLEMENTATION@CHECKPOINT")
    elif not _is_code(rest):
        implementation, checkpoint = OURS, rest
        if not rest:
            raise ValueError(f"{printable(text) or 'the empty name'}: expected a checkpoint, an implementation, or both")
    else:
        implementation, checkpoint = rest, ""
    return Side(text, implementation, checkpoint, options, overrides)


def _is_code(text: str) -> bool:
    """`hf`, `package.module`, `package.module:Class`, `folder/file.py`; a repository's name has a slash, and no .py."""
    name = text.partition(":")[0]
    if text in (OURS, *ORACLES) or name.endswith(".py"):
        return True
    return not Path(text).is_dir() and "/" not in name and "." in name.strip(".")


def _option(text: str, name: str, value: str) -> Any:
    allowed = {"dtype": DTYPES, "device": ("cpu", "gpu")}
    if name in allowed and value not in allowed[name]:
        raise ValueError(f"{printable(text)}: {name}={value}: expected one of {', '.join(allowed[name])}")
    if name in ("kv_bits", "kv_group_size"):
        if not value.isdigit():
            raise ValueError(f"{printable(text)}: {name}={value}: expected a whole number")
        return int(value)
    return value


def _plain(value: str) -> Any:
    if value in ("true", "false"):
        return value == "true"
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _check(side: Side) -> None:
    """What cannot run, before anything does."""
    if side.implementation in ORACLES:
        if side.device != "cpu":
            raise ValueError(f"{printable(side.text)}: HF and the equations run on the CPU here")
        if side.implementation == EQUATIONS and "dtype" in side.options:
            raise ValueError(f"{printable(side.text)}: the equations run in float64")
    elif side.implementation != OURS:
        Implementation.of(side.implementation, "")
        if side.overrides.keys() - {"index_topk"}:
            raise ValueError(
                f"{printable(side.text)}: somebody's code reads its conventions from config.json; nothing can be overridden"
            )
    if "kv_bits" in side.options and side.implementation != OURS:
        raise ValueError(f"{printable(side.text)}: kv_bits is for this project's definition")
    if "kv_bits" in side.options:
        packed = KvQuantization(side.options["kv_bits"], side.options.get("kv_group_size", 64))
        packed.check(side.args.kv_lora_rank, side.args.qk_rope_head_dim)
    if "kv_group_size" in side.options and "kv_bits" not in side.options:
        raise ValueError(f"{printable(side.text)}: kv_group_size says nothing without kv_bits")
    if "revision" in side.options and Path(side.checkpoint).is_dir():
        raise ValueError(
            f"{printable(side.text)}: revision is for repositories; {printable(side.checkpoint)} is a folder"
        )
    side.args  # noqa: B018
