"""Formats of other tools: read, or refused in one line that names the format and the tool; never by 115,251 lines."""

from .. import formats as f
from ..asking import audited, counted, gated, loaded
from ..makers import config, file, sized, tiny
from ..row import AGREES, REFUSED, Row

CORE = rf"({f.ATTENTION}|{f.MLP})"
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4", "producer": {"name": "modelopt", "version": "0.39.0"}}


def compressed(form, **weights):
    group = {"targets": ["Linear"], "weights": {"type": "float", "num_bits": 8} | weights}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


ROWS = [
    Row(
        "ModelOpt NVFP4 at true size", "nvidia's own release: packed bytes, two scales a matrix, 115,251 lines once",
        "D6, NVIDIA/Model-Optimizer#1283", sized("glm-4.7-flash", f.packed_as(f.modelopt_nvfp4, f.EXPERTS, MODELOPT)), audited(),
        code=REFUSED, says=("ModelOpt", "NVFP4"),
    ),
    Row(
        "ModelOpt NVFP4 without its config", "config.json was edited: the tensors alone tell",
        "D6, sgl-project/sglang#29562", tiny(f.packed_as(f.modelopt_nvfp4, f.EXPERTS)), audited(), code=REFUSED,
        says=("ModelOpt|NVFP4",),
    ),
    Row(
        "ModelOpt NVFP4, loaded", "people point the loader at it", "D6, sgl-project/sglang#29562",
        tiny(f.packed_as(f.modelopt_nvfp4, f.EXPERTS, MODELOPT)), loaded, code=REFUSED, says=("NVFP4",),
    ),
    Row(
        "compressed-tensors FP8, a scale a row", "llm-compressor's FP8_DYNAMIC: it looks like zai-org's FP8, and is not",
        "D6, vllm-project/llm-compressor#2696",
        tiny(f.packed_as(f.compressed_fp8, CORE, compressed("float-quantized", strategy="channel"))), audited(),
        code=REFUSED, says=("compressed-tensors",),
    ),
    Row(
        "compressed-tensors FP8 of GLM-4.7-Flash", "a line a tensor once: 57,645 of GLM-5", "D6",
        sized("glm-4.7-flash", f.packed_as(f.compressed_fp8, CORE, compressed("float-quantized", strategy="channel"))), audited(),
        code=REFUSED, says=("compressed-tensors",),
    ),
    Row(
        "compressed-tensors W4A16, the indexer too",
        "weight_packed, weight_scale, weight_shape; it was told to spare nothing", "D6, vllm-project/llm-compressor#2512",
        tiny(f.packed_as(f.compressed_int4, rf"({f.MLP}|{f.INDEXER})", compressed("pack-quantized", type="int", num_bits=4))),
        audited(), code=REFUSED, says=("compressed-tensors",),
    ),
    Row(
        "compressed-tensors NVFP4", "llm-compressor's NVFP4, of other names than ModelOpt's", "D6",
        tiny(f.packed_as(f.compressed_nvfp4, f.MLP, compressed("nvfp4-pack-quantized", num_bits=4))), audited(),
        code=REFUSED, says=("compressed-tensors",),
    ),
    Row(
        "Quark MXFP4", "AMD's: bytes of two values and a byte of scale for 32", "D6, vllm-project/vllm#54900",
        tiny(f.packed_as(f.quark_mxfp4, f.EXPERTS, {"quant_method": "quark", "quant_mode": "eager_mode"})), audited(),
        code=REFUSED, says=("Quark",),
    ),
    Row(
        "GPTQ by auto-round", "int4 in groups of 128, g_idx beside it", "D6, intel/auto-round#1714",
        tiny(f.packed_as(f.gptq, f.MLP, {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4})),
        audited(), code=REFUSED, says=("GPTQ|auto-round",),
    ),
    Row(
        "GPTQ, loaded", "I32 words are no dtype that is known", "D6",
        tiny(f.packed_as(f.gptq, f.MLP, {"quant_method": "gptq", "bits": 4})), loaded, code=REFUSED, says=("GPTQ",),
    ),
    Row(
        "AWQ", "qweight, qzeros, scales, and no g_idx", "D6, vllm-project/llm-compressor#2413",
        tiny(f.packed_as(f.awq, f.MLP, {"quant_method": "awq", "bits": 4, "group_size": 128})), audited(), code=REFUSED,
        says=("AWQ",),
    ),
    Row(
        "W8A8", "int8 with a scale a row, for Ascend", "D6, vllm-project/vllm-ascend#3520",
        tiny(f.packed_as(f.int8, CORE, compressed("int-quantized", type="int"))), audited(), code=REFUSED,
        says=("W8A8|int8|compressed-tensors",),
    ),
    Row(
        "JANGTQ experts", "tq_packed, tq_norms, tq_bits, a jang_config.json beside them", "D6, jundot/omlx#2351",
        tiny(f.packed_as(f.jang, f.EXPERTS), file("jang_config.json", '{"format": "jang", "weight_format": "mxtq"}')),
        audited(), code=REFUSED, says=("JANG",),
    ),
    Row(
        "AWQ, judged", "the gate is asked about a format that nobody reads here", "D6",
        tiny(f.packed_as(f.awq, f.MLP, {"quant_method": "awq", "bits": 4, "group_size": 128})), gated(), code=REFUSED,
        says=("AWQ",),
    ),
    Row(
        "FP8 without its scales", "cast as it is, each matrix is wrong by a factor of its own", "D6",
        tiny(f.packed_as(f.fp8_without_scale, r"layers\.0\.self_attn\.o_proj\.weight", FP8)), audited(), code=REFUSED,
        says=(r"layers\.0\.self_attn\.o_proj",),
    ),
    Row(
        "zai-org's FP8 in small", "what is read must not be taken for one of its relatives", "zai-org/GLM-5.2-FP8",
        tiny(f.packed_as(f.fp8_blocks, rf"layers.*({CORE}|indexer\.(wq_b|wk)\.weight)", FP8)), audited(), code=AGREES,
        never=("FAULT", "compressed", "ModelOpt"),
    ),
    Row(
        "a quantization_config over bf16 tensors", "FP8's key was left in config.json when the weights were cast back",
        "huggingface/transformers#46842", tiny(config(quantization_config=FP8)), counted(), code=AGREES,
    ),
]  # fmt: skip
