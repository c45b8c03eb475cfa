"""Values and distributions: what differs between *ours* and *ref*, by how much, and where. NumPy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray
LOWEST = -1e38  # HF masks with float32's lowest number where others write -inf


@dataclass(frozen=True)
class ValueDifference:
    """error: the largest difference in units of the reference's rms. `problem` says what made comparing pointless."""

    error: float
    where: str = ""
    problem: str = ""


def values(ours: Array, ref: Array) -> ValueDifference:
    """Shape first, then which entries are infinite or NaN, then the error."""
    ours, ref = np.asarray(ours, np.float64), np.asarray(ref, np.float64)
    if ours.shape != ref.shape:
        return ValueDifference(np.inf, problem=f"shape {list(ours.shape)}, the reference has {list(ref.shape)}")
    if ref.size == 0:
        return ValueDifference(np.inf, problem="nothing to compare: the reference is empty")
    ref, ours = (np.where(x < LOWEST, -np.inf, x) for x in (ref, ours))
    finite = np.isfinite(ref)
    for name, mine, theirs in (("NaN", np.isnan(ours), np.isnan(ref)), ("infinite", np.isinf(ours), np.isinf(ref))):
        if (mine != theirs).any():
            at = tuple(int(i) for i in np.argwhere(mine != theirs)[0])
            return ValueDifference(
                np.inf, problem=f"{int((mine != theirs).sum())} entries are {name} on one side only, first at {at}"
            )
    if not finite.any():
        return ValueDifference(0.0)
    gap = np.where(finite, np.abs(np.where(finite, ours, 0) - np.where(finite, ref, 0)), 0)
    scale = float(np.sqrt(np.mean(ref[finite] ** 2)))
    at = tuple(int(i) for i in np.unravel_index(np.argmax(gap), gap.shape))
    error = float(gap.max() / scale) if scale else (0.0 if gap.max() == 0 else np.inf)
    return ValueDifference(error, where=f"at {at}: {ours[at]:.6g}, ref {ref[at]:.6g}")


def as_sets(choice: Array, size: int) -> Array:
    """Indices [.., K] -> membership bool [.., size]."""
    chosen = np.zeros((*choice.shape[:-1], size), dtype=bool)
    np.put_along_axis(chosen, choice.astype(np.int64), True, axis=-1)
    return chosen


@dataclass(frozen=True)
class Distributions:
    """KL(ref || ours) over positions, in nats, and how often the most likely token is the same."""

    kl_mean: float
    kl_p95: float
    kl_max: float
    top1: float


def distributions(ours: Array, ref: Array) -> Distributions:
    """Logits [.., V] -> how far apart the distributions are."""
    kl = kl_by_position(ours, ref).reshape(-1)
    same = (np.argmax(ours, -1) == np.argmax(ref, -1)).mean()
    return Distributions(float(kl.mean()), float(np.percentile(kl, 95)), float(kl.max()), float(same))


def kl_by_position(ours: Array, ref: Array) -> Array:
    """Logits [.., V] -> KL(ref || ours), in nats, [..]."""
    return kl(log_softmax(ref), log_softmax(ours))


def kl(p: Array, q: Array) -> Array:
    """KL(p || q) of distributions by their logarithms [.., V], in nats, [..]."""
    return np.maximum((np.exp(p) * (p - q)).sum(-1), 0)  # rounding leaves some -1e-17 where both are the same


def nll(logs: Array, tokens: Array) -> Array:
    """Logarithms of distributions [n, V], and the token that follows each [n] -> its negative log likelihood, in nats, [n]."""
    return -logs[np.arange(len(tokens)), tokens]


def log_softmax(logits: Array) -> Array:
    """[.., V] -> float64 [.., V]."""
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def relative(ours: Array, ref: Array) -> float:
    ours, ref = ours.astype(np.float64), ref.astype(np.float64)
    return float(np.linalg.norm(ours - ref) / (np.linalg.norm(ref) or 1.0))


def same(ours: Array | None, ref: Array | None, allowed: Array | None = None) -> float | None:
    """The share of ref's choices [S, K] that ours makes too; choices of keys that are not `allowed` [S, T] left out."""
    if ours is None or ref is None:
        return None
    size = int(max(ours.max(), ref.max())) + 1
    mine, theirs = as_sets(ours, size), as_sets(ref, size)
    if allowed is not None:
        theirs = theirs & allowed[:, :size]
    return float((mine & theirs).sum() / theirs.sum())


def same_sets(ours: Array, ref: Array) -> Array:
    """bool [S]: where choices [S, K] are the same."""
    if ours.shape != ref.shape:
        return np.zeros(len(ref), bool)
    return (np.sort(ours, -1) == np.sort(ref, -1)).all(-1)


def spread(length: int, most: int) -> Array:
    """So many positions of a prompt at most, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, length - 1, min(length, most)).round().astype(int))
