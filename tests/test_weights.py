"""A checkpoint's names and formats, one function at a time; whole models in them are the gate's."""

import mlx.core as mx
import pytest

from glm_dsa import ModelArgs, weights
from glm_dsa.errors import WeightsError
from reference import checkpoints

ARGS = ModelArgs.from_dict(
    checkpoints.glm_5_2(num_hidden_layers=4, kv_lora_rank=64, qk_nope_head_dim=32, qk_head_dim=48, v_head_dim=24)
)
BARE = ModelArgs.from_dict(checkpoints.tiny(num_hidden_layers=4, num_nextn_predict_layers=0, tie_word_embeddings=True))
FLASH = ModelArgs.from_dict(checkpoints.glm_4_7())
KV_B = "model.layers.1.self_attn.kv_b_proj"
HEADS, NOPE, VALUE, LATENT = ARGS.num_attention_heads, ARGS.qk_nope_head_dim, ARGS.v_head_dim, ARGS.kv_lora_rank


def names(args):
    return {spec.name: spec.shape for spec in weights.inventory(args)}


@pytest.mark.parametrize(
    ("args", "name", "is_ignored"),
    [
        (ARGS, "lm_head.weight", False), (BARE, "lm_head.weight", True), (BARE, "lm_header.weight", False),
        (ARGS, "model.layers.3.self_attn.indexer.wk.weight", True),  # a shared layer
        (ARGS, "model.layers.2.self_attn.indexer.wk.weight", False),
        (ARGS, "model.layers.4.self_attn.indexer.wk.weight", False),  # the MTP layer
        (ARGS, "model.layers.3.self_attn.indexer_wk.weight", False),
        (FLASH, "model.layers.1.self_attn.indexer.wk.weight", False),  # no architecture with indexers
        (ARGS, "model.layers.0.self_attn.rotary_emb.inv_freq", True), (ARGS, "rotary_emb.inv_freq", False),
        (ARGS, "model.layers.0.self_attn.q_a_proj.weight", False), (ARGS, "model.layers.1234567.rotary_emb.inv_freq", False),
    ],
)  # fmt: skip
def test_what_builds_carry_for_nothing(args, name, is_ignored):
    assert weights.is_ignorable(args, name) == is_ignored
    assert (name in weights.to_modules(args, {name: mx.ones((2,))})) == (not is_ignored)


def test_mtp_layers_are_those_behind_the_last():
    assert [weights.is_mtp(ARGS, f"model.layers.{i}.x") for i in (0, 3, 4, 5)] == [False, False, True, True]
    assert not weights.is_mtp(ARGS, "model.norm.weight")
    assert weights.has_mtp(ARGS, ["model.norm.weight", "model.layers.4.enorm.weight"])
    assert not weights.has_mtp(ARGS, ["model.norm.weight", "model.layers.3.x"])
    assert not weights.has_mtp(BARE, ["model.layers.4.enorm.weight"])
    assert "model.layers.4.enorm.weight" not in weights.to_modules(BARE, {"model.layers.4.enorm.weight": mx.ones((2,))})


@pytest.mark.parametrize(
    ("name", "is_hf"),
    [("model.layers.1.mlp.experts.0.up_proj.weight", True), ("model.layers.1.mlp.switch_mlp.up_proj.weight", False),
     ("model.layers.1.self_attn.embed_q.weight", False), ("model.norm.scales", False), ("model.scales.weight", True)],
)  # fmt: skip
def test_layouts(name, is_hf):
    assert weights.is_hf_layout(["model.norm.weight", name]) == is_hf


def test_names_are_held_to_the_inventory_both_ways():
    due = names(ARGS)
    weights.check_names(ARGS, due)
    weights.check_names(ARGS, {n: s for n, s in due.items() if ".layers.4." not in n})  # without MTP as a whole
    weights.check_names(
        ARGS, due | {f"{KV_B}.weight_scale_inv": (1, 1), "model.layers.3.self_attn.indexer.wk.weight": (1,)}
    )
    experts = [n for n in due if ".experts." in n and ".layers.3." in n]
    for change, said in (
        ({"model.norm.weight": None}, "1 missing: model.norm.weight."),
        ({"model.norm.bias": (64,)}, "1 not expected: model.norm.bias."),
        ({"model.norm.weight": (63,)}, r"1 of the wrong shape: model.norm.weight is \[63\], expected \[64\]."),
        ({"model.layers.4.enorm.weight": None}, "1 missing: model.layers.4.enorm.weight."),
        (dict.fromkeys(experts[:5]), r"5 missing: .*experts.1.up_proj.weight. Does"),
        (dict.fromkeys(experts[:6]), r"6 missing: .*, \.\.\.\. Does"),
    ):
        found = {n: s for n, s in (due | change).items() if s is not None}
        with pytest.raises(WeightsError, match=said):
            weights.check_names(ARGS, found)


