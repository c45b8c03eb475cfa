"""What JSON can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def plain(value: Any, not_finite: Any = str) -> Any:
    """NumPy's numbers as Python's, text without lone surrogates, whatever is unknown its text. not_finite: what becomes of
    infinities and NaN, which JSON has no word for."""
    if isinstance(value, Mapping):
        return {str(k): plain(v, not_finite) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v, not_finite) for v in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else not_finite(float(value))
    if isinstance(value, np.integer):
        return int(value)
    if value is None or isinstance(value, (bool, int)):
        return value
    return str(value).encode(errors="replace").decode()
