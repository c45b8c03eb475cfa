"""HF run layer by layer is HF run whole."""

import numpy as np
import pytest

from reference import checkpoints, hf
from reference.capture import capture
from reference.equations import Conventions


@pytest.mark.parametrize("layout", ["interleaved", "half-split"])
def test_one_layer_alone_gives_what_it_gives_in_the_model(tmp_path, layout):
    folder = checkpoints.write(tmp_path / "ck", checkpoints.glm_5_2())
    model = hf.load(folder, Conventions(indexer_rope=layout))
    with capture(model) as whole:
        hf.forward(model, np.random.default_rng(0).integers(3, 160, (2, 60)))
    for layer in range(8):
        below = f"layers.{layer - 1}"
        x = whole[f"{below}.output" if layer else "embed"]
        selection = whole[f"{below}.self_attn.selection"] if layer else None
        with capture(model) as alone:
            hf.run_layer(model, layer, x, selection)
        assert alone
        assert all(np.array_equal(value, whole[stage]) for stage, value in alone.items())
