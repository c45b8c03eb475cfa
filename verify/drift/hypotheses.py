"""What can be wrong: conventions at other values, packed caches, and the catalogue's mistakes; and what was found to be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from glm_dsa import ModelArgs
from glm_dsa.store import GROUP_SIZES

from .. import faults
from ..engines.spec import Side
from .checks import config_differences
from .stagewise import Compared

# what a convention at this value (None: any) is called in the catalogue
KNOWN_AS = {
    ("indexer_rope", None): "indexer-rope-layout",
    ("indexer_norm_eps", 1e-5): "indexer-eps",
    ("main_rope", "half-split"): "mla-rope-half",
}


@dataclass(frozen=True)
class Suspect:
    """how: "config", "convention", "catalogue" or "option". config: the side that has it; overrides: of `ModelArgs`; options: of
    a `Side`; fault: of the catalogue; known_as: the fault that a convention at this value is."""

    how: str
    name: str
    text: str
    config: Side | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    fault: str = ""
    kind: str = ""  # where the catalogue says that it shows first
    where: tuple[str, ...] = ()  # the functions that it changes
    known_as: str = ""


@dataclass
class Cause:
    """A mistake that reproduces the candidate. exact: the worst remaining error at the stages that it explains, in bounds.
    alike: others that give the same on this prompt. left: kinds of stages that it leaves unexplained."""

    suspect: Suspect
    stages: tuple[str, ...]
    layers: tuple[int, ...]
    exact: float
    alike: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


@dataclass
class Diagnosis:
    """component: to blame by the stages that differ by themselves; unknown: stages that no suspect explains."""

    causes: list[Cause]
    component: str
    unknown: list[Compared]
    tried: int


def other_config(candidate: Side, reference: Side) -> Iterator[Suspect]:
    """The candidate's config.json, where it says otherwise than the reference's."""
    different = config_differences(candidate.args, reference.args)
    if different:
        names = [line.partition(" = ")[0] for line in different]
        yield Suspect("config", f"the candidate's config: {', '.join(names)}", "; ".join(different), config=candidate)


def conventions(args: ModelArgs) -> Iterator[Suspect]:
    """Each convention, at every other value that implementations have."""
    other = {"interleaved": "half-split", "half-split": "interleaved"}
    values: dict[str, list[Any]] = {
        "main_rope": [other[args.main_rope]],
        "latent_norm_eps": [1e-5, 1e-6, args.rms_norm_eps],
    }
    if args.has_indexer:
        values |= {
            "indexer_rope": [other[args.indexer_rope]],
            "indexer_norm_eps": [1e-5, 1e-6, args.rms_norm_eps, 1e-12],
            "index_topk": [2048, 2 * args.index_topk, args.index_topk // 2],
        }
    if args.num_nextn_predict_layers:
        values["mtp_zero_first_embedding"] = [not args.mtp_zero_first_embedding]
    for name, others in values.items():
        own = getattr(args, name)
        for value in dict.fromkeys(others):
            if value != own and value:
                known = KNOWN_AS.get((name, value), KNOWN_AS.get((name, None), ""))
                text = f"{name} = {own} is in force on the reference's side"
                yield Suspect(
                    "convention", f"{name} = {value}", text, overrides={name: value}, kind=name, known_as=known
                )


def packed_caches(args: ModelArgs) -> Iterator[Suspect]:
    """A KV cache in few bits, in every group size that fits: no mistake, but it shows."""
    for size in (g for g in GROUP_SIZES if args.kv_lora_rank % g == 0 and args.qk_rope_head_dim % g == 0):
        for bits in (8, 4):
            text = "latents and rotary keys are packed, and read back before they are attended to"
            options = {"kv_bits": bits, "kv_group_size": size}
            yield Suspect(
                "option", f"KV cache in {bits} bit, groups of {size}", text, options=options, kind="self_attn.heads"
            )


def catalogue(without: Sequence[str] = ()) -> Iterator[Suspect]:
    for f in faults.CATALOGUE.values():
        if not f.equivalent and f.name not in without:
            yield Suspect(
                "catalogue", f.name, f.what, fault=f.name, kind=f.stage, where=tuple(e.where for e in f.edits)
            )
