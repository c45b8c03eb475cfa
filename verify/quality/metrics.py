"""What the logits of two models say of a text, token by token, and of all of it. Everything is summed in float64.

KL          sum_v p(v) (log p(v) - log q(v)) over the whole vocabulary; p: the base, q: the candidate
top-1       both prefer the same token;  top-5  how many of the base's best five are among the candidate's, of five
perplexity  exp of the mean of -log p(token): plain, over whole windows side by side (as mlx-lm has it); strided, every
            token once, with at least context - stride tokens before it (but for the first window's)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..core import compare
from ..core.plain import plain

Array = np.ndarray
BEST = 5


@dataclass(frozen=True)
class Mean:
    value: float
    error: float  # standard, of tokens taken as independent; not a number where there is one token only

    @staticmethod
    def of(values: Array) -> Mean:
        error = float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else math.nan
        return Mean(float(values.mean()), error)


@dataclass(frozen=True)
class Perplexity:
    """nll: its logarithm, the mean of -log p(token)."""

    value: float
    error: float
    nll: float
    tokens: int

    @staticmethod
    def of(nll: Array) -> Perplexity:
        mean = Mean.of(nll)
        value = math.exp(mean.value) if mean.value < 700 else math.inf
        return Perplexity(value, value * mean.error, mean.value, nll.size)


@dataclass
class Gathered:
    """Of every scored token, in the text's order: its place, kl, whether the best agrees, the share of the best five, -log p of
    the base and of the candidate. plain: -log p of both, of the plain cut."""

    places: list[Array] = field(default_factory=list)
    kl: list[Array] = field(default_factory=list)
    top1: list[Array] = field(default_factory=list)
    top5: list[Array] = field(default_factory=list)
    nll: tuple[list[Array], list[Array]] = field(default_factory=lambda: ([], []))
    plain: tuple[list[Array], list[Array]] = field(default_factory=lambda: ([], []))

    def add(self, base: Array, candidate: Array, targets: Array, places: Array, fresh: Array, is_plain: bool) -> None:
        """Logits [n, V] of both, the tokens that follow [n], their places in the text, and which are scored here, bool [n]."""
        p, q = compare.log_softmax(base), compare.log_softmax(candidate)
        pair = compare.nll(p, targets), compare.nll(q, targets)
        for side, values in enumerate(pair):
            self.nll[side].append(values[fresh])
            if is_plain:
                self.plain[side].append(values)
        p, q, base, candidate = p[fresh], q[fresh], base[fresh], candidate[fresh]
        if not len(p):
            return
        self.places.append(places[fresh])
        self.kl.append(compare.kl(p, q))
        self.top1.append(base.argmax(-1) == candidate.argmax(-1))
        count = min(BEST, base.shape[-1])
        ours, theirs = (np.argpartition(-x, count - 1, axis=-1)[:, :count] for x in (base, candidate))
        self.top5.append((ours[:, :, None] == theirs[:, None]).any(-1).mean(-1))


@dataclass
class Quality:
    """percentiles: of the tokens' KL. worst: (place of the token in the text, from 0 on; its KL). bits_per_byte: of base and
    candidate, strided; None where the tokens' bytes are not known. plain: None where no window of the plain cut is whole."""

    candidate: str
    base: str
    source: str
    tokens: int
    context: int
    stride: int
    windows: int
    kl: Mean
    percentiles: dict[str, float]
    worst: tuple[int, float]
    top1: Mean
    top5: Mean
    strided: tuple[Perplexity, Perplexity]
    plain: tuple[Perplexity, Perplexity] | None
    bits_per_byte: tuple[float, float] | None
    versions: str = ""
    worst_token: str = ""
    command: str = ""

    @staticmethod
    def of(found: Gathered, nbytes: int, **about: Any) -> Quality:
        """nbytes: of the tokens that are scored; 0 where not known."""
        kl = np.concatenate(found.kl)
        nll = [np.concatenate(side) for side in found.nll]
        plain = tuple(Perplexity.of(np.concatenate(side)) for side in found.plain) if found.plain[0] else None
        return Quality(
            kl=Mean.of(kl),
            percentiles={
                name: float(np.quantile(kl, q))
                for name, q in (("median", 0.5), ("p95", 0.95), ("p99", 0.99), ("max", 1))
            },
            worst=(int(np.concatenate(found.places)[kl.argmax()]), float(kl.max())),
            top1=Mean.of(np.concatenate(found.top1).astype(np.float64)),
            top5=Mean.of(np.concatenate(found.top5)),
            strided=tuple(Perplexity.of(side) for side in nll),  # type: ignore[arg-type]
            plain=plain,  # type: ignore[arg-type]
            bits_per_byte=tuple(float(side.sum() / math.log(2) / nbytes) for side in nll) if nbytes else None,  # type: ignore[arg-type]
            **about,
        )

    def as_dict(self) -> dict[str, Any]:
        def both(pair: Any) -> Any:
            return None if pair is None else {"base": pair[0], "candidate": pair[1]}

        def perplexities(pair: Any) -> Any:
            return both(None if pair is None else [vars(p) for p in pair])

        return plain({
            "candidate": self.candidate, "base": self.base, "text": self.source, "tokens": self.tokens,
            "context": self.context, "stride": self.stride, "windows": self.windows,
            "kl": {"mean": self.kl.value, "standard_error": self.kl.error} | self.percentiles,
            "worst": {"token": self.worst[0], "kl": self.worst[1], "text": self.worst_token},
            "top1": vars(self.top1), "top5": vars(self.top5),
            "perplexity": {"strided": perplexities(self.strided), "plain": perplexities(self.plain)},
            "bits_per_byte": both(self.bits_per_byte), "versions": self.versions, "command": self.command,
        }, not_finite=lambda _: None)  # fmt: skip

    def _cut(self) -> str:
        if self.windows == 1:
            return "one window"
        return f"{self.windows} windows of {self.context:,}, one every {self.stride:,}"

    def lines(self) -> list[str]:
        kl, p = self.kl, self.percentiles
        out = [
            f"candidate  {self.candidate}",
            f"base       {self.base}",
            f"text       {self.source}: {self.tokens:,} tokens, {self.strided[0].tokens:,} scored; {self._cut()}",
            "",
            f"KL(base || candidate), nats a token, whole vocabulary: {kl.value:.6g} \u00b1 {kl.error:.2g}",
            f"  median {p['median']:.4g}   p95 {p['p95']:.4g}   p99 {p['p99']:.4g}   max {p['max']:.4g} "
            f"(token {self.worst[0]:,}{f': {self.worst_token}' if self.worst_token else ''})",
            f"same best token: {self.top1.value:.3%} \u00b1 {self.top1.error:.3%};  of the best five: {self.top5.value:.3%}",
            "",
            f"{'perplexity':<16} {'base':>20} {'candidate':>20} {'ratio':>9}",
        ]
        for name, pair in (("strided", self.strided), ("plain", self.plain)):
            if pair is None:
                out.append(f"  {name:<14} no whole window")
                continue
            told = [f"{x.value:.3f} \u00b1 {x.error:.3f}" for x in pair]
            ratio = math.exp(min(pair[1].nll - pair[0].nll, 700))
            out.append(f"  {name:<14} {told[0]:>20} {told[1]:>20} {ratio:>9.5g}")
        if self.bits_per_byte is not None:
            base, candidate = self.bits_per_byte
            out.append(f"{'bits per byte':<16} {base:>20.5f} {candidate:>20.5f} {candidate / base:>9.5f}")
        return [*out, "", self.versions]
