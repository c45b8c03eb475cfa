"""Stacks of matrices, one for each head or expert: packed, unpacked and run."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from glm_dsa.linear import MultiLinear, QuantizedMultiLinear, QuantizedSwitchLinear, SwitchLinear

COUNT, OUT, IN = 3, 32, 64
FORMATS = [
    (4, 64, "affine"),
    (8, 32, "affine"),
    (3, 32, "affine"),
    (4, 32, "mxfp4"),
    (8, 32, "mxfp8"),
    (4, 16, "nvfp4"),
]


@pytest.fixture(params=FORMATS, ids=str)
def packing(request):
    bits, group_size, mode = request.param
    return {"group_size": group_size, "bits": bits, "mode": mode}


def close(ours, ref, error):
    ours, ref = np.array(ours.astype(mx.float32)), np.array(ref.astype(mx.float32))
    return ours.shape == ref.shape and np.abs(ours - ref).max() <= error * np.abs(ref).max()


@pytest.mark.parametrize("kind", [MultiLinear, SwitchLinear])
def test_random_weights_are_scaled_to_their_inputs(kind):
    weight = np.array(kind(COUNT, OUT, IN).weight)
    assert weight.shape == (COUNT, OUT, IN)
    assert IN**-0.5 >= weight.max() > 0.9 * IN**-0.5
    assert -(IN**-0.5) <= weight.min() < -0.9 * IN**-0.5


@pytest.mark.parametrize(
    ("kind", "packed"), [(MultiLinear, QuantizedMultiLinear), (SwitchLinear, QuantizedSwitchLinear)]
)
def test_packed_as_mlx_packs_and_unpacked_again(kind, packed, packing):
    plain = kind(COUNT, OUT, IN)
    layer = plain.to_quantized(**packing)
    assert type(layer) is packed
    due = mx.quantize(plain.weight, **packing)
    assert set(layer) == {"weight", "scales"} | ({"biases"} if packing["mode"] == "affine" else set())
    for name, part in zip(("weight", "scales", "biases"), due, strict=False):
        assert mx.array_equal(layer[name], part)
    assert not tree_flatten(layer.trainable_parameters())
    again = layer.dequantized()
    assert type(again) is kind
    assert mx.array_equal(again.weight, mx.dequantize(*due, **packing))


def test_heads_run_both_ways(packing):
    layer = MultiLinear(COUNT, OUT, IN)
    packed, plain = layer.to_quantized(**packing), layer.to_quantized(**packing).dequantized()
    for x, way in ((mx.random.normal((2, COUNT, 5, IN)), True), (mx.random.normal((2, COUNT, 5, OUT)), False)):
        error = 1e-5 if packing["mode"] == "affine" else 1e-2  # mlx unpacks the others to bfloat16
        assert close(packed(x, transpose=way), plain(x, transpose=way), error)
        weight = plain.weight.swapaxes(-1, -2) if way else plain.weight
        assert close(plain(x, transpose=way), mx.einsum("bhsi,hio->bhso", x, weight.astype(mx.float32)), 1e-5)
    assert close(packed(mx.ones((1, COUNT, 1, IN))), plain(mx.ones((1, COUNT, 1, IN))), 1e-2)


@pytest.mark.parametrize("is_sorted", [False, True])
def test_experts_run_on_what_they_are_given(packing, is_sorted):
    layer = SwitchLinear(COUNT, OUT, IN)
    packed, plain = layer.to_quantized(**packing), layer.to_quantized(**packing).dequantized()
    x, experts = mx.random.normal((6, 1, IN)), mx.array([0, 0, 1, 1, 1, 2] if is_sorted else [2, 0, 1, 2, 0, 0])
    due = mx.stack([x[i] @ plain.weight[e].astype(mx.float32).T for i, e in enumerate(experts.tolist())])
    assert close(plain(x, experts, is_sorted), due, 1e-5)
    assert close(packed(x, experts, is_sorted), due, 1e-5 if packing["mode"] == "affine" else 1e-2)


def test_experts_in_16_bit_stay_so():
    layer = SwitchLinear(COUNT, OUT, IN)
    layer.weight = layer.weight.astype(mx.bfloat16)
    out = layer(mx.ones((2, 1, IN), mx.bfloat16), mx.array([2, 1]))
    assert out.dtype == mx.bfloat16
    assert close(out, mx.stack([layer.weight[e].astype(mx.float32).sum(-1)[None] for e in (2, 1)]), 1e-2)


def test_a_scale_for_each_expert():
    """nvfp4's global scale: the largest value of each matrix."""
    layer, packing = SwitchLinear(COUNT, OUT, IN), {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    layer.weight = layer.weight * mx.array([1.0, 20.0, 0.01])[:, None, None]
    packed = layer.to_quantized(**packing, global_scale=True)
    assert set(packed) == {"weight", "scales", "global_scale"}
    assert not tree_flatten(packed.trainable_parameters())
    assert mx.array_equal(packed.global_scale, mx.abs(layer.weight).max(axis=(-2, -1)))
    assert packed.global_scale.dtype == mx.float32
    with pytest.raises(ValueError, match="only supported on the GPU"):  # not left out in silence
        mx.eval(packed(mx.ones((1, 1, IN)), mx.array([1])))
    again = packed.dequantized()
    for ours, matrix, scale in zip(again.weight, layer.weight, packed.global_scale, strict=True):
        words, scales = mx.quantize(matrix, **packing, global_scale=scale)
        assert mx.array_equal(ours, mx.dequantize(words, scales, None, **packing, global_scale=scale))
        assert close(ours, matrix, 0.2)
