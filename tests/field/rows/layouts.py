"""The same weights under other names: they load as the same model, or what is wrong with them is named."""

from .. import broken
from .. import layouts as to
from ..asking import audited, built_of_source, gated, loaded, of_source, same_as
from ..makers import TINY, built, config, file, renamed, small, tiny, trained, unpacked, without
from ..row import AGREES, REFUSED, SETTLED, UNREADABLE, Row

MTP = TINY["num_hidden_layers"]
SOUND = ("FAULT", "missing:")

ROWS = [
    Row(
        "fused experts of transformers",
        "save_pretrained(save_original_format=False): gate_up_proj and down_proj of all experts in one",
        "D7, sgl-project/sglang#38616", tiny(to.fused_experts), same_as(of_source),
    ),
    Row(
        "fused experts, audited", "the same by its headers", "D7", tiny(to.fused_experts), audited(), never=SOUND,
    ),
    Row(
        "fused experts, judged", "the same on trial", "D7", tiny(to.fused_experts), gated("--layers", "0-2"),
        says=("agrees",),
    ),
    Row(
        "fused experts, one layer's down_proj lost", "a shard is missing", "D7",
        tiny(to.fused_experts, without(r"layers\.2\.mlp\.experts\.down_proj")), loaded, code=UNREADABLE,
        says=(r"layers\.2\.mlp\.experts\.(\d+\.)?down_proj",),
    ),
    Row(
        "fused experts the other way round",
        "[E, hidden, 2 I], as another library keeps them: of another shape, and never guessed", "D7",
        tiny(to.fused_the_other_way), loaded, code=UNREADABLE, says=(r"experts\.(\d+\.gate_proj|gate_up_proj)",),
    ),
    Row(
        "prefix of mlx-vlm", "its convert writes language_model. before every tensor", "D8, Blaizzy/mlx-vlm#1728",
        tiny(to.prefixed("language_model.")), same_as(of_source),
    ),
    Row(
        "prefix of mlx-vlm, 4 bit", "the same of a packed build", "D8, Blaizzy/mlx-vlm#1728",
        built(to.prefixed("language_model.")), same_as(built_of_source),
    ),
    Row(
        "prefix of mlx-vlm, audited", "57 FAULTs once; the prefix is to be named", "D8",
        built(to.prefixed("language_model.")), audited(), says=("language_model",), never=("FAULT",),
    ),
    Row(
        "prefix of mlx-vlm, judged", "the same on trial", "D8", tiny(to.prefixed("language_model.")),
        gated("--layers", "0-2"), says=("agrees",),
    ),
    Row(
        "prefix of models with a tower", "transformers' model.language_model. before every layer",
        "D8, sgl-project/sglang#40311", tiny(renamed(r"^model\.", "model.language_model.")), loaded,
        code=(AGREES, UNREADABLE), never=(r"missing: .*missing: ",),
    ),
    Row(
        "prefix on two layers alone", "a merge of two folders: no name is there twice, so that there is nothing to guess", "D8",
        tiny(to.prefixed_in_part), same_as(of_source),
    ),
    Row(
        "omlx's switch_mlp.gate_up_proj", "the stacked experts of an MLX build, two matrices in one", "jundot/omlx#2040",
        unpacked(to.fused_switch), same_as(of_source),
    ),
    Row(
        "omlx's switch_mlp.gate_up_proj in 4 bit", "words, scales and biases joined row by row", "jundot/omlx#2040",
        built(to.fused_switch), same_as(built_of_source),
    ),
    Row(
        "omlx's wk_weights_proj", "the indexer's two small matrices in one", "jundot/omlx#2347", tiny(to.fused_indexer),
        same_as(of_source),
    ),
    Row(
        "omlx's wk_weights_proj beside packed experts", "the same of a packed build whose indexer is in bf16",
        "jundot/omlx#2347", built(to.fused_indexer), same_as(built_of_source),
    ),
    Row(
        "MTP layer that config.json denies",
        "num_nextn_predict_layers set to 0 so that a loader stops complaining; HF ignores the layer", "D11",
        tiny(config(num_nextn_predict_layers=0)), same_as(of_source),
    ),
    Row(
        "MTP layer that config.json denies, audited", "26 FAULTs once", "D11", tiny(config(num_nextn_predict_layers=0)),
        audited(), says=("num_nextn_predict_layers|MTP",), never=("FAULT",),
    ),
    Row(
        "MTP layer that a build's config.json denies", "the same in MLX's layout", "D11",
        built(config(num_nextn_predict_layers=0)), same_as(built_of_source),
    ),
    Row(
        "layer 9 of a model of five", "tensors of layers that config.json knows nothing of: no MTP head, another model's",
        "D11", tiny(renamed(rf"layers\.{MTP}\.", "layers.9.")), audited(), code=REFUSED, says=(r"layers\.9|layer 9",),
    ),
    Row(
        "whole MTP head on a pruned trunk, small", "12 of 16 experts in the trunk", "D10, jundot/omlx#3610",
        tiny(to.pruned(12, in_mtp=False)), loaded,
    ),
    Row(
        "whole MTP head on a pruned trunk, audited", "the trunk is sound; what is said concerns MTP",
        "D10, jundot/omlx#3610", tiny(to.pruned(12, in_mtp=False)), audited(), says=("MTP",),
    ),
    Row(
        "whole MTP head on a pruned trunk, judged", "the trunk on trial", "D10", tiny(to.pruned(12, in_mtp=False)),
        gated("--layers", "0-2"), says=("MTP",),
    ),
    Row(
        "layers of two widths",
        "one layer with 12 experts, the others with 16: pruned layer by layer, which no config can say",
        "egesabanci/reap-mlx#107", tiny(without(r"layers\.2\.mlp\.experts\.1[2-5]\.")), loaded, code=UNREADABLE,
        says=(r"layers\.2\.mlp\.experts",),
    ),
    Row(
        "mtp.safetensors", "the MTP layer in a file that no index lists", "D12, sgl-project/sglang#17166",
        tiny(to.apart("mtp.safetensors")), audited(), says=(r"mtp\.safetensors|MTP present",), never=("FAULT",),
    ),
    Row(
        "model-mtp.safetensors", "as converters that look for model*.safetensors want it named", "ggml-org/llama.cpp#16359",
        tiny(to.apart("model-mtp.safetensors")), audited(), says=("MTP present",), never=("FAULT",),
    ),
    Row(
        "mtp.safetensors with names of its own", "omlx's mtp.0.* in the file beside", "D12, jundot/omlx#2326",
        tiny(to.apart("mtp.safetensors", (rf"model\.layers\.{MTP}\.", "mtp.0."))), audited(), code=SETTLED,
        says=(r"mtp\.safetensors|mtp\.0|MTP present",),
    ),
    Row(
        "mtp.0.block among the shards", "the same names among the other tensors", "D12, jundot/omlx#2326",
        tiny(renamed(rf"model\.layers\.{MTP}\.", "mtp.0.block.")), audited(), code=SETTLED, says=(r"mtp\.0|MTP present",),
    ),
    Row(
        "drafter by itself", "the MTP layer alone, model_type glm_moe_dsa_mtp", "D12", tiny(to.drafter_alone), audited(),
        code=REFUSED, says=("glm_moe_dsa_mtp",),
    ),
    Row(
        "copies of embedding and head in the MTP layer", "engines ask for them, so converters write them",
        "vllm-project/vllm-ascend#6754", tiny(to.copies_in_mtp), same_as(of_source),
    ),
    Row(
        "copies in the MTP layer, audited", "the same by its headers", "vllm-project/vllm-ascend#6754",
        tiny(to.copies_in_mtp), audited(), never=("FAULT",),
    ),
    Row(
        "no MTP tensors at all", "most MLX conversions drop the layer and keep the key", "intel/auto-round#1714",
        tiny(without(rf"layers\.{MTP}\.")), same_as(of_source),
    ),
    Row(
        "norm in float64", "a merge script computed in numpy", "D13", tiny(to.float64(r"model\.norm\.weight")),
        same_as(of_source),
    ),
    Row(
        "norm in float64, audited", "what loads passes here too", "D13", tiny(to.float64(r"model\.norm\.weight")),
        audited(), never=("FAULT",),
    ),
    Row(
        "matrix in float64", "the same kind, larger", "D13", tiny(to.float64(r"layers\.0\.mlp\.up_proj")),
        same_as(of_source),
    ),
    Row(
        "kv_b_proj packed, judged", "packed anew, its keys would be other weights than the release's", "ml-explore/mlx-lm#1451",
        tiny(to.packed_kv_b), gated("--layers", "0-1"), says=("agrees",), never=("FAULT",),
    ),
    Row(
        "index of another build", "the original's index copied beside the packed shards, which mlx-lm reads", "lablup/mlxcel#620",
        broken.stale_index, same_as(of_source),
    ),
    Row(
        "index of another build, audited", "HF does not load it: said", "lablup/mlxcel#620", broken.stale_index, audited(),
        says=("another build",), never=("FAULT",),
    ),
    Row(
        "MTP head alone, under the model's own config", "split off from a release", "jundot/omlx#2478",
        tiny(without(rf"^(?!model\.layers\.{MTP}\.)")), audited(), code=UNREADABLE, says=("MTP head alone",),
    ),
    Row(
        "kv_b_proj packed", "builds from before embed_q and unembed_out", "waybarrios/vllm-mlx#66", tiny(to.packed_kv_b),
        loaded,
    ),
    Row(
        "tables of angles", "rotary_emb.inv_freq, which older libraries save", "huggingface/transformers#46842",
        tiny(to.tables_of_angles), same_as(of_source),
    ),
    Row(
        "indexers on shared layers, loaded", "copies that the model never runs: the same model", "ggml-org/llama.cpp#25407",
        tiny(to.duplicated_indexers), same_as(of_source),
    ),
    Row(
        "indexers lost in conversion", "made by a library that knew no indexer", "intel/auto-round#1450",
        tiny(without(r"\.indexer\.")), loaded, code=UNREADABLE, says=("indexer",),
    ),
    Row(
        "download that stopped", "the last bytes of a shard are missing", "antirez/ds4#496", broken.cut_short, loaded,
        code=UNREADABLE, says=(r"model\.safetensors",),
    ),
    Row(
        "pointer of git lfs", "cloned without lfs: 130 bytes where 5 GB should be", "antirez/ds4#496", broken.lfs_pointer,
        loaded, code=UNREADABLE, says=(r"model\.safetensors",),
    ),
    Row(
        "shard of another download", "an older conversion's file beside a new index", "sgl-project/sglang#17166",
        broken.shard_left_over, loaded, code=UNREADABLE, says=("model-00001-of-00002",),
    ),
    Row(
        "shard that is not there", "the index names it; the folder does not have it", "antirez/ds4#496",
        broken.shard_missing, audited(), code=REFUSED, says=("model-00002-of-00002",),
    ),
    Row(
        "index that points outside", "a file of another folder", "sgl-project/sglang#17166", broken.index_outside, loaded,
        code=UNREADABLE, says=(r"\.\./model\.safetensors",),
    ),
    Row(
        "GGUF files alone", "pointed at the wrong repository", "antirez/ds4#496", broken.gguf_alone, loaded,
        code=UNREADABLE, says=("safetensors",),
    ),
    Row(
        "no weights", "config.json and tokenizer.json, the weights elsewhere", "antirez/ds4#496", broken.no_weights,
        audited(), code=UNREADABLE, says=("safetensors",),
    ),
    Row(
        "12 experts, and config.json knows", "pruned at birth", "vllm-project/llm-compressor#2864",
        small(n_routed_experts=12), loaded,
    ),
    Row(
        "kept checkpoint in shards", "what comes with this project, a card beside it", "D1",
        trained("interleaved", file("README.md", "a card")), audited(), never=("FAULT", "warning"),
    ),
]  # fmt: skip
