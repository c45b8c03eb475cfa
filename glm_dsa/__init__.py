"""GLM-5, 5.1 and 5.2 (`glm_moe_dsa`) and GLM-4.7-Flash (`glm4_moe_lite`) in MLX.

Axes, as written behind array-producing lines:
  B batch   S query positions   T key positions   H heads   D head width   R latent width
  E experts   K selected keys   V vocabulary   Q query latent width
"""

from .cache import LayerCache, Widths
from .checkpoint import load
from .config import Convention, ModelArgs
from .errors import CacheError, CheckpointError, ConfigError, GlmDsaError, InputError, WeightsError
from .model import Model
from .mtp import Draft
from .store import KvQuantization
from .version import __version__
from .weights import TensorSpec, inventory

__all__ = [
    "CacheError",
    "CheckpointError",
    "ConfigError",
    "Convention",
    "Draft",
    "GlmDsaError",
    "InputError",
    "KvQuantization",
    "LayerCache",
    "Model",
    "ModelArgs",
    "TensorSpec",
    "WeightsError",
    "Widths",
    "__version__",
    "inventory",
    "load",
]
