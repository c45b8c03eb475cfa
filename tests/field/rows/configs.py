"""config.json as people and tools write it: what is sound loads, what contradicts itself or the files is named by its key."""

from ..asking import audited, gated, loaded, of_source, same_as
from ..formats import EXPERTS, fp8_blocks, packed_as
from ..makers import TINY, built, config, small, tiny, trained
from ..row import FAULT, UNREADABLE, Row

HALF = config(indexer_rope_interleave=True, indexer_rope_traditional=False, indexer_norm_eps=1e-6)
RELEASE = ("--layers", "0")
YARN = {"rope_theta": 8000000, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}


def entry(path, value, everywhere=True):
    """An entry more in the key quantization; and in quantization_config, as mlx-lm writes both."""

    def step(draft):
        draft.config["quantization"] = draft.config.get("quantization", {}) | {path: value}
        if everywhere:
            draft.config["quantization_config"] = dict(draft.config["quantization"])

    return step


def entries_of_every_module(draft):
    """mlx-lm's mixed recipes: an entry for each packed module, group_size null."""
    own = {
        n.removesuffix(".scales"): {"group_size": None, "bits": 4, "mode": "affine"}
        for n in draft.tensors
        if n.endswith(".scales")
    }
    draft.config["quantization"] = draft.config["quantization"] | own


GATE, NORM = "model.layers.2.mlp.gate", "model.layers.2.input_layernorm"
PACKING = {"group_size": 64, "bits": 4}