def experts_of(parts, count=ARGS.n_routed_experts):
    return {
        f"model.layers.3.mlp.experts.{e}.up_proj.{part}": make(e) for e in range(count) for part, make in parts.items()
    }


PACKED = {
    "weight": lambda e: mx.full((32, 8), e, mx.uint32),
    "scales": lambda e: mx.full((32, 2), e / 10),
    "biases": lambda e: mx.full((32, 2), -e / 10),
}


def test_experts_are_stacked_in_their_order_packed_or_not():
    for parts in ({"weight": lambda e: mx.full((32, 64), float(e))}, PACKED):
        found = weights.to_modules(ARGS, experts_of(parts))
        assert set(found) == {f"model.layers.3.mlp.switch_mlp.up_proj.{part}" for part in parts}
        for part, make in parts.items():
            stack = found[f"model.layers.3.mlp.switch_mlp.up_proj.{part}"]
            assert stack.dtype == make(0).dtype
            assert mx.array_equal(stack, mx.stack([make(e) for e in range(ARGS.n_routed_experts)]))
        assert weights.to_modules(ARGS, found).keys() == found.keys()


def test_experts_are_complete_and_of_one_kind():
    tensors = experts_of(PACKED)
    del tensors["model.layers.3.mlp.experts.5.up_proj.scales"]
    with pytest.raises(
        WeightsError, match=r"experts.5.up_proj.scales: missing, though .*experts.0.up_proj.scales is there"
    ):
        weights.to_modules(ARGS, tensors)
    for other in (mx.zeros((32, 3)), mx.zeros((32, 2), mx.float16)):
        name = "model.layers.3.mlp.experts.2.up_proj.biases"
        with pytest.raises(
            WeightsError, match=r"experts.2.up_proj.biases: .* where .*experts.0.* experts are of one kind"
        ):
            weights.to_modules(ARGS, experts_of(PACKED) | {name: other})


def halves(matrix):
    """The equations' reading of kv_b_proj: rows of each head, first W_uk [nope, R], then W_uv [v, R]."""
    heads = matrix.reshape(HEADS, NOPE + VALUE, LATENT)
    return mx.stack([head[:NOPE].T for head in heads]), mx.stack([head[NOPE:] for head in heads])


def test_the_two_halves_of_kv_b():
    matrix = mx.random.normal((HEADS * (NOPE + VALUE), LATENT))
    found = weights.to_modules(ARGS, {f"{KV_B}.weight": matrix})
    due = dict(zip(("embed_q", "unembed_out"), halves(matrix), strict=True))
    assert set(found) == {f"model.layers.1.self_attn.{half}.weight" for half in due}
    for half, value in due.items():
        assert mx.array_equal(found[f"model.layers.1.self_attn.{half}.weight"], value)
    with pytest.raises(WeightsError, match=r"kv_b_proj.weight is \[8, 8\], expected \[224, 64\]"):
        weights.to_modules(ARGS, {f"{KV_B}.weight": mx.zeros((8, 8))})


@pytest.mark.parametrize("group_size", [32, 64])
def test_the_two_halves_of_a_packed_kv_b(group_size):
    """Values as they are packed, keys unpacked: the same weights, to the bit."""
    packing = {"group_size": group_size, "bits": 8, "mode": "affine"}
    packed = mx.quantize(mx.random.normal((HEADS * (NOPE + VALUE), LATENT)), **packing)
    stored = {f"{KV_B}.{part}": value for part, value in zip(weights.PACKED, packed, strict=True)}
    found = weights.to_modules(ARGS, dict(stored))
    first, second = halves(mx.dequantize(*packed, **packing))
    prefix = "model.layers.1.self_attn"
    assert mx.array_equal(found[f"{prefix}.embed_q.weight"], first)
    assert mx.array_equal(
        mx.dequantize(*(found[f"{prefix}.unembed_out.{p}"] for p in weights.PACKED), **packing), second
    )
    assert len(found) == 4
    for change in (
        {"biases": packed[2][:, :0]},
        {"scales": packed[1][:5], "biases": packed[2][:5]},
        {"weight": packed[0][0]},
    ):
        with pytest.raises(WeightsError, match=r"kv_b_proj: .*do not match"):
            weights.to_modules(ARGS, stored | {f"{KV_B}.{part}": value for part, value in change.items()})


def packed_as(bits, group_size, mode, width=128, dtype=mx.float32):
    parts = mx.quantize(mx.ones((4, width), dtype), group_size=group_size, bits=bits, mode=mode)
    return {f"x.{part}": value for part, value in zip(weights.PACKED, parts, strict=False)}


AFFINE = [(bits, group, "affine") for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]


