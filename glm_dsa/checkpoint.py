"""Checkpoint folders: headers read and checked before any data, then tensors into a `Model`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from . import foreign, layouts, memory, weights
from .config import ModelArgs
from .errors import CheckpointError, ConfigError, WeightsError, printable
from .linear import SwitchLinear
from .model import Model, parameters_of
from .mtp import MtpLayer
from .storage import DTYPES, INDEX, STALE, Stored, indexed_headers, merged, read_file, read_tensors

HEADS = "mtp*.safetensors"  # an MTP head beside a build, which mlx-lm's own loader does not see

log = logging.getLogger("glm_dsa")


class Headers(dict[str, Stored]):
    """{tensor: Stored}, under the names that are known here. notes: lines for people. kinds: see `layouts.Plan`."""

    notes: tuple[str, ...] = ()
    kinds: frozenset[str] = frozenset()


def load(path: str | Path, dtype: mx.Dtype | None = None, check_finite: bool = True, **overrides: Any) -> Model:
    """A checkpoint folder -> a `Model` with its weights evaluated.

    HF layout (bf16, fp16, fp32, FP8 blocks, one file or shards) or mlx-lm's (quantized or not, bits per module).
    `dtype` casts the floating-point tensors that are not quantized (the correction bias stays float32).
    `check_finite` reads everything once more, to refuse NaN. `overrides` are conventions, as in `ModelArgs.from_dict`.
    What the weights take is logged ("glm_dsa", INFO) before they are read. Raises `CheckpointError`, for weights that this
    machine's memory cannot hold too.
    """
    model, stored = assemble(path, dtype, **overrides)
    memory.check_model(str(path), model)
    if check_finite:
        check_values(stored)
    for parameter in parameters_of(model).values():
        mx.eval(parameter)  # one by one: what a parameter is made of is freed before the next is made
    return model


@foreign.explained
def assemble(path: str | Path, dtype: mx.Dtype | None = None, **overrides: Any) -> tuple[Model, Headers]:
    """As `load`, but lazy: headers are read and every name and shape is checked, no tensor is."""
    path = Path(path)
    try:
        if not path.is_dir():
            raise CheckpointError(f"{path}: not a folder; expected that of a checkpoint (config.json, *.safetensors)")
        args = ModelArgs.from_file(path, **overrides)
        stored = read_headers(path, args)
        if weights.is_hf_layout(stored):
            weights.check_names(args, {name: s.shape for name, s in stored.items()})
        elif beyond := [n for n in stored if weights.is_mtp(args, n) and not args.num_nextn_predict_layers]:
            raise WeightsError(
                f"{beyond[0]}: expected no layer beyond num_hidden_layers = {args.num_hidden_layers} but an MTP layer, which has "
                "an eh_proj; does config.json belong to these weights?"
            )
        model = Model(args)
        tensors = model.sanitize(read_tensors(stored), dtype)
        weights.check_dtypes(tensors)
        quantize_as_stored(model, tensors)
        weights.report_differences(
            {name: value.shape for name, value in parameters_of(model).items()},
            {n: t.shape for n, t in tensors.items()},
        )
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    except WeightsError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    for note in stored.notes:
        log.info("%s", note)
    if dtype is not None:
        tensors = {n: _cast(n, t, tensors, dtype) for n, t in tensors.items()}
    model.load_weights(list(tensors.items()), strict=True)
    model.eval()
    return model, stored


def read_headers(folder: Path, args: ModelArgs | None = None) -> Headers:
    """Of all files of a checkpoint folder, in whatever layout. `args`: config.json's, if it was read already.

    Raises `CheckpointError`.
    """
    if args is None:
        try:
            args = ModelArgs.from_file(folder)
        except (ConfigError, OSError):  # whoever needs it will say so
            args = None
    try:
        stored, is_stale = indexed_headers(folder)
        beside, notes = _head_beside(folder, args, stored)
    except OSError as error:
        raise CheckpointError(f"{folder}: {error.strerror or error}") from None
    headers = known(folder, stored | beside, args)
    headers.notes += tuple(notes)
    if beside:
        headers.kinds |= {layouts.HEAD}
    if is_stale:
        headers.kinds |= {STALE}
        headers.notes += (
            f"{INDEX} names files that are not there, of another build: read without it, as mlx-lm does; HF does not load this, "
            "remove the index or write it anew",
        )
    return headers


def known(origin: str | Path, stored: Mapping[str, Stored], args: ModelArgs | None) -> Headers:
    """Headers as they are stored -> under the names that are known here. `origin`: for messages. Raises `CheckpointError`."""
    if stored and args is not None and all(layouts.is_of_mtp(args, name) for name in stored):
        raise CheckpointError(
            f"{origin}: an MTP head alone, {len(stored):,} tensors: expected a model; put the head beside the model's files, as "
            "mtp.safetensors"
        )
    for name, tensor in stored.items():
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"{tensor.file}: {name} is {tensor.dtype}: expected one of {', '.join(DTYPES)}")
    try:
        found = layouts.plan({name: tensor.shape for name, tensor in stored.items()}, args)
    except WeightsError as error:
        raise CheckpointError(f"{origin}: {error}") from None
    headers = Headers(
        (name, stored[name] if part == (name, None, None) else stored[part.source].view(part))
        for name, part in found.parts.items()
    )
    headers.notes, headers.kinds = tuple(map(printable, found.notes)), frozenset(found.kinds)
    return headers


def _head_beside(
    folder: Path, args: ModelArgs | None, stored: Mapping[str, Stored]
) -> tuple[dict[str, Stored], list[str]]:
    """An MTP head in a file of its own that no index lists, and what is to be said of such files."""
    listed = {tensor.file.name for tensor in stored.values()}
    files = [file for file in sorted(folder.glob(HEADS)) if file.name not in listed]
    if args is None or not files:
        return {}, []
    beside = merged(files)
    names = ", ".join(file.name for file in files)
    if foreign := next((name for name in beside if not layouts.is_of_mtp(args, name)), None):
        reason = f"{foreign} in it is no tensor of this model's MTP layer, in any form that is known here"
    elif any(layouts.is_of_mtp(args, name) for name in stored):
        reason = "the model's own files hold its MTP layer"
    else:
        return beside, [printable(f"MTP head in {names}, beside the model: taken as its MTP layer")]
    return {}, [printable(f"{names}: unread; {reason}")]


def check_values(stored: Mapping[str, Stored]) -> None:
    """Reads every tensor, one at a time. Raises `CheckpointError` on NaN or infinity."""
    dtypes = {(s.file, name if s.part is None else s.part.source): s.dtype for name, s in stored.items()}
    for file in sorted({s.file for s in stored.values()}):
        tensors = read_file(file)
        for name in list(tensors):
            tensor, dtype = tensors.pop(name), dtypes.get((file, name))
            if dtype is None:  # unread
                continue
            if dtype == "F8_E4M3":
                tensor = mx.from_fp8(tensor, dtype=mx.float32)
            if mx.issubdtype(tensor.dtype, mx.floating) and not mx.isfinite(tensor).all().item():
                raise CheckpointError(f"{file}: {name} holds NaN or infinity; the checkpoint is damaged")


def add_mtp(model: Model, folder: Path) -> bool:
    """Reads an MTP head in a file of its own into a model that was loaded without it. Returns whether there is one.

    Raises `CheckpointError`.
    """
    args = model.args
    if model.mtp is not None or not args.num_nextn_predict_layers or not any(folder.glob(HEADS)):
        return False
    own = {n: s for n, s in read_headers(folder, args).items() if weights.is_mtp(args, n)}
    if not own:
        return False
    try:
        tensors = weights.to_modules(args, read_tensors(own))
        weights.check_dtypes(tensors)
        model.model.layers = [*model.layers, MtpLayer(args, args.num_hidden_layers)]
        quantize_as_stored(model, tensors)
        due = {n: v.shape for n, v in parameters_of(model).items() if weights.is_mtp(args, n)}
        weights.report_differences(due, {n: t.shape for n, t in tensors.items()})
    except WeightsError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    model.load_weights(list(tensors.items()), strict=False)
    model.eval()
    return True


def quantize_as_stored(model: Model, tensors: dict[str, mx.array]) -> None:
    """Turns the modules whose weights are stored packed into quantized ones, each with the bits that its shapes show."""

    def packing(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if f"{path}.scales" not in tensors or not hasattr(module, "to_quantized"):
            return False
        packing = weights.packing_of(path, tensors, module.weight.shape[-1])
        if f"{path}.global_scale" not in tensors:
            return packing
        if packing["mode"] != "nvfp4" or not isinstance(module, SwitchLinear):
            raise WeightsError(f"{path}.global_scale: mlx keeps one for experts in nvfp4 only")
        return packing | {"global_scale": True}

    if any(name.endswith(".scales") for name in tensors):
        nn.quantize(model, class_predicate=packing)


def _cast(name: str, tensor: mx.array, tensors: dict[str, mx.array], dtype: mx.Dtype) -> mx.array:
    packed = name.rsplit(".", 1)[0] + ".scales" in tensors
    if packed or not mx.issubdtype(tensor.dtype, mx.floating) or name.endswith("e_score_correction_bias"):
        return tensor
    return tensor.astype(dtype)
