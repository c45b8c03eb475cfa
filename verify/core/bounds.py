"""Bounds, derived and not guessed. No flag and no environment variable loosens one.

An error is the largest difference in units of the reference's rms (compare.values). At each stage

    bound = 4 * max(a, floor) * r,   r = max(1, min(8, mlx's primitive error / torch's primitive error))

a      what HF in float32 errs at this stage against the float64 equations, on the same inputs and choices; the largest
       over this kind of stage up to this layer, since one layer's luck is no yardstick.
floor  what rounding the result to float32 alone costs: half an ulp of the largest entry.
r      how much less exact the bare mlx primitives (matmul, RMSNorm, softmax) are than torch's at the longest reduction
       of the case, both against float64, measured in this process, outside glm_dsa. mlx on a CPU sums in one
       accumulator: 5 to 12 times torch's error at a few thousand entries, about 1 at a few dozen. For routing weights
       the sigmoid counts too: relative to its value, mlx's errs 4 times as much as torch's.
4      ours and HF may err in opposite directions, and the largest of a sample varies with the sample.

So no bound is above 32 times a, but where a lies below rounding itself, and for one listed reason: a stage that is a
bare RMSNorm may err 4 times as much as `mx.fast.rms_norm` does at its width. At 6144 that is 10 to 30 times torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np
import torch

from glm_dsa import ModelArgs

from . import stages
from .compare import values
from .exits import NotJudged

EXPLAINED = 1e-4  # at these depths HF in float32 errs 1e-6 to 1e-5; more is no rounding, and would make bounds void,
EXPLAINED_AT_MOST = (
    1e-3  # but where training made attention sharp: there up to 4 times what the equations err in float32
)
SAFETY = 4.0
MOST_RATIO = 8.0
HALF_ULP = 2.0**-24


HALF_ULP_16 = 2.0**-9  # bfloat16
EXPLAINED_16 = 0.25  # of a stage's rms: HF in bfloat16 beyond that judges nothing


class ReferencesDisagree(NotJudged):
    """HF and the equations differ by more than float32 explains: nothing can be judged by them."""


@dataclass(frozen=True)
class Bound:
    """A bound on an error, with what it is made of."""

    value: float
    reference_error: float
    floor: float
    ratio: float
    primitive: float = 0.0

    def absolute(self, ref: np.ndarray) -> float:
        """The bound in the units of the reference's own entries (masked ones left out)."""
        finite = ref[np.isfinite(ref) & (ref > -1e38)].astype(np.float64)
        return self.value * float(np.sqrt(np.mean(finite**2)))

    @property
    def derivation(self) -> str:
        text = (
            f"{SAFETY:g} x max(reference's own error {self.reference_error:.2e}, rounding {self.floor:.2e}) "
            f"x mlx/torch primitive error {self.ratio:.2f}"
        )
        return f"{text}, or {SAFETY:g} x mlx's RMSNorm error {self.primitive:.2e}" if self.primitive else text


def bound(
    reference_error: float,
    ref: np.ndarray,
    longest: int,
    routing: bool = False,
    norm: int = 0,
    explained: float = EXPLAINED,
) -> Bound:
    """From HF's error at a stage, its values there, and the longest reduction on the way (0: there is none).

    routing: a routing weight; norm: the width, if the stage is a bare RMSNorm; explained: how far HF may be off at all.
    Raises ReferencesDisagree beyond that.
    """
    if not reference_error <= explained:
        raise ReferencesDisagree(
            f"HF errs {reference_error:.2g} against the equations, where float32 explains {explained:.2g} at most"
        )
    finite = np.abs(ref[np.isfinite(ref) & (ref > -1e38)]).astype(np.float64)
    rms = float(np.sqrt(np.mean(finite**2))) if finite.size else 0.0
    floor = HALF_ULP * float(finite.max()) / rms if rms else 0.0
    ratio = max(primitive_ratio(longest) if longest else 1.0, sigmoid_ratio() if routing else 1.0)
    primitive = rms_norm_error(norm) if norm else 0.0
    value = SAFETY * max(max(reference_error, floor) * ratio, primitive)
    return Bound(value, reference_error, floor, ratio, primitive)


def explained_at(end: int) -> float:
    """How far HF may be off up to this position: an angle p * f is, by an ulp or two of p, times what the layers add."""
    return max(EXPLAINED, end * 2.0**-21)


def explained_by(single: float, most: float) -> float:
    """How far HF may be off where the equations themselves err by `single` in float32."""
    return min(max(EXPLAINED, SAFETY * single), most)


def longest(args: ModelArgs) -> int:
    """The longest reduction inside a model, for `primitive_ratio`."""
    heads = args.num_attention_heads * args.v_head_dim
    return max(args.hidden_size, args.intermediate_size, args.q_lora_rank, heads)


