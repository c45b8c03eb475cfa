"""Config and schedules: what zai-org published is parsed as HF parses it, and its tensors are counted."""

import dataclasses
import math
from collections import Counter
from typing import Any

import pytest
import torch

import glm_dsa
from glm_dsa.config_reader import read_json
from glm_dsa.model import parameters_of
from reference import checkpoints, hf
from reference.stored import read_tensors
from verify import FOLDER
from verify.cases import Case

CLAIM = "config and schedules"
CONFIGS = FOLDER / "configs"
GLM_5_2 = [0, 1, 2, *range(6, 75, 4)]

# tensors and parameters as published (59,585 in zai-org/GLM-5.2's index; FP8 block scales are not counted)
PUBLISHED = {
    "glm-5": (59_870, 753_864_139_008),
    "glm-5.1": (59_870, 753_864_139_008),
    "glm-5.2": (59_585, 753_329_940_480),
    "glm-5.2-fp8": (59_585, 753_329_940_480),
    "glm-4.7-flash": (9_703, 31_221_488_576),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(judge, name):
    raw = read_json(CONFIGS / f"{name}.json")
    args = glm_dsa.ModelArgs.from_dict(raw)
    built = hf.config_for(raw)
    full = [i for i in range(args.num_hidden_layers) if args.runs_indexer(i)]
    if args.has_indexer:
        theirs = [i for i, t in enumerate(built.indexer_types) if t == "full"]
        judge.holds(
            name, "indexer schedule", full == theirs, f"full layers as in HF ({len(full)} of {args.num_hidden_layers})"
        )
        judge.holds(
            name,
            "indexer rope",
            args.indexer_rope == "interleaved",
            "the published key says interleaved, and is obeyed",
        )
    if name.startswith("glm-5.2"):
        judge.holds(name, "indexer schedule", full == GLM_5_2, "21 of 78 layers are full: 0, 1, 2, 6, 10, ..., 74")
    judge.holds(
        name, "mlp types", list(args.mlp_layer_types) == list(built.mlp_layer_types), "dense and sparse layers as in HF"
    )
    rope = built.rope_parameters
    judge.holds(
        name, "rope theta", args.rope_theta == rope["rope_theta"], f"theta as HF reads it ({rope['rope_theta']})"
    )
    specs = list(glm_dsa.inventory(args))
    counted = len(specs), sum(math.prod(s.shape) for s in specs)
    judge.holds(name, "inventory", counted == PUBLISHED[name], f"{counted[0]:,} tensors, {counted[1]:,} parameters")


@pytest.mark.parametrize(("frequency", "offset"), [(4, 3), (4, 2), (3, 1), (2, 4), (1, 2)])
def test_a_schedule_by_frequency_and_offset(judge, frequency, offset):
    """Where no list of types stands beside them."""
    config = checkpoints.tiny(num_hidden_layers=12, index_topk_freq=frequency, index_skip_topk_offset=offset)
    ours, theirs = glm_dsa.ModelArgs.from_dict(config).indexer_types, hf.config_for(config).indexer_types
    name = f"every {frequency} from {offset}"
    judge.holds(name, "indexer schedule", list(ours) == list(theirs), f"full and shared layers as in HF: {theirs}")


def test_parameters_as_hf_builds_them(judge):
    """HF's own modules, on the meta device, at GLM-5.2's real size: an independent count, all but MTP."""
    raw = read_json(CONFIGS / "glm-5.2.json")
    with torch.device("meta"):
        model = hf.build(raw)
    theirs = sum(p.numel() for p in model.parameters()) + sum(
        b.numel() for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")
    )
    ours = sum(math.prod(s.shape) for s in glm_dsa.inventory(glm_dsa.ModelArgs.from_dict(raw)) if s.component != "mtp")
    judge.holds("glm-5.2", "inventory", ours == theirs, f"as many parameters as HF builds: {theirs:,} without MTP")


def test_inventory_is_what_hf_wrote(case: Case, judge):
    """Names and shapes, one by one, of the checkpoint on disk."""
    written = read_tensors(case.folder)
    found = {name: tuple(written(name).shape) for name in written.names}
    due = {s.name: s.shape for s in glm_dsa.inventory(case.args) if case.spec.has_mtp or s.component != "mtp"}
    differing = sorted(set(found.items()) ^ set(due.items()))[:4]
    expected = f"{len(due)} names and shapes as HF wrote them (differing: {differing})"
    judge.holds(case.name, "inventory", found == due, expected)


def test_inventory_is_what_the_modules_hold(case: Case, judge):
    """The count and the loader cannot drift apart: the same parameters, under the modules' names."""
    modules: Counter = Counter()
    for name, value in parameters_of(case.ours.model).items():
        modules["mtp" if glm_dsa.weights.is_mtp(case.args, name) else "main"] += value.size
    counted: Counter = Counter()
    for spec in glm_dsa.inventory(case.args):
        counted["mtp" if spec.component == "mtp" else "main"] += math.prod(spec.shape)
    if not case.spec.has_mtp:
        del counted["mtp"]
    judge.holds(case.name, "parameters", modules == counted, f"{dict(counted)} parameters")


def test_a_config_as_hf_saves_it(case: Case, judge, tmp_path):
    """transformers writes more keys than zai-org, and drops some: what it saves must mean the same model."""
    case.hf.config.save_pretrained(tmp_path)
    dropped = ("indexer_rope_interleave", "num_nextn_predict_layers")
    kept = {k: case.config[k] for k in dropped if k in case.config}
    saved = glm_dsa.ModelArgs.from_dict({**read_json(tmp_path / "config.json"), **kept}, **case.spec.overrides)
    same = dataclasses.replace(saved, conventions=case.args.conventions) == case.args
    judge.holds(case.name, "config", same, "the same arguments from HF's own config.json")


OPTIONAL = (
    "tie_word_embeddings", "attention_bias", "norm_topk_prob", "n_group", "topk_group", "routed_scaling_factor", "rms_norm_eps",
    "first_k_dense_replace", "n_shared_experts", "moe_layer_freq", "num_key_value_heads", "rope_interleave",
    "index_skip_topk_offset", "index_topk_freq",
)  # fmt: skip


@pytest.mark.parametrize("key", OPTIONAL)
@pytest.mark.parametrize("base", ["glm-5.2", "glm-4.7"])
def test_a_missing_key_means_what_hf_takes_it_for(judge, base, key):
    """transformers drops keys as it saves."""
    config = {
        k: v for k, v in (checkpoints.glm_5_2() if base == "glm-5.2" else checkpoints.glm_4_7()).items() if k != key
    }
    args, built = glm_dsa.ModelArgs.from_dict(config), hf.config_for(config)
    names = (
        "tie_word_embeddings", "attention_bias", "norm_topk_prob", "n_group", "topk_group", "routed_scaling_factor",
        "rms_norm_eps", "n_shared_experts",
    )  # fmt: skip
    ours = {name: getattr(args, name) for name in names} | {
        "mlp": list(args.mlp_layer_types),
        "types": list(args.indexer_types),
    }
    ours["interleave"] = args.main_rope == "interleaved"
    theirs = {name: getattr(built, name) for name in names} | {"mlp": list(built.mlp_layer_types)}
    theirs |= {
        "types": list(getattr(built, "indexer_types", [])),
        "interleave": getattr(built, "rope_interleave", True),
    }
    judge.holds(f"{base} without {key}", "config", ours == theirs, f"as HF fills it in (ours {ours}, HF {theirs})")


YARN = {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 0.7}
Said = tuple[dict[str, Any], str, Any]
SAID: dict[str, Said] = {  # what a config may say beside zai-org's keys, or instead: (changes, argument, what it then is)
    "an MLX build's key": ({"indexer_rope_traditional": True, "indexer_rope_interleave": None}, "indexer_rope", "interleaved"),
    "an MLX build's, false": ({"indexer_rope_traditional": False, "indexer_rope_interleave": None}, "indexer_rope", "half-split"),
    "an MLX build's key against zai-org's": ({"indexer_rope_traditional": False}, "indexer_rope", "half-split"),
    "neither": ({"indexer_rope_interleave": None}, "indexer_rope", "half-split"),
    "zai-org's key, false": ({"indexer_rope_interleave": False}, "indexer_rope", "half-split"),
    "k_norm's eps": ({"indexer_norm_eps": 1e-5}, "indexer_norm_eps", 1e-5),
    "the latents' eps": ({"latent_norm_eps": 1e-5}, "latent_norm_eps", 1e-5),
    "drafts that reuse": ({"index_share_for_mtp_iteration": True}, "mtp_reuses_selection", True),
    "drafts that do not": ({"index_share_for_mtp_iteration": False}, "mtp_reuses_selection", False),
    "a first embedding of zero": ({"mtp_zero_first_embedding": True}, "mtp_zero_first_embedding", True),
    "a pattern against the rule": ({"num_hidden_layers": 4, "index_topk_pattern": "FSSF", "index_topk_freq": 2}, "indexer_types",
                                   ("full", "shared", "shared", "full")),
    "types against a pattern": ({"num_hidden_layers": 2, "indexer_types": ["full", "full"], "index_topk_pattern": "FS"},
                                "indexer_types", ("full", "full")),
    "types with the MTP layer's": ({"num_hidden_layers": 2, "indexer_types": ["full", "shared", "full"]}, "indexer_types",
                                   ("full", "shared")),
    "a scaling in older words": ({"rope_parameters": None, "rope_theta": 1e6, "rope_scaling": {"type": "yarn", **YARN}},
                                 "rope_scaling", {"rope_type": "yarn", **YARN}),
}  # fmt: skip


@pytest.mark.parametrize("said", SAID)
def test_what_a_config_says(judge, said):
    """Keys of other builds, older words, and which of two that contradict each other counts."""
    changes, name, due = SAID[said]
    found = getattr(glm_dsa.ModelArgs.from_dict(checkpoints.tiny(**changes)), name)
    judge.holds(said, "config", found == due, f"{name} = {due} (found: {found})")