@pytest.mark.parametrize("packing", [*AFFINE, (4, 16, "nvfp4"), (4, 32, "mxfp4"), (8, 32, "mxfp8")], ids=str)
def test_the_packing_shows_in_the_shapes(packing):
    bits, group_size, mode = packing
    found = weights.packing_of("x", packed_as(*packing), 128)
    assert found == {"group_size": group_size, "bits": bits, "mode": mode}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x.weight": None}, "without a packed weight"), ({"x.weight": mx.zeros((4, 16), mx.int32)}, "without a packed weight"),
        ({"x.weight": mx.array(1, mx.uint32)}, "without a packed weight"), ({"x.scales": mx.array(1.0)}, "without a packed weight"),
        ({"x.scales": mx.zeros((4, 0))}, "without a packed weight"), ({"x.biases": None}, "affine scales without biases"),
        ({"x.scales": mx.zeros((4, 4), mx.int32)}, "expected floating point"),
        ({"x.biases": mx.zeros((4, 4), mx.int32)}, "expected floating point"),
        ({"x.scales": mx.zeros((4, 4), mx.uint8), "x.weight": mx.zeros((4, 12), mx.uint32)}, "do not pack rows of 128"),
        ({"x.scales": mx.zeros((4, 3))}, "do not pack rows of 128"), ({"x.scales": mx.zeros((4, 16))}, "do not pack rows of 128"),
        ({"x.scales": mx.zeros((4, 8))}, "do not pack rows of 128"),  # groups of 16: not in mlx
        ({"x.weight": mx.zeros((4, 17), mx.uint32)}, "do not pack rows of 128"),
        ({"x.weight": mx.zeros((4, 28), mx.uint32)}, "do not pack rows of 128"),
    ],
)  # fmt: skip
def test_what_is_no_packing(change, said):
    tensors = {n: t for n, t in (packed_as(4, 32, "affine") | change).items() if t is not None}
    with pytest.raises(WeightsError, match=said):
        weights.packing_of("x", tensors, 128)


def test_whatever_is_not_packed_is_floating_point():
    weights.check_dtypes(
        packed_as(4, 32, "affine") | packed_as(4, 32, "mxfp4") | {"y.weight": mx.ones((2,), mx.bfloat16)}
    )
    for wrong in ({"y.weight": mx.zeros((2,), mx.uint32)}, {"x.global": mx.zeros((2,), mx.uint8)}):
        with pytest.raises(WeightsError, match=f"{next(iter(wrong))} is mlx.core.uint"):
            weights.check_dtypes(packed_as(4, 32, "affine") | wrong)


def test_fp8_blocks():
    """Each block of 128 x 128 its own scale, the last ones cut short; rounded once, to bfloat16."""
    values = mx.random.normal((200, 300))
    codes, scale = mx.to_fp8(values), mx.array([[1.0, 0.3, 7.0], [0.01, 3.3, 1.7]])
    found = weights.to_modules(ARGS, {"x.weight": codes, "x.weight_scale_inv": scale})
    assert set(found) == {"x.weight"}
    assert found["x.weight"].dtype == mx.bfloat16
    exact = mx.from_fp8(codes, dtype=mx.float32)
    for i, rows in enumerate((slice(0, 128), slice(128, 200))):
        for j, columns in enumerate((slice(0, 128), slice(128, 256), slice(256, 300))):
            due = (exact[rows, columns] * scale[i, j]).astype(mx.bfloat16)
            assert mx.array_equal(found["x.weight"][rows, columns], due)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"x.weight_scale_inv": mx.ones((1, 1))}, "a block scale without its weight x.weight"),
        ({"x.weight": mx.zeros((4, 4), mx.uint8)}, "FP8 without x.weight_scale_inv"),
        ({"x.weight": mx.zeros((4, 4), mx.uint8), "x.weight_scale_inv": mx.ones((1, 2))}, r"is \[1, 2\], expected \[1, 1\]"),
        ({"x.weight": mx.zeros((4, 129), mx.uint8), "x.weight_scale_inv": mx.ones((1, 1))}, r"is \[1, 1\], expected \[1, 2\]"),
        ({"x.weight": mx.zeros((4, 4)), "x.weight_scale_inv": mx.ones((1, 1))}, "expected FP8 rows and F32"),
        ({"x.weight": mx.zeros((1, 4, 4), mx.uint8), "x.weight_scale_inv": mx.ones((1, 1))}, "expected FP8 rows and F32"),
        ({"x.weight": mx.zeros((4, 4), mx.uint8), "x.weight_scale_inv": mx.ones((1, 1), mx.bfloat16)}, "FP8 rows and F32"),
    ],
)  # fmt: skip
def test_what_is_no_fp8(tensors, said):
    with pytest.raises(WeightsError, match=said):
        weights.to_modules(ARGS, tensors)
