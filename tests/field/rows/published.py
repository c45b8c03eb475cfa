"""Builds that are published, at their true size, by their headers alone: what is sound must be let through in silence."""

from glm_dsa.planning.formats import Format

from ..asking import audited, planned
from ..formats import ATTENTION, MLP, fp8_blocks, packed_as
from ..layouts import duplicated_indexers, fused_indexer, fused_switch, prefixed, pruned
from ..makers import BF16, Draft, config, json_file, sized, sized_build, tiny, without
from ..row import AGREES, FAULT, SETTLED, Row

Q2, Q3, Q4, Q5, Q6, Q8 = (Format("bfloat16", bits, 64) for bits in (2, 3, 4, 5, 6, 8))
MXFP4, Q8_32 = Format("bfloat16", 4, 32, "mxfp4"), Format("bfloat16", 8, 32)
FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
QUIET = ("FAULT", r"packed otherwise", "missing:", "not expected")
NO_MTP = {"num_nextn_predict_layers": 0}


def all_in(form):
    """As mlx-lm's convert packs: every matrix but the router's, the indexer's too."""
    return lambda name: form


def mixed(experts, rest=Q8, indexer=BF16):
    return lambda name: indexer if ".indexer." in name else experts if ".switch_mlp." in name else rest


def said(main, mode=True, entries=True):
    """The key quantization: of the experts for all, and an entry for each module that is packed otherwise."""

    def step(draft: Draft) -> None:
        keys = ("group_size", "bits", "mode") if mode else ("group_size", "bits")
        others = {path: f for path, f in draft.kept.items() if f.is_packed and f != main and entries}
        out = main.packing() | {path: {k: f.packing()[k] for k in keys} for path, f in others.items()}
        draft.config["quantization"] = draft.config["quantization_config"] = out

    return step


