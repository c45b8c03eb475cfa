"""GLM-5.2 (or another config) at a long context on one machine, from the counts alone: memory, bytes and operations a token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from types import SimpleNamespace
from typing import Any

import mlx.core as mx

from glm_dsa import ModelArgs, inventory
from glm_dsa.attention import MultiHeadLatentAttention
from glm_dsa.indexer import WIDEST
from glm_dsa.planning.plan import Cache, prefill_bytes
from glm_dsa.text import in_gb
from glm_dsa.tiles import ELEMENTS

from . import flops
from .flops import Count, Sizes

LATENT_BITS = {16: 16.0, 8: 8 + 32 / 64}  # a scale and a bias in 16 bit for each 64 values


@dataclass(frozen=True)
class Machine:
    """memory in GB (10^9), bandwidth in GB/s, rate in 10^12 operations a second."""

    memory: float = 512.0
    bandwidth: float = 819.0
    rate: float = 28.0

    def seconds(self, count: Count) -> float:
        """At least: whichever of the two is slower."""
        return max(count.bytes / (self.bandwidth * 1e9), count.operations / (self.rate * 1e12))


@dataclass
class Paper:
    """decode, prefill: part -> of all layers, for one token."""

    args: ModelArgs
    context: int
    bits: float
    kv_bits: int
    chunk: int
    machine: Machine
    weights: float = 0.0  # bytes
    latents: float = 0.0
    index_keys: float = 0.0
    working: float = 0.0  # of prefill, at most about
    decode: dict[str, Count] = field(default_factory=dict)
    prefill: dict[str, Count] = field(default_factory=dict)
    dense: Count = field(default_factory=Count)  # a token's attention in decode, had it no selection

    @property
    def total(self) -> float:
        return self.weights + self.latents + self.index_keys + self.working

    def as_dict(self) -> dict[str, Any]:
        def parts(counts: dict[str, Count]) -> dict[str, Any]:
            return {
                name: {"operations": c.operations, "bytes": c.bytes, "seconds": self.machine.seconds(c)}
                for name, c in counts.items()
            }

        return {
            "context": self.context, "bits": self.bits, "kv_bits": self.kv_bits, "chunk": self.chunk,
            "memory_bytes": {"weights": self.weights, "latents": self.latents, "index_keys": self.index_keys,
                "prefill_at_most_about": self.working,
            },
            "decode": parts(self.decode), "prefill": parts(self.prefill),
        }  # fmt: skip

    def lines(self) -> Iterator[str]:
        m, a = self.machine, self.args
        full = sum(a.runs_indexer(i) for i in range(a.num_hidden_layers))
        yield (
            f"{a.num_hidden_layers} layers, {full} of them with an indexer; {self.context:,} tokens of context, weights of "
            f"{self.bits:g} bit, KV cache of {self.kv_bits}"
        )
        parts = (("weights", self.weights), ("latents", self.latents), ("index keys", self.index_keys),
                 ("prefill at most about", self.working))  # fmt: skip
        told = ", ".join(f"{name} {in_gb(size, 1)}" for name, size in parts)
        fits = "fits" if self.total <= m.memory * 1e9 else "does NOT fit"
        yield f"memory, GB: {told}, together {in_gb(self.total, 1)}: {fits} into {m.memory:g}"
        for what, counts in (("decode", self.decode), (f"prefill, chunks of {self.chunk}", self.prefill)):
            yield ""
            yield f"{what + ', a token':<34} {'GFLOP':>10} {'MB':>10} {'ms at least':>12}"
            for name, c in [*counts.items(), ("together", sum(counts.values(), Count()))]:
                least = 1e3 * (m.seconds(c) if name in counts else sum(map(m.seconds, counts.values())))
                yield f"  {name:<32} {c.operations / 1e9:>10.3f} {c.bytes / 1e6:>10.2f} {least:>12.3f}"
        yield ""
        yield (
            f"without a selection a token's attention would read {in_gb(self.dense.bytes, 1)} GB and take "
            f"{self.dense.operations / 1e9:.0f} GFLOP in decode: {1e3 * m.seconds(self.dense):.0f} ms at least"
        )


def paper(args: ModelArgs, context: int, bits: float, kv_bits: int, chunk: int, machine: Machine) -> Paper:
    """The main model's layers and head (no MTP), as this definition runs them on a GPU.

    Raises ValueError for a cache of other bits than 16 and 8, or a context that needs no selection.
    """
    if kv_bits not in LATENT_BITS:
        raise ValueError(f"--kv-bits {kv_bits}: expected {' or '.join(map(str, LATENT_BITS))}")
    if not args.has_indexer:
        raise ValueError(f"{args.model_type} has no indexer: this is about models that select")
    if context <= args.index_topk:
        raise ValueError(f"--context {context}: expected more than index_topk = {args.index_topk}")
    sizes = Sizes(bits / 8, LATENT_BITS[kv_bits] / 8, 2.0)
    found = Paper(args, context, bits, kv_bits, chunk, machine)
    layers = range(args.num_hidden_layers)
    cache = Cache.of(args, context, kv_bits)
    found.latents, found.index_keys = cache.latents, cache.index_keys
    found.working = prefill_bytes(args, chunk)
    # of queries, so many are served by one reading of the index keys
    block = max(1, ELEMENTS[mx.DeviceType.gpu] // args.index_n_heads // (WIDEST * args.index_topk))
    own = (spec for spec in inventory(args) if spec.component != "mtp")
    found.weights = sum(prod(spec.shape) for spec in own) * sizes.weights
    for counts, queries in ((found.decode, 1), (found.prefill, chunk)):
        form = cheapest_form(args, queries, context)
        for i in layers:
            for name, count in flops.layer_parts(args, i, queries, context, form, sizes, block).items():
                counts[name] = counts.get(name, Count()) + count * (1 / queries)
    found.decode["head"] = flops.head(args, 1, sizes)  # of a prompt only the last token's logits are asked for
    found.dense = flops.attention(args, "absorbed", 1, context, sizes) * len(layers)
    return found


def cheapest_form(args: ModelArgs, queries: int, context: int) -> str:
    """The form that this definition would choose."""
    widths: Any = SimpleNamespace(
        latent=args.kv_lora_rank, nope=args.qk_nope_head_dim, rope=args.qk_rope_head_dim, value=args.v_head_dim
    )
    return MultiHeadLatentAttention.cheapest_form(widths, queries, context, args.index_topk)
