"""16 bit: what a model in it computes in float32 by design, held to float64 on the very same values."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from ..engines.definition import to_numpy

Array = np.ndarray
DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16}
_HALF_ULP = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # of 1
_SMALLEST = {"bfloat16": 2.0**-134, "float16": 2.0**-25}  # half of the smallest number


def rounded(x: Array, dtype: str) -> tuple[mx.array, Array]:
    """x in 16 bit, and what that holds, in float64."""
    half = mx.array(x.astype(np.float32)).astype(DTYPES[dtype])
    return half, exact(half)


def exact(array: mx.array) -> Array:
    """An mlx array's values, in float64."""
    values: Any = to_numpy(array)
    return values.astype(np.float64)


def roundings(ours: mx.array, truth: Array, slack: Array | float, dtype: str) -> float:
    """The largest distance from the truth, in units of what one rounding to 16 bit may cost there, with float32's own error
    `slack` before it. At most 1 where all was float32 up to the end; where terms cancel a rounding before the end costs
    hundreds."""
    limit = _HALF_ULP[dtype] * np.abs(truth) * (1 + 2.0**-10) + _SMALLEST[dtype] + slack * (1 + _HALF_ULP[dtype])
    return float((np.abs(exact(ours) - truth) / limit).max())
