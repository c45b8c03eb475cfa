"""config.json's key `quantization` (and its twin `quantization_config`), by mlx-lm's own rule: it packs modules as the key
says before it loads, and what the key says wrongly, it refuses to load. What it loads right is passed in silence.

The rule is `mlx_lm.utils.load_model` of 0.32.2, and `mlx.nn.quantize` under it:
- `group_size` and `bits` must be there. They are used for entries `true` alone; a module without an entry is packed as the
  shapes of its weights show, if it has scales.
- an entry is arguments of `to_quantized`, whose mode is affine where nothing is said, and bits and group size the mode's own.
- an entry counts even where the weights are not packed; a module that cannot be packed (a norm, the router) is an error.
- `false`, and an empty entry, leave the module as it is. An entry for what is no module means nothing.
- without the key, `quantization_config` is asked for `quant_method`; a few methods pack by shapes.
This definition goes by shapes and reads none of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glm_dsa import weights
from glm_dsa.errors import printable

from ..core.findings import FAULT, WARNING, Findings
from .tensors import Tensors

KEY, TWIN = "quantization", "quantization_config"
GLOBAL = ("group_size", "bits")
USUAL = {  # of each mode, where nothing is said
    "affine": {"group_size": 64, "bits": 4},
    "mxfp4": {"group_size": 32, "bits": 4},
    "mxfp8": {"group_size": 32, "bits": 8},
    "nvfp4": {"group_size": 16, "bits": 4},
}
BY_SHAPES = ("mxfp4", "mxfp8", "modelopt", "compressed-tensors")  # quant_methods
PACKED_FORMATS = ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "pack-quantized")
REFUSES = "mlx-lm refuses to load it"


def judge(tensors: Tensors, config: Mapping[str, Any], findings: Findings) -> None:
    said, twin = config.get(KEY), config.get(TWIN)
    if said is None:
        _by_method(tensors, twin, findings)
        return
    if not isinstance(said, Mapping) or not all(key in said for key in GLOBAL):
        findings.say(FAULT, f"config.json's {KEY}: expected an object with group_size and bits; {REFUSES}")
        return
    for path, module in _modules(tensors).items():
        entry = said.get(path)
        if path in said and (wrong := _wrong(entry, module, said)):
            findings.tensor(FAULT, f"config.json's {KEY} names {{tensors}}: {{detail}}; {REFUSES}", path, wrong)


class _Module:
    """packing: None where it is not packed; global_scale: whether one lies beside it."""

    def __init__(self, packable: bool, packing: Mapping[str, Any] | None, global_scale: bool) -> None:
        self.packable, self.packing, self.global_scale = packable, packing, global_scale


def _modules(tensors: Tensors) -> dict[str, _Module]:
    """By path, as the model has them once the weights are converted: experts stacked, kv_b_proj in its two halves."""
    found: dict[str, _Module] = {}
    for spec in weights.module_inventory(tensors.args):
        path = spec.name.rpartition(".")[0]
        if path in found or (spec.component == "mtp" and not tensors.with_mtp):
            continue
        stored = _stored(path, tensors)
        packing = tensors.packed.get(stored)
        is_broken = packing is None and f"{stored}.scales" in tensors.found
        if is_broken or not any(f"{stored}.{part}" in tensors.specs for part in ("weight", "bias")):
            continue  # told of already
        if packing and stored.endswith(".kv_b_proj") and spec.shape[-1] % packing["group_size"]:
            packing = None  # this half is unpacked on load
        packable = spec.is_packable and spec.name.endswith(".weight")
        found[path] = _Module(packable, packing, f"{stored}.global_scale" in tensors.found)
    return found


def _stored(path: str, tensors: Tensors) -> str:
    """The path that holds this module's weights, or its first expert's."""
    if f"{path}.weight" in tensors.specs:
        return path
    attention, _, half = path.rpartition(".")
    if half in ("embed_q", "unembed_out"):
        return f"{attention}.kv_b_proj"
    return path.replace(".switch_mlp.", ".experts.0.")


def _wrong(entry: Any, module: _Module, said: Mapping[str, Any]) -> str:
    """What is wrong with an entry; empty where nothing is."""
    packing = module.packing
    if not entry:
        return f"{entry!r}, and it is packed: {_told(packing)}" if packing else ""
    if not module.packable:
        return "no linear map and no embedding (the router and norms cannot be packed); remove the entry"
    if entry is True:
        entry = {k: said[k] for k in (*GLOBAL, "mode") if k in said}
    if not isinstance(entry, Mapping):
        return f"{printable(repr(entry))[:80]}; expected an object, true or false"
    if packing is None:
        return "it is stored unpacked; remove the entry"
    unknown = [k for k, v in entry.items() if k not in packing and k != "global_scale" and (k != "quantize_input" or v)]
    if unknown:
        return f"{printable(str(unknown[0]))[:80]} in its entry, which no module takes"
    mode = entry.get("mode", "affine")
    usual = USUAL.get(mode, {}) if isinstance(mode, str) else {}
    due = {"mode": mode} | {k: entry.get(k) or usual.get(k) for k in GLOBAL}
    if due != packing:
        return f"{printable(_told(due))[:120]}, and it is packed otherwise: {_told(packing)}"
    if bool(entry.get("global_scale")) != module.global_scale:
        return (
            "a global_scale lies beside it, of which its entry says nothing"
            if module.global_scale
            else ("global_scale in its entry, and none beside it")
        )
    return ""


def _told(packing: Mapping[str, Any]) -> str:
    return f"{packing['bits']} bit, groups of {packing['group_size']}, {packing['mode']}"


def _by_method(tensors: Tensors, twin: Any, findings: Findings) -> None:
    """A config that carries the method of what it was made from is stale, not wrong: nobody computes another model by it."""
    if twin and not isinstance(twin, Mapping):
        findings.say(FAULT, f"config.json's {TWIN}: expected an object; {REFUSES}")
        return
    method = twin.get("quant_method") if twin else None
    if twin and "quant_method" not in twin:
        findings.say(
            FAULT, f"config.json has {TWIN} without quant_method, and no key {KEY}: {REFUSES}; name it {KEY} too"
        )
    elif method in BY_SHAPES and (wrong := _method_wrong(method, twin)):
        findings.say(
            WARNING, f"config.json's {TWIN}: {wrong}: {REFUSES}; the tensors are of no such format: remove the key"
        )
    elif method == "fp8" and weights.is_hf_layout(tensors.found) and not any(n.endswith("_scale_inv") for n in tensors.found):
        findings.say(
            WARNING, f"config.json's {TWIN} says fp8, and no tensor has scales: HF and vLLM look for them; remove the key"
        )
    elif tensors.packed and method not in BY_SHAPES and not _is_mxfp8(twin):
        findings.say(
            WARNING, f"packed weights, but config.json has no key {KEY}: mlx-lm's own loader will not load them"
        )


def _is_mxfp8(twin: Any) -> bool:
    """Power-of-two scales over blocks of 32 x 32."""
    blocks = twin.get("weight_block_size") if twin else None
    return bool(twin) and twin.get("scale_fmt") == "ue8m0" and blocks == [32, 32] and twin.get("quant_method") == "fp8"


def _method_wrong(method: str, twin: Mapping[str, Any]) -> str:
    if method == "compressed-tensors" and twin.get("format") not in PACKED_FORMATS:
        return f"compressed-tensors of format {printable(repr(twin.get('format')))[:80]}"
    settings = twin.get("quantization", twin)
    algorithm = settings.get("quant_algo") if isinstance(settings, Mapping) else None
    if method == "modelopt" and algorithm != "NVFP4":
        return f"modelopt with quant_algo {printable(repr(algorithm))[:80]}"
    return ""