ROWS = [
    Row(
        "num_local_experts", "HF's other name for n_routed_experts", "huggingface/transformers",
        tiny(config(num_local_experts=TINY["n_routed_experts"], use_qk_norm=False, surgery_dummy=True)), same_as(of_source),
    ),
    Row(
        "num_local_experts of another model", "a pruner changed one of two keys", "huggingface/transformers",
        tiny(config(num_local_experts=TINY["n_routed_experts"] // 2)), loaded, code=UNREADABLE, says=("num_local_experts",),
    ),
    Row(
        "half-split build's own config, judged",
        "zai-org's key says interleaved, the builder's says half-split, and the weights are half-split", "D1",
        trained("half-split", HALF), gated(*RELEASE), says=("agrees", "CONTESTED", "indexer_rope_traditional"),
    ),
    Row(
        "half-split build's own config, audited", "the header says that both keys are there", "D1",
        trained("half-split", HALF), audited(), says=("half-split", "CONTESTED"), never=("FAULT",),
    ),
    Row(
        "half-split by the builder's key alone", "zai-org's key taken out", "D1",
        trained("half-split", config(indexer_rope_interleave=None, indexer_rope_traditional=False)), gated(*RELEASE),
        says=("agrees",),
    ),
    Row(
        "interleaved by both keys", "a build that repeats what zai-org says", "D1",
        trained("interleaved", config(indexer_rope_traditional=True, indexer_norm_eps=1e-6)), gated(*RELEASE),
        says=("agrees",),
    ),
    Row(
        "k_norm eps of the builder", "1e-5 in config.json, as stock mlx-lm has it: the oracles are handed it too", "D1",
        trained("interleaved", config(indexer_norm_eps=1e-5)), gated(*RELEASE), says=("agrees", "indexer_norm_eps = 1e-05"),
    ),
    Row(
        "latent eps of the builder", "rms_norm_eps for the latents, as vLLM has it", "D1",
        trained("interleaved", config(latent_norm_eps=1e-5)), gated(*RELEASE), says=("agrees", "latent_norm_eps = 1e-05"),
    ),
    Row(
        "as transformers saves it", "scoring_func, topk_method, moe_layer_freq and indexer_rope_interleave dropped",
        "huggingface/transformers#46842", tiny(config(scoring_func=None, topk_method=None, moe_layer_freq=None)),
        same_as(of_source),
    ),
    Row(
        "rope_theta at the top level", "older configs have no rope_parameters", "ml-explore/mlx-lm#1563",
        tiny(config(rope_parameters=None, rope_theta=8000000)), same_as(of_source),
    ),
    Row(
        "two values of rope_theta",
        "10000 at the top level, 8e6 in rope_parameters: a converter's default beside the truth", "THUDM/slime#1720",
        tiny(config(rope_theta=10000)), loaded, code=UNREADABLE, says=("rope_theta",),
    ),
    Row(
        "no rope_theta at all", "10000 would be taken in silence elsewhere", "lyogavin/airllm#369",
        tiny(config(rope_parameters=None)), loaded, code=UNREADABLE, says=("rope_theta",),
    ),
    Row(
        "YaRN of a longer context", "rope_scaling that a user added", "radixark/miles#2716",
        small(rope_parameters=YARN, max_position_embeddings=16384),
        gated(*RELEASE), says=("agrees",),
    ),
    Row(
        "pattern of letters", "index_topk_pattern where others list types", "ml-explore/mlx-lm#1410",
        tiny(config(index_topk_freq=None, index_skip_topk_offset=None, index_topk_pattern="FFFSS")), same_as(of_source),
    ),
    Row(
        "list of types that counts the MTP layer", "six entries for five layers", "ggml-org/llama.cpp#25407",
        tiny(config(indexer_types=["full"] * 3 + ["shared"] * 2 + ["full"])), same_as(of_source),
    ),
    Row(
        "two schedules", "a list of types and a frequency that say otherwise", "ggml-org/llama.cpp#25407",
        tiny(config(index_topk_freq=2, indexer_types=["full"] * 3 + ["shared"] * 2)), audited(),
        says=("indexer_schedule", "CONTESTED"),
    ),
    Row(
        "key that nobody knows", "a fork's own key, which may change everything", "unslothai/unsloth#9938",
        tiny(config(index_local_tokens=128)), loaded, code=UNREADABLE, says=("index_local_tokens",),
    ),
    Row(
        "keys of trainers and uploaders", "unsloth_fixed, torch_dtype, use_bfloat16: harmless", "unslothai/unsloth#9938",
        tiny(config(unsloth_fixed=True, torch_dtype="bfloat16", use_bfloat16=True)), same_as(of_source),
    ),
    Row(
        "GLM-5.3-Flash", "glm5_next: another architecture, of which people expect that GLM-5.3's code runs it",
        "jundot/omlx#3400", tiny(config(model_type="glm5_next")), audited(), code=UNREADABLE, says=("glm5_next",),
    ),
    Row(
        "DeepSeek-V3.2", "the same definition under another name, half-split by nature", "ml-explore/mlx-lm#1431",
        tiny(config(model_type="deepseek_v32")), audited(), code=UNREADABLE, says=("deepseek_v32",),
    ),
    Row(
        "quantization that names the router", "an entry for mlp.gate, which is stored in bf16: mlx-lm refuses to load",
        "D5", built(entry(GATE, PACKING)), audited(), code=FAULT, says=(r"layers\.2\.mlp\.gate",),
    ),
    Row(
        "quantization that names a norm", "the same of a module that never can be packed", "D5",
        built(entry(NORM, PACKING)), audited(), code=FAULT, says=(r"layers\.2\.input_layernorm",),
    ),
    Row(
        "quantization that says false of the router", "mlx-lm's own way of leaving a module out", "D5",
        built(entry(GATE, False)), audited(), never=("FAULT", "warning: .*gate"),
    ),
    Row(
        "quantization that says false of what is packed", "mlx-lm leaves the module as it is, and finds scales", "D5",
        built(entry("lm_head", False)), audited(), code=FAULT, says=("lm_head",),
    ),
    Row(
        "quantization with group_size null", "mlx-lm's mixed recipes write the mode's own as null", "D4",
        built(entries_of_every_module), audited(), never=("FAULT", "packed otherwise"),
    ),
    Row(
        "quantization of an unpacked model", "converted back, the key left in: mlx-lm packs nothing", "jundot/omlx#967",
        tiny(config(quantization=PACKING)), audited(), never=("FAULT",),
    ),
    Row(
        "packed without the key quantization", "mlx-lm's own loader goes by the key", "ml-explore/mlx-lm#1259",
        built(config(quantization=None)), audited(), code=(0, 1), says=("quantization",),
    ),
    Row(
        "FP8 beside the key of MLX", "both keys in config.json after a conversion that stopped", "zai-org/GLM-5.2-FP8",
        tiny(packed_as(fp8_blocks, EXPERTS), config(quantization=PACKING)), audited(), never=("FAULT",),
    ),
    Row(
        "other experts than the router", "n_routed_experts of the whole model in a pruned build", "egesabanci/reap-mlx#127",
        small(config(n_routed_experts=16), n_routed_experts=12), loaded, code=UNREADABLE, says=(r"mlp\.(experts|gate)",),
    ),
    Row(
        "vocabulary of another release", "vocab_size beside an embedding of other rows", "mymusise/ChatGLM-Tuning#67",
        tiny(config(vocab_size=TINY["vocab_size"] + 8)), loaded, code=UNREADABLE, says=("embed_tokens",),
    ),
]  # fmt: skip