ROWS = [
    Row(
        "GLM-5.2 as zai-org publishes it", "bf16, IndexShare, 282 shards: the release that everything is made from",
        "zai-org/GLM-5.2", sized("glm-5.2"), audited(), never=QUIET, says=("MTP present", "21 of 78"),
    ),
    Row(
        "GLM-5.2-FP8 as zai-org publishes it",
        "e4m3 in blocks of 128, kv_a_proj of 576 rows in five of them, head weights in bf16", "zai-org/GLM-5.2-FP8",
        sized("glm-5.2-fp8", packed_as(fp8_blocks, rf"layers.*({ATTENTION}|{MLP}|indexer\.(wq_b|wk)\.weight)", FP8_CONFIG)),
        audited(), never=QUIET, says=("fp8",),
    ),
    Row(
        "GLM-4.7-Flash as zai-org publishes it",
        "the same attention and experts, no indexer, an MTP layer with embedding and head", "zai-org/GLM-4.7-Flash",
        sized("glm-4.7-flash"), audited(), never=QUIET, says=("MTP present",),
    ),
    Row(
        "GLM-5.3 under the name of GLM-5.2", "a new release with the old config: nothing needs to know its name",
        "sgl-project/sglang#38616",
        sized_build("glm-5.2", mixed(Q4), config(transformers_version="5.24.0"), said(Q4), **NO_MTP), audited(), never=QUIET,
    ),
    Row(
        "MLX 4 bit, the indexer too",
        "stock convert packs all that it can; people run it, and it is costlier, not another model",
        "ml-explore/mlx-lm#1410", sized_build("glm-5.2", all_in(Q4), said(Q4), **NO_MTP), audited(),
        says=(r"indexer.*4 bit",), never=("FAULT",),
    ),
    Row(
        "MLX 4 bit, the indexer too, before publishing", "a publisher asks for the strict policy", "ml-explore/mlx-lm#1410",
        sized_build("glm-5.2", all_in(Q4), said(Q4), **NO_MTP), audited("--policy", "strict"), code=FAULT,
        says=(r"indexer.*4 bit",),
    ),
    Row(
        "MLX 8 bit, the indexer too", "most published builds have the indexer in 8 bit", "ml-explore/mlx-lm#1412",
        sized_build("glm-5.1", all_in(Q8), said(Q8), **NO_MTP), audited(), never=("FAULT",),
    ),
    Row(
        "MLX 8 bit, the indexer in bf16, strict", "what the strict policy asks for", "D5",
        sized_build("glm-5.1", mixed(Q8, Q8), said(Q8), **NO_MTP), audited("--policy", "strict"), never=QUIET,
    ),
    Row(
        "GLM-5.1-MXFP4-Q8", "mxfp4 experts for all, 8 bit for the rest; its entries name no mode", "D4, jundot/omlx#2040",
        sized_build("glm-5.1", mixed(MXFP4, Q8_32, Q8_32), said(MXFP4, mode=False), **NO_MTP), audited(), never=QUIET,
    ),
    Row(
        "GLM-5-MXFP4-Q8 with modes", "the same, each entry with its mode", "D4",
        sized_build("glm-5", mixed(MXFP4, Q8_32, Q8_32), said(MXFP4), **NO_MTP), audited(), never=QUIET,
    ),
    Row(
        "GLM-5-MXFP4-Q8 by global keys alone", "no entries: mlx-lm infers what is not listed from the shapes", "D4",
        sized_build("glm-5", mixed(MXFP4, Q8_32, Q8_32), said(MXFP4, entries=False), **NO_MTP), audited(), never=QUIET,
    ),
    Row(
        "Alis 3.5 bit, MTP kept",
        "3 bit experts, apart from each other, 8 bit for the rest, an entry for each, the MTP layer in 3 bit",
        "jundot/omlx#2091, jundot/omlx#2326", sized_build("glm-5.2", mixed(Q3), said(Q3)), audited(), never=QUIET,
        says=("MTP present",),
    ),
    Row(
        "an entry that says other bits than the files",
        "8 bit in the key quantization, 3 bit in the files: no loader that goes by it loads", "jundot/omlx#967",
        sized_build(
            "glm-5.2", mixed(Q3), said(Q3),
            lambda d: d.config["quantization"].update({"model.layers.3.mlp.switch_mlp.up_proj": {"group_size": 64, "bits": 8}}),
            **NO_MTP,
        ),
        audited(), code=SETTLED, says=(r"model\.layers\.3\.mlp\.switch_mlp\.up_proj",),
    ),
    Row(
        "inferencerlabs 4.8 bit",
        "every matrix packed, embedding, head and indexer among them; the code is to blame for 2170 unmatched names",
        "ml-explore/mlx-lm#1259", sized_build("glm-5.1", mixed(Q4, Q6, Q6), said(Q4), **NO_MTP), audited(),
        never=("FAULT",), says=(r"indexer.*6 bit",),
    ),
    Row(
        "2.7 bit", "2 bit experts, 8 bit for the rest", "D20", sized_build("glm-5.2", mixed(Q2), said(Q2), **NO_MTP),
        audited(), never=QUIET,
    ),
    Row(
        "DWQ 4 bit", "distilled scales under the usual names", "ml-explore/mlx-lm#1410",
        sized_build("glm-5", mixed(Q4, Q4), said(Q4), **NO_MTP), audited(), never=QUIET,
    ),
    Row(
        "MLX nvfp4", "mlx-lm's own nvfp4, in groups of 16", "ml-explore/mlx-lm#1410",
        sized_build(
            "glm-5.2", mixed(Format("bfloat16", 4, 16, "nvfp4")),
            config(quantization={"group_size": 16, "bits": 4, "mode": "nvfp4"}), **NO_MTP,
        ),
        audited(), never=QUIET,
    ),
    Row(
        "MLX mxfp8", "mlx-lm's own mxfp8, in groups of 32", "ml-explore/mlx-lm#1410",
        sized_build(
            "glm-5.2", all_in(Format("bfloat16", 8, 32, "mxfp8")),
            config(quantization={"group_size": 32, "bits": 8, "mode": "mxfp8"}), **NO_MTP,
        ),
        audited(), never=("FAULT", "packed otherwise"),
    ),
    Row(
        "omlx's fused experts", "gate_proj and up_proj of MXFP4-Q8 in one switch_mlp.gate_up_proj", "jundot/omlx#2040",
        sized_build("glm-5.1", mixed(MXFP4, Q8_32, Q8_32), said(MXFP4), fused_switch, **NO_MTP), audited(),
        never=("FAULT", "missing:"),
    ),
    Row(
        "omlx's fused indexer", "oQ3.5e: the indexer's wk and weights_proj in one, in 5 bit", "jundot/omlx#2347",
        sized_build("glm-5.2", mixed(Q3, Q5, Q5), said(Q3), fused_indexer, **NO_MTP), audited(),
        never=("FAULT", "missing:"),
    ),
    Row(
        "GLM-5.2-REAP50 in 4 bit", "128 of 256 experts, no MTP layer: the first that a Mac of 256 GB runs",
        "D9, raullenchai/Rapid-MLX#915", sized_build("glm-5.2", mixed(Q4, Q4), said(Q4), n_routed_experts=128, **NO_MTP),
        audited(), never=QUIET,
    ),
    Row(
        "a pruned trunk under a whole MTP head",
        "128 experts in the model, 256 left in the MTP layer, which checks drafts all the same", "D10, jundot/omlx#3610",
        sized("glm-5.2", pruned(128, in_mtp=False)), audited(), says=(r"MTP.*256|256.*MTP|layers\.78",), code=AGREES,
    ),
    Row(
        "mlx-vlm's 4 bit", "language_model. before every tensor and every entry", "D8, Blaizzy/mlx-vlm#1728",
        sized_build("glm-5.2", mixed(Q4), said(Q4), prefixed("language_model."), **NO_MTP), audited(),
        says=("language_model",), never=("FAULT",),
    ),
    Row(
        "no MTP though config.json names one", "a conversion dropped layer 78 and kept the key: 102 GB, not 117",
        "vllm-project/llm-compressor#2696", sized_build("glm-5.2", mixed(Q4), without(r"layers\.78\."), said(Q4)),
        audited(), says=("MTP absent",), never=("FAULT",),
    ),
    Row(
        "indexers copied onto shared layers",
        "the source of many GGUF files: 57 copies that this model never runs, and others do", "ggml-org/llama.cpp#25407",
        tiny(duplicated_indexers), audited(), code=AGREES, says=(r"indexer.*shared",),
    ),
    Row(
        "GLM-5.2's weights under a config without schedule", "indexers on the full layers alone, and no key that says so",
        "ml-explore/mlx-lm#1412",
        tiny(config(index_topk_freq=None, index_skip_topk_offset=None)),
        audited(), code=FAULT, says=("indexer_schedule", r"no indexer on layers 3-4"),
    ),
    Row(
        "weights of 16 experts, config.json of 8", "the config of a pruned build beside the whole one's weights",
        "egesabanci/reap-mlx#127", tiny(config(n_routed_experts=8)), audited(), code=FAULT,
        says=(r"mlp\.(gate|experts)",),
    ),
    Row(
        "what GLM-5.2 takes on a machine of 512 GB", "asked before 400 GB are downloaded", "raullenchai/Rapid-MLX#915",
        sized_build("glm-5.2", mixed(Q3), said(Q3), json_file("tokenizer_config.json"), **NO_MTP),
        planned("--context", "128k"), says=("512 GB",),
    ),
]  # fmt: skip
