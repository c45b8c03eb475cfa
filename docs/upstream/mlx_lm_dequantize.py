"""mlx-lm, utils.py, dequantize_model: `convert --dequantize` leaves embed_q and unembed_out packed.

Expected: every packed module unpacked. QuantizedMultiLinear (models/mla.py) is none of the classes that are looked for; the
key `quantization` is taken out of config.json all the same, so that what was written does not load ("parameters not in
model: ... embed_q.scales"). Concerns every model with MLA. Runs on a CPU; needs mlx-lm alone.
"""

import sys

import mlx.nn as nn
from mlx_lm.models.mla import MultiLinear
from mlx_lm.utils import dequantize_model


def bug() -> str:
    """What is wrong; empty where it was mended."""
    model = nn.Module()
    model.layers = [MultiLinear(64, 64, 2)]
    nn.quantize(model)
    left = "scales" in dequantize_model(model).layers[0]
    return "a MultiLinear has its scales still" if left else ""


if __name__ == "__main__":
    print(bug() or "mended")
    sys.exit(bool(bug()))
