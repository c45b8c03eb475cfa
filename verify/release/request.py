"""A release as the command line puts it on trial: which layers, on which prompt, beside which original."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from glm_dsa import ModelArgs, checkpoint, memory, weights
from glm_dsa.errors import CheckpointError, printable
from reference.layers import Layers
from reference.stored import read_tensors

from .. import ROOT
from ..audit import audit, companions, config_keys
from ..cases import check_vocabulary
from ..core import bounds, report
from ..core.exits import NotJudged
from ..core.findings import Finding, Findings
from ..engines import pruning
from ..engines.conventions import conventions_in
from ..engines.headers import SHAPES, Release
from ..engines.lengths import checked_length, default_length, nbytes_of_scores
from . import prompt as prompts
from .prompt import Prompt

Array = np.ndarray


@dataclass(frozen=True)
class OnTrial:
    """What the command line asks for. `layers`: those that are run; the others are passed over."""

    headers: Release
    overrides: dict[str, Any]
    prompt: Prompt
    layers: list[int]
    original: Release | None = None
    limits: Mapping[str, float] = field(default_factory=dict)
    refused: str = ""  # why the definition does not load it
    is_half: bool = False  # ours runs in bfloat16
    numberings: pruning.Numberings = field(default_factory=dict)  # of layers pruned or in another order

    @classmethod
    def of(
        cls,
        headers: Release,
        topk: int | None = None,
        tokens: int | None = None,
        layers: set[int] | None = None,
        original: Release | None = None,
        limits: Mapping[str, float] | None = None,
        prompt: Path | None = None,
        seed: int = 0,
        is_half: bool = False,
    ) -> OnTrial:
        """Raises ValueError, in one line, for what cannot be judged here; NotJudged where HF cannot judge it."""
        overrides: dict[str, Any] = {} if topk is None else {"index_topk": topk}
        args = _args_of(headers, overrides)
        if original is not None:
            _check_original(headers, args, original, _args_of(original, overrides))
            _check_headers(original)
        elif limits:
            raise ValueError("--limit is a limit to what quantization cost: --original is expected too")
        if is_half:
            _check_half(headers, args)
        if tokens is not None and tokens < 2:
            raise ValueError(f"--tokens {tokens}: expected at least 2")
        chosen = _chosen(headers, args, layers, is_half)
        if prompt is not None:
            passage = prompts.of_file(headers.folder or Path(), prompt, tokens, args.vocab_size)
        else:
            rows = 2 if original is not None else 1
            length = default_length(args, rows) if tokens is None else checked_length(args, rows, tokens)
            check_vocabulary(headers.origin, args)
            folders = [r.folder for r in (headers, original) if r is not None and r.folder is not None]
            passage = prompts.of_kept_texts(folders, length, args.vocab_size, seed)
        try:
            checkpoint.assemble(headers.folder or "", **overrides)
            refused = ""
        except CheckpointError as error:
            refused = str(error)
        if not refused:
            _check_theirs(headers, overrides)
        numberings: pruning.Numberings = {}
        if original is not None and original.folder is not None and not refused:
            numberings = pruning.numberings(read_tensors(headers.folder or ""), read_tensors(original.folder), chosen)
        checked_length(args, 1 if original is None else 2, passage.tokens.shape[1])
        return cls(headers, overrides, passage, chosen, original, limits or {}, refused, is_half, numberings)

    @property
    def folder(self) -> Path:
        assert self.headers.folder is not None
        return self.headers.folder

    @property
    def name(self) -> str:
        return self.headers.origin.rstrip("/").rpartition("/")[2]

    @property
    def args(self) -> ModelArgs:
        return self.headers.args(**self.overrides)

    @property
    def tokens(self) -> Array:
        """int [1, S]"""
        return self.prompt.tokens

    @property
    def run_on(self) -> str:
        """What figures are of, in words."""
        configs = [r.config for r in (self.headers, self.original) if r is not None]
        topk = self.args.index_topk
        is_own = not self.args.has_indexer or all(c.get("index_topk") == topk for c in configs)
        return f"of {self.prompt}" + ("" if is_own else f", under index_topk = {topk}")

    @property
    def is_whole(self) -> bool:
        """Whether all of the model's own layers are run."""
        return set(range(self.args.num_hidden_layers)) <= set(self.layers)

    @property
    def is_sparse(self) -> bool:
        return 0 < self.args.index_topk < self.tokens.shape[1]

    def differences(self) -> tuple[list[Finding], dict[str, str]]:
        """(where its files say otherwise than the original's, overrides aside; {what could not be compared: why})."""
        if self.original is None:
            return [], {}
        findings = Findings()
        config_keys.judge(self.headers, self.original, findings)
        not_compared = companions.judge(self.headers, self.original, findings)
        return findings.merged(), not_compared

    def pruned(self) -> list[str]:
        """What became of the original's experts, in a few lines; none where all are there, in its order."""
        if self.original is None:
            return []
        args, theirs = self.args, self.original.args(**self.overrides)
        return pruning.lines(self.numberings) + pruning.groups(args, theirs)

    def nbytes(self) -> dict[int, int]:
        """Of each layer that is run, as it is stored."""
        sizes = dict.fromkeys(self.layers, 0)
        for name, tensor in self.headers.tensors.items():
            match = weights.LAYER.fullmatch(name)
            if match and int(match[1]) in sizes:
                sizes[int(match[1])] += tensor.nbytes
        return sizes

    def memory(self) -> str:
        """What it takes to run this, in a line."""
        whole, largest = (memory.gib(n) for n in (sum(self.nbytes().values()), max(self.nbytes().values())))
        scores = memory.gib(nbytes_of_scores(self.args, 1 if self.original is None else 2, self.tokens.shape[1]))
        return printable(
            f"{self.name}: layers of {whole} as stored, read one at a time, experts in chunks; the largest has {largest}, the "
            f"oracles' attention to {self.tokens.shape[1]} tokens takes {scores} of this machine's {memory.gib(memory.physical())}"
        )

    def identity(self, seed: int) -> dict[str, Any]:
        """All that the verdict depends on: what an interrupted run must agree in with the one that goes on."""
        return {
            "device": str(mx.default_device()), "release": _digest(self.headers), "seed": seed,
            "original": None if self.original is None else _digest(self.original),
            "tokens": self.tokens.tolist(), "layers": self.layers, "overrides": self.overrides,
            "limits": dict(self.limits), "is_half": self.is_half, "code": digest_of_code(), "versions": report.versions(),
        }  # fmt: skip


