"""Steps that pack a release as other tools do: by names, dtypes and shapes, at any size. Their values are holes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from .makers import Draft, Header, Step

ATTENTION = r"self_attn\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)\.weight"
MLP = r"mlp\.(experts\.\d+\.|shared_experts\.)?(gate|up|down)_proj\.weight"
EXPERTS = r"mlp\.experts\.\d+\.(gate|up|down)_proj\.weight"
INDEXER = r"self_attn\.indexer\.(wq_b|wk|weights_proj)\.weight"

Packed = Callable[[str, int, int], Iterator[tuple[str, str, tuple[int, ...]]]]


def packed_as(kind: Packed, which: str, quantization: dict | None = None) -> Step:
    """Every matrix that `which` finds, as `kind` keeps it; quantization_config beside it."""

    def step(draft: Draft) -> None:
        tensors: dict[str, Header] = {}
        for name, tensor in draft.tensors.items():
            if not re.search(which, name):
                tensors[name] = _header(tensor)
                continue
            rows, columns = tensor.shape
            tensors |= {
                n: Header(dtype, shape) for n, dtype, shape in kind(name.removesuffix(".weight"), rows, columns)
            }
        assert len(tensors) > len(draft.tensors), which
        draft.tensors = tensors
        if quantization is not None:
            draft.config["quantization_config"] = quantization

    return step


def _header(tensor) -> Header:
    return (
        tensor
        if isinstance(tensor, Header)
        else Header({"torch.float32": "F32"}.get(str(tensor.dtype), "BF16"), tuple(tensor.shape))
    )


def fp8_blocks(path, rows, columns):
    """zai-org's own: blocks of 128 x 128."""
    yield f"{path}.weight", "F8_E4M3", (rows, columns)
    yield f"{path}.weight_scale_inv", "F32", (-(-rows // 128), -(-columns // 128))


def fp8_without_scale(path, rows, columns):
    yield f"{path}.weight", "F8_E4M3", (rows, columns)
    yield f"{path}.input_scale", "F32", ()


def modelopt_nvfp4(path, rows, columns):
    yield f"{path}.weight", "U8", (rows, columns // 2)
    yield f"{path}.weight_scale", "F8_E4M3", (rows, columns // 16)
    yield f"{path}.weight_scale_2", "F32", ()
    yield f"{path}.input_scale", "F32", ()


def compressed_fp8(path, rows, columns):
    """llm-compressor, FP8_DYNAMIC: one scale a row."""
    yield f"{path}.weight", "F8_E4M3", (rows, columns)
    yield f"{path}.weight_scale", "BF16", (rows, 1)


def compressed_int4(path, rows, columns):
    """llm-compressor, W4A16, pack-quantized."""
    yield f"{path}.weight_packed", "I32", (rows, columns // 8)
    yield f"{path}.weight_scale", "BF16", (rows, -(-columns // 128))
    yield f"{path}.weight_shape", "I64", (2,)


def compressed_nvfp4(path, rows, columns):
    yield f"{path}.weight_packed", "U8", (rows, columns // 2)
    yield f"{path}.weight_scale", "F8_E4M3", (rows, columns // 16)
    yield f"{path}.weight_global_scale", "F32", (1,)


def quark_mxfp4(path, rows, columns):
    yield f"{path}.weight", "U8", (rows, columns // 2)
    yield f"{path}.weight_scale", "U8", (rows, columns // 32)


def gptq(path, rows, columns):
    yield f"{path}.qweight", "I32", (columns // 8, rows)
    yield f"{path}.qzeros", "I32", (-(-columns // 128), rows // 8)
    yield f"{path}.scales", "F16", (-(-columns // 128), rows)
    yield f"{path}.g_idx", "I32", (columns,)


def awq(path, rows, columns):
    yield f"{path}.qweight", "I32", (columns, rows // 8)
    yield f"{path}.qzeros", "I32", (-(-columns // 128), rows // 8)
    yield f"{path}.scales", "F16", (-(-columns // 128), rows)


def int8(path, rows, columns):
    """W8A8: one scale a row."""
    yield f"{path}.weight", "I8", (rows, columns)
    yield f"{path}.weight_scale", "F32", (rows, 1)


def jang(path, rows, columns):
    """JANGTQ's experts."""
    yield f"{path}.tq_packed", "U32", (rows, columns // 16)
    yield f"{path}.tq_norms", "F16", (rows,)
    yield f"{path}.tq_bits", "U8", (1,)
