"""Checkpoints in formats of other tools, which are not read here: refused in a line that names the format.

What decides is in the tensors' names and dtypes, for a config outlives its weights: many a bf16 or MLX build still carries
the `quantization_config` of what it was made from. config.json then says whose format it is, where tensors alone are alike.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from .config_reader import LARGEST_JSON, read_json
from .errors import FormatError, GlmDsaError
from .storage import stored_headers

P = ParamSpec("P")
R = TypeVar("R")
START = "start from the release it was made from (zai-org publishes bf16 and FP8 in blocks), and convert that"


@dataclass(frozen=True)
class ForeignFormat:
    """`tool` writes it; `remedy`: what its owner can do."""

    name: str
    tool: str
    remedy: str = START


MODELOPT = ForeignFormat("ModelOpt NVFP4", "NVIDIA's Model Optimizer", f"{START} (mode nvfp4 packs in the same grid)")
COMPRESSED = ForeignFormat(
    "compressed-tensors", "llm-compressor",
    f"unpack it to bf16 (transformers: CompressedTensorsConfig(dequantize=True), then save_pretrained), or {START}",
)  # fmt: skip
QUARK = ForeignFormat("Quark", "AMD Quark", f"{START} (mode mxfp4 packs in the same grid)")
GPTQ, AWQ = ForeignFormat("GPTQ", "GPTQModel or AutoGPTQ"), ForeignFormat("AWQ", "AutoAWQ or llm-compressor")
AUTOROUND = ForeignFormat("AutoRound", "Intel AutoRound")
BITSANDBYTES = ForeignFormat(
    "bitsandbytes", "transformers with bitsandbytes",
    f"unpack it to bf16 (transformers: model.dequantize(), then save_pretrained), or {START}",
)  # fmt: skip
ASCEND = ForeignFormat("W8A8 for Ascend", "msModelSlim")
W8A8 = ForeignFormat("W8A8 (int8 with scales)", "llm-compressor, msModelSlim or another")
FP8 = ForeignFormat("FP8 with a scale for each channel or tensor", "llm-compressor, Model Optimizer, Quark or FBGEMM")
JANGTQ = ForeignFormat("JANGTQ", "jang-tools", f"vMLX runs it; for this definition, {START}")
JANG = ForeignFormat(
    "JANG, version 1", "jang-tools", f"write it anew as version 2, whose tensors are MLX's, or {START}"
)
MXFP4 = ForeignFormat("FP4 bytes with scales", "Quark, Model Optimizer or another")
GGUF = ForeignFormat("GGUF", "llama.cpp", f"llama.cpp runs it; for this definition, {START}")
PICKLE = ForeignFormat(
    "PyTorch's pickle", "torch.save",
    "expected safetensors, for a pickle can run code: load it where it is trusted and save_pretrained it again",
)  # fmt: skip

METHODS = {  # quantization_config.quant_method
    "modelopt": MODELOPT, "modelopt_fp4": MODELOPT, "compressed-tensors": COMPRESSED, "quark": QUARK, "gptq": GPTQ,
    "awq": AWQ, "auto-round": AUTOROUND, "auto_round": AUTOROUND, "bitsandbytes": BITSANDBYTES, "ascend": ASCEND,
    "fbgemm_fp8": FP8, "mxtq": JANGTQ,
}  # fmt: skip
PARTS: dict[
    str, tuple[ForeignFormat, str]
] = {  # what lies beside a matrix, or in its place: no sound build has any of these
    "tq_packed": (JANGTQ, ""),
    "weight_scale_2": (MODELOPT, "weight"),
    "weight_packed": (COMPRESSED, ""),
    "g_idx": (GPTQ, "qweight"),
    "qzeros": (AWQ, "qweight"),
    "bit_map": (JANG, "qweight"),
    "absmax": (BITSANDBYTES, ""),  # of X.weight: X.weight.absmax
    "SCB": (BITSANDBYTES, "weight"),
    "weight_offset": (ASCEND, "weight"),
    "deq_scale": (ASCEND, "weight"),
    "weight_scale": (FP8, "weight"),  # the matrix's own dtype says more
}
SCALED = {
    "U8": MXFP4,
    "I8": W8A8,
    "F8_E4M3": FP8,
}  # matrices beside a `weight_scale`, by dtype; none beside weight_scale_inv
FILES = (  # where nothing lies that could be read
    (re.compile(r".*\.gguf", re.I), GGUF),
    (re.compile(r".*\.(jang|jjqf|mxq)\.safetensors"), JANG),
    (re.compile(r"quant_model_weight.*\.safetensors"), ASCEND),
    (re.compile(r".*\.(bin|pt|pth)"), PICKLE),
)
READABLE = re.compile(r"model(?!.*\.(jang|jjqf|mxq)\.).*\.safetensors(\.index\.json)?")
LAYERED = re.compile(r"(?:^|\.)layers\.[0-9]{1,6}\.")


def recognized(
    config: Mapping[str, Any], tensors: Mapping[str, Any], files: Iterable[str] = ()
) -> tuple[ForeignFormat, str] | None:
    """The format that a checkpoint is in, and by what it is known; None for one that is read here, or for none at all.

    tensors: {name: anything with a `dtype`, as safetensors spells it}; files: names in the folder."""
    found = _by_tensors(tensors, _said(config)[0])
    if found is None:
        names = sorted(files)
        if tensors or any(READABLE.fullmatch(n) for n in names):
            return None
        for pattern, format in FILES:
            alike = [n for n in names if pattern.fullmatch(n)]
            if alike:
                return format, f"{alike[0]}{_count(alike, 'file')}, and no model*.safetensors"
        return None
    format, evidence = found
    method, details = _said(config)
    if method is None:
        return format, evidence
    known = METHODS.get(method, format)
    return known, f"config.json ({', '.join(details)}) and {evidence}"


def refuse(origin: object, config: Mapping[str, Any], tensors: Mapping[str, Any], files: Iterable[str] = ()) -> None:
    """Raises `FormatError`, in one line, where `recognized` recognizes."""
    found = recognized(config, tensors, files)
    if found is not None:
        format, evidence = found
        raise FormatError(
            f"{origin}: {format.name}, a format of {format.tool}, which is not read here (known by {evidence}); "
            f"{format.remedy}"
        )


def refuse_folder(path: Path, origin: object = None) -> None:
    """As `refuse`, of whatever can be read of a folder."""
    if not path.is_dir():
        return
    config: Mapping[str, Any] = {}
    tensors: Mapping[str, Any] = {}
    files: list[str] = []
    with contextlib.suppress(GlmDsaError):
        config = read_json(path / "config.json", LARGEST_JSON)
    with contextlib.suppress(GlmDsaError, OSError):
        tensors = stored_headers(path)
    with contextlib.suppress(OSError):
        files = [file.name for file in path.iterdir()]
    refuse(path if origin is None else origin, config, tensors, files)


def explained(read: Callable[P, R]) -> Callable[P, R]:
    """For readers of a folder, or of a file, `path`: a failure over a foreign format is told as such. What loads pays
    nothing for it."""

    @functools.wraps(read)
    def reading(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return read(*args, **kwargs)
        except GlmDsaError:
            path: Any = args[0] if args else kwargs["path"]
            refuse_folder(Path(path))
            raise

    return reading


def _by_tensors(tensors: Mapping[str, Any], method: str | None) -> tuple[ForeignFormat, str] | None:
    """By the strongest part that is found in any layer: the order of PARTS."""
    found: dict[str, list[str]] = {}
    # in a release of FP8 blocks, one matrix with another scale is damage, and is told by its name
    has_blocks = method not in METHODS and any(name.endswith(".weight_scale_inv") for name in tensors)
    for name in tensors:
        path, _, part = name.rpartition(".")
        if part not in PARTS or not LAYERED.search(name):
            continue
        beside = PARTS[part][1]
        owner = f"{path}.{beside}" if beside else path
        if beside and owner not in tensors:
            continue
        if part == "weight_scale" and (has_blocks or tensors[owner].dtype not in SCALED):
            continue
        found.setdefault(part, []).append(name)
    for part, (format, _) in PARTS.items():
        if names := found.get(part):
            if part == "weight_scale":
                dtype = tensors[names[0].removesuffix("_scale")].dtype
                return SCALED[dtype], f"{names[0]} beside a matrix of {dtype}{_count(names, 'tensor')}"
            return format, f"{names[0]}{_count(names, 'tensor')}"
    return None


def _count(names: list[str], what: str) -> str:
    return f" (of {len(names):,} such {what}s)" if len(names) > 1 else ""


def _said(config: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """(quant_method, the keys that say more of it) of config.json."""
    said = config.get("quantization_config")
    if not isinstance(said, Mapping):
        format = config.get("weight_format")  # jang-tools'
        return (format, [f"weight_format {format}"]) if isinstance(format, str) else (None, [])
    method = said.get("quant_method")
    if not isinstance(method, str):
        return None, []
    keys = ("quant_method", "quant_algo", "format", "bits")
    return method.lower(), [f"{key} {said[key]}" for key in keys if isinstance(said.get(key), str | int)]
