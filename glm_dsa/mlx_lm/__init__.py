"""mlx-lm on this definition. The one folder that knows mlx-lm; written against 0.32.

`register()` puts this definition in the place of mlx-lm's own, for this process: whatever mlx-lm loads from then on, by
`mlx_lm.load` or by its commands, runs on it. What mlx-lm decides by its own classes is decided here for ours.
"""

from __future__ import annotations

try:
    import mlx_lm.models.cache
    import mlx_lm.utils  # noqa: F401
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "mlx_lm":
        raise
    raise ModuleNotFoundError("glm_dsa.mlx_lm needs mlx-lm: pip install 'glm-dsa[mlx-lm]'", name=error.name) from None

from ..config import MODEL_TYPES, ModelArgs
from ..console import MLX_LM as COMMANDS
from ..model import Model
from .attachment import attach
from .commands import run
from .registration import WRAPPERS, register

__all__ = ["COMMANDS", "MODEL_TYPES", "WRAPPERS", "Model", "ModelArgs", "attach", "register", "run"]