def digest_of_code(root: Path = ROOT) -> str:
    """Of every Python file that a verdict depends on, and of where it lies."""
    digest = hashlib.sha256()
    for package in ("glm_dsa", "reference", "verify"):
        for file in sorted((root / package).rglob("*.py")):
            digest.update(f"{file.relative_to(root)} ".encode() + file.read_bytes())
    return digest.hexdigest()


def _check_half(headers: Release, args: ModelArgs) -> None:
    ratio = bounds.half_ratio(bounds.longest(args), headers.is_packed)
    if ratio > bounds.MOST_RATIO:
        raise ValueError(
            f"--dtype bfloat16: on this device mlx's bare matmul of packed weights errs {ratio:.0f} times as much as torch's at "
            f"{bounds.longest(args)} summands, in bfloat16; nothing can be judged by that. Use --device gpu, or float32"
        )


def _args_of(headers: Release, overrides: Mapping[str, Any]) -> ModelArgs:
    if headers.folder is None:
        raise ValueError(f"{headers.origin}: not downloaded; expected its weights here (its headers can be audited)")
    args = headers.args(**overrides)
    if args.has_indexer and args.main_rope != "interleaved":
        raise ValueError(f"{headers.origin}: rope_interleave = false, which HF's glm_moe_dsa has no form of")
    return args


def _check_theirs(headers: Release, overrides: Mapping[str, Any]) -> None:
    """HF reads keys that the definition has no use for, and is particular about them."""
    assert headers.folder is not None
    try:
        Layers(headers.folder, conventions_in(headers.config, **overrides), **overrides)
    except Exception as error:  # HF's, the hub's and safetensors' own: no common base
        raise NotJudged(
            printable(f"{headers.origin}: HF makes no model of it, so nothing can judge it: {_line(error)}")
        ) from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _check_original(headers: Release, args: ModelArgs, original: Release, theirs: ModelArgs) -> None:
    assert headers.folder is not None
    assert original.folder is not None
    if original.folder.resolve() == headers.folder.resolve():
        raise ValueError(f"--original {original.origin}: that is the release itself")
    for key in SHAPES:
        if key == "n_routed_experts" and pruning.is_pruned(args, theirs):
            continue
        if getattr(args, key) != getattr(theirs, key):
            raise ValueError(
                f"--original {original.origin}: {key} = {_short(getattr(theirs, key))}, {headers.origin} has "
                f"{_short(getattr(args, key))}; "
                "expected the model that the release was made from"
            )


def _check_headers(original: Release) -> None:
    if original.is_packed:
        raise ValueError(
            f"--original {original.origin}: packed itself; expected the weights that the release was packed from"
        )
    faults = [f.what for f in audit.audit(original, with_chat=False).findings if f.severity == audit.FAULT]
    if faults:
        raise ValueError(
            f"--original {original.origin}: {faults[0]}" + (f" (and {len(faults) - 1} more)" if faults[1:] else "")
        )


def _chosen(headers: Release, args: ModelArgs, layers: set[int] | None, is_half: bool) -> list[int]:
    """The MTP layer is one more, where the release has it. (In 16 bit it is not judged, nor where pruning left it its experts.)"""
    has_mtp = weights.has_mtp(args, headers.tensors) and not is_half and not _has_more_experts(headers, args)
    count = args.num_hidden_layers + has_mtp
    chosen = sorted(layers) if layers is not None else list(range(count))
    if chosen[-1] >= count:
        raise ValueError(f"--layers: {headers.origin} has {count} layers, from 0 on")
    for layer in chosen if args.has_indexer else ():
        full = max((i for i in range(layer + 1) if args.runs_indexer(i)), default=layer)
        if full not in chosen:
            raise ValueError(f"--layers: layer {layer} shares the selection of layer {full}, which is expected too")
    return chosen


def _has_more_experts(headers: Release, args: ModelArgs) -> bool:
    """Whether the MTP layer's router has more rows than config.json has experts."""
    router = headers.tensors.get(f"model.layers.{args.num_hidden_layers}.{pruning.ROUTER}")
    return router is not None and router.shape[0] > args.n_routed_experts


def _digest(headers: Release) -> str:
    digest = hashlib.sha256(repr(sorted(headers.config.items(), key=lambda item: item[0])).encode())
    for file in sorted({t.file for t in headers.tensors.values()}):
        status = file.stat()
        digest.update(f"{file.resolve()} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}".encode())
    return digest.hexdigest()
