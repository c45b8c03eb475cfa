"""In how many bits the parts that decide are kept.

A policy is not correctness: an indexer, a router or an embedding in few bits makes a model that costs more, not another
one. So it is a warning, with the bits; `strict`, for publishers who want it, makes it a FAULT.
"""

from __future__ import annotations

from collections import defaultdict

from ..core.findings import FAULT, NOTE, WARNING, Findings, ranges
from .tensors import Tensors, layers_of

LEAST_BITS = 6  # of embedding and head: below, a warning


def judge(tensors: Tensors, findings: Findings, strict: bool) -> None:
    against = FAULT if strict else WARNING
    _precision(tensors, findings, against)
    _duplicates(tensors, findings, against)


def _precision(tensors: Tensors, findings: Findings, against: str) -> None:
    kinds: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, kept in tensors.kept.items():
        kinds[_part(name), str(kept)].append(name)
    for (part, kind), names in sorted(kinds.items()):
        where = f"{part}: {kind} on {len(names)} tensors ({names[0]}{', ...' if len(names) > 1 else ''})"
        if (part == "indexer" and " bit" in kind) or (part == "router" and (" bit" in kind or kind == "fp8")):
            findings.say(
                against, f"{where}; it decides by near ties: unpacked it costs little, packed it may cost much"
            )
        elif part == "correction bias" and kind in ("bf16", "fp16"):
            findings.say(against, f"{where}; published in fp32: rounded, it changes which experts win near ties")
        elif part == "indexer" and kind == "fp8":
            findings.say(NOTE, f"{where}, as the published FP8 release has it")
    for part in ("embedding", "head"):
        component = tensors.components.get(part)
        if component and component.bits < LEAST_BITS:
            findings.say(against, f"{part}: {component.bits:.1f} bits a weight; at least {LEAST_BITS} are advised")


def _duplicates(tensors: Tensors, findings: Findings, against: str) -> None:
    """Indexers on shared layers. This definition, HF and whoever has IndexShare leave them unread: the same model. mlx-lm's
    own definition, which has none, runs them, and is wrong beyond index_topk; but without them it does not load at all. So
    the fault is that code's and not this build's, which is only larger than it need be."""
    if names := tensors.unread_indexers:
        findings.say(
            against,
            f"an indexer on shared layers {ranges(layers_of(names))} ({len(names)} tensors): they reuse the selection of the "
            "full layer below; this definition leaves these tensors unread, others run them",
        )


def _part(name: str) -> str:
    if name.endswith("e_score_correction_bias"):
        return "correction bias"
    if ".indexer." in name:
        return "indexer"
    return "router" if name.endswith("mlp.gate.weight") else ""