def bound_16(reference_error: float, ref: np.ndarray, longest: int, packed: bool) -> Bound:
    """In 16 bit: 4 times what HF in bfloat16 errs against the float64 equations, under the same choices, times how much less
    exact mlx's bare matmul is than torch's there."""
    if not reference_error <= EXPLAINED_16:
        raise ReferencesDisagree(f"HF in bfloat16 errs {reference_error:.2g}: nothing can be judged by that")
    finite = np.abs(ref[np.isfinite(ref) & (ref > -1e38)]).astype(np.float64)
    rms = float(np.sqrt(np.mean(finite**2))) if finite.size else 0.0
    floor = HALF_ULP_16 * float(finite.max()) / rms if rms else 0.0
    ratio = min(MOST_RATIO, half_ratio(longest, packed))
    return Bound(SAFETY * max(reference_error, floor) * ratio, reference_error, floor, ratio)


def reference_errors(hf: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray]) -> dict[str, float]:
    """HF's error at each stage, as the largest of its kind up to that layer."""
    errors: dict[str, float] = {}
    worst: dict[str, float] = {}
    for stage in stages.in_order(s for s in hf if s in truth):
        kind = stages.kind(stage)
        if kind in stages.SELECTIONS or kind == stages.ROUTING:
            continue
        worst[kind] = max(worst.get(kind, 0.0), values(hf[stage], truth[stage]).error)
        errors[stage] = worst[kind]
    return errors


@cache
def rms_norm_error(width: int) -> float:
    """What `mx.fast.rms_norm` errs against float64 on rows of unit variance: any, and such as a bf16 embedding has.

    Values of 8 bits make rounding errors in one long sum alike: on a CPU these rows err 3 times as much at 6144.
    """
    rows = mx.array(np.random.default_rng(width).standard_normal((64, width)).astype(np.float32))
    errors = []
    for x in (rows, rows.astype(mx.bfloat16).astype(mx.float32)):
        exact = np.array(x).astype(np.float64)
        truth = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6)
        errors.append(values(np.array(mx.fast.rms_norm(x, None, 1e-6)), truth).error)
    return max(errors)


@cache
def primitive_ratio(length: int) -> float:
    """How much less exact mlx is than torch on this machine, in reductions of `length`; 1 to 8."""
    length = max(length, 16)
    random = np.random.default_rng(length)
    rows = 64
    x = random.standard_normal((rows, length)).astype(np.float32)
    w = random.standard_normal((rows, length)).astype(np.float32)
    exact, flat = x.astype(np.float64), 3 * x.astype(np.float64)
    norm = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6)
    soft = np.exp(flat - flat.max(-1, keepdims=True))
    soft /= soft.sum(-1, keepdims=True)
    mx_x, mx_w, pt_x, pt_w = mx.array(x), mx.array(w), torch.from_numpy(x), torch.from_numpy(w)
    pairs: list[tuple[np.ndarray, Callable, Callable]] = [
        (exact @ w.astype(np.float64).T, lambda: mx_x @ mx_w.T, lambda: pt_x @ pt_w.T),
        (
            norm,
            lambda: mx.fast.rms_norm(mx_x, None, 1e-6),
            lambda: pt_x * torch.rsqrt(pt_x.pow(2).mean(-1, keepdim=True) + 1e-6),
        ),
        (soft, lambda: mx.softmax(3 * mx_x, axis=-1, precise=True), lambda: torch.softmax(3 * pt_x, -1)),
    ]
    ratios = [
        values(np.array(ours()), truth).error / max(values(theirs().numpy(), truth).error, HALF_ULP)
        for truth, ours, theirs in pairs
    ]
    return float(min(MOST_RATIO, max(1.0, *ratios)))


