"""Small proofs of upstream behaviour that the project works around. When one fails, upstream changed: drop the workaround."""

import mlx.core as mx
import mlx.nn as nn
import pytest
import torch
from mlx_lm.generate import speculative_generate_step
from mlx_lm.models.mla import MultiLinear
from mlx_lm.utils import dequantize_model
from transformers import AutoConfig
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.modeling_layers import MtpModel

import glm_dsa
from reference import checkpoints, hf


def test_mlx_gathers_float32_only_on_a_cpu():
    """glm_dsa/linear.py, SwitchLinear."""
    if mx.default_device() != mx.Device(mx.cpu):
        pytest.skip("concerns the CPU only")
    x, w = mx.ones((2, 1, 4), mx.bfloat16), mx.ones((3, 4, 4), mx.bfloat16)
    with pytest.raises(RuntimeError, match="only supports float32"):
        mx.eval(mx.gather_mm(x, w, rhs_indices=mx.array([0, 1])))


def test_mlx_gathers_global_scales_on_a_gpu_only():
    """verify/claims/test_weights.py, test_other_modes."""
    if mx.default_device() != mx.Device(mx.cpu):
        pytest.skip("concerns the CPU only")
    scale = mx.array([1.0, 2.0])
    packed = [mx.quantize(mx.ones((32, 32)), group_size=16, bits=4, mode="nvfp4", global_scale=s) for s in scale]
    weight, scales = mx.stack([p[0] for p in packed]), mx.stack([p[1] for p in packed])
    x, experts = mx.ones((2, 1, 32)), mx.array([0, 1])
    with pytest.raises(ValueError, match="only supported on the GPU"):
        mx.eval(
            mx.gather_qmm(
                x, weight, scales, None, rhs_indices=experts, group_size=16, bits=4, mode="nvfp4", global_scale=scale
            )
        )


def test_transformers_refuses_partial_fp8_blocks():
    """reference/checkpoints.py, write_fp8: 576 rows in blocks of 128 are five blocks, the last of 64."""
    weight = torch.zeros(576, 128).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="not divisible by scale grid"):
        Fp8Dequantize(None)._dequantize_one(weight, torch.ones(5, 1))


def test_transformers_refuses_mtp_for_this_architecture():
    """reference/mtp.py."""
    model = hf.build(checkpoints.glm_5_2(num_hidden_layers=4))
    with pytest.raises(ValueError, match="num_mtp_layers"):
        draft_once(model)


def draft_once(model):
    mtp = MtpModel(model, 1)
    return mtp(input_ids=torch.ones(1, 4, dtype=torch.long), previous_hidden_state=torch.ones(1, 4, 64))


def test_transformers_never_reads_the_number_of_dense_layers_of_glm4_moe_lite():
    """reference/hf.py, config_for."""
    config = checkpoints.glm_4_7(first_k_dense_replace=2)
    theirs = AutoConfig.for_model(**config).mlp_layer_types
    assert theirs == ["dense", "sparse", "sparse", "sparse"]
    ours = ["dense", "dense", "sparse", "sparse"]
    assert list(glm_dsa.ModelArgs.from_dict(config).mlp_layer_types) == hf.config_for(config).mlp_layer_types == ours


def test_mlx_lm_leaves_matrices_per_head_packed():
    """glm_dsa/mlx_lm/conversion.py, dequantize_model. Proven on mlx-lm's own class."""
    model = nn.Module()
    model.layers = [MultiLinear(64, 64, 2)]
    nn.quantize(model)
    assert "scales" in dequantize_model(model).layers[0]


def test_mlx_lms_keys_outgrow_their_caches_after_speculative_decoding(tmp_path):
    """glm_dsa/mlx_lm/generation.py, insert_cache. Its server files prompt and text under a cache that lacks the last token."""
    args = glm_dsa.ModelArgs.from_dict(checkpoints.glm_5_2(num_hidden_layers=4, num_nextn_predict_layers=0))
    model, prompt = glm_dsa.Model(args), list(range(3, 23))
    lacking = []
    for tokens in range(4, 9):
        cache = [*model.make_cache(), *model.make_cache()]
        steps = speculative_generate_step(mx.array(prompt), model, model, max_tokens=tokens, prompt_cache=cache)
        key = [*prompt, *(token for token, *_ in steps)]
        lacking.append(len(key) - cache[0].length)
    assert max(lacking) > 0