@cache
def half_ratio(length: int, packed: bool) -> float:
    """As `primitive_ratio`, of matmul in bfloat16 on mlx's default device, at least 1; `packed`: by a 4 bit matrix.

    On a CPU mlx sums packed products in bfloat16: 5 times torch's error at 64, 50 times at 6144. On a GPU it does not.
    """
    length = -(-max(length, 64) // 64) * 64
    random = np.random.default_rng(length)
    x, w = (mx.array(random.standard_normal((64, length)).astype(np.float32)).astype(mx.bfloat16) for _ in range(2))
    if packed:
        parts = mx.quantize(w, 64, 4)
        product = mx.quantized_matmul(x, *parts, transpose=True, group_size=64, bits=4)
        words, scales, biases = parts
        w = mx.dequantize(words, scales.astype(mx.float32), biases.astype(mx.float32), group_size=64, bits=4)
    else:
        product = x @ w.T
    ours, rows, columns = (np.array(a.astype(mx.float32)) for a in (product, x, w))
    truth = rows.astype(np.float64) @ columns.astype(np.float64).T
    theirs = (torch.from_numpy(rows).bfloat16() @ torch.from_numpy(columns).bfloat16().T).float().numpy()
    return max(1.0, values(ours, truth).error / values(theirs, truth).error)


@cache
def sigmoid_ratio() -> float:
    """The same for the sigmoid, relative to its value, which routing weights are normalized by."""
    x = np.linspace(-6, 6, 4001, dtype=np.float32)
    truth = 1 / (1 + np.exp(-x.astype(np.float64)))
    ours, theirs = np.array(mx.sigmoid(mx.array(x))), torch.sigmoid(torch.from_numpy(x)).numpy()
    errors = [float(np.max(np.abs(out - truth) / truth)) for out in (ours, theirs)]
    return float(min(MOST_RATIO, max(1.0, errors[0] / max(errors[1], HALF_ULP))))


@cache
def sigmoid_error() -> float:
    """How far a sigmoid in float32 may be off, absolutely: the worse of mlx's and torch's."""
    x = np.linspace(-40, 40, 16001, dtype=np.float32)
    truth = 1 / (1 + np.exp(-x.astype(np.float64)))
    ours, theirs = np.array(mx.sigmoid(mx.array(x))), torch.sigmoid(torch.from_numpy(x)).numpy()
    return max(float(np.abs(out - truth).max()) for out in (ours, theirs))


# -- packed values


def packing_error(
    values: np.ndarray, group_size: int, bits: int, unit: float = HALF_ULP, smallest: float = 0.0
) -> np.ndarray:
    """How far `mx.dequantize(mx.quantize(values))` may lie from the values, for each of them: [.., W] -> [.., W].

    In a group of range R, n = 2^bits - 1 steps of R / n would do, each value half a step off. MLX moves the step so that
    the end of larger magnitude, `edge`, is a whole number of steps from zero: step = edge / rint(edge * n / R). Where that
    made it smaller, the n steps no longer reach the far end, which is clipped: off by R - n * step, at most one step. Then
    the scale, rounded to the dtype of the values (`unit`: half an ulp of 1; `smallest`: its smallest number), counts up to
    n times, the product n * step rounds once, and so does the sum with the bias. The quotient that is rounded to a whole
    step has float32's error.
    """
    groups = values.astype(np.float64).reshape(*values.shape[:-1], -1, group_size)
    low, high, steps = groups.min(-1), groups.max(-1), 2**bits - 1
    spread = np.maximum(high - low, 1e-7 * steps)  # mx.quantize's smallest scale
    edge = np.maximum(np.abs(low), np.abs(high))
    bounds = []
    for nudge in (-1e-3, 1e-3):  # computed in float32, a quotient near one half is rounded either way
        whole = np.rint(edge * steps / spread + nudge)
        step = np.where(whole > 0, edge / np.maximum(whole, 1), spread / steps)
        clipped = np.maximum(spread - steps * step, 0)
        scale_error = np.maximum(unit * step, smallest / 2)
        rounding = steps * (scale_error + unit * step + 4 * HALF_ULP * step) + 2 * unit * edge + smallest
        bounds.append(np.maximum(0.5 * step, clipped) + rounding)
    return np.broadcast_to(np.maximum(*bounds)[..., None], groups.shape).reshape(values.shape)


def product_error(magnitudes: np.ndarray, length: int) -> np.ndarray:
    """How far a float32 product of `length` terms may lie from the exact one, in any order of summing: `magnitudes` are the
    sums of the terms' own. A packed weight is a sum of two, scale * code + bias, each rounded: that makes 4 roundings more."""
    return np.maximum((length + 4) * HALF_ULP * magnitudes, np.finfo(np.float32).tiny)


def attention_error(
    queries: np.ndarray, tokens: np.ndarray, errors: np.ndarray, allowed: np.ndarray, latent: int, scale: float
) -> np.ndarray:
    """How far a head's sum of latents may move when each token [latent | rotary key] moves by up to `errors`.

    queries [B, S, H, W] (absorbed), tokens and errors [B, T, W], allowed bool [B, S, T] -> [B, S, H, R].
    A score moves by at most d = scale * |q| . e, so a weight p becomes p exp(d_t) / sum p exp(d), which differs from p by
    at most p (exp(d_t + D) - 1), D the largest d of the row. With sum (p' - p) = 0,
    |o' - o| <= sum |p' - p| (|c - o| + e) + sum p e.
    """
    scores = np.einsum("bshw,btw->bsht", queries, tokens, optimize=True) * scale
    scores = np.where(allowed[:, :, None], scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    d = np.where(allowed[:, :, None], np.einsum("bshw,btw->bsht", np.abs(queries), errors, optimize=True) * scale, 0)
    moved = p * np.expm1(d + d.max(-1, keepdims=True))
    c, e = tokens[..., :latent], errors[..., :latent]
    o = np.einsum("bsht,btr->bshr", p, c, optimize=True)
    apart = np.abs(c[:, None, None] - o[:, :, :, None]) + e[:, None, None]  # [B, S, H, T, R]
    return np.einsum("bsht,bshtr->bshr", moved, apart, optimize=True) + np.einsum("bsht,btr->bshr", p, e, optimize=True)
