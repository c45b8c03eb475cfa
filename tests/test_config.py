"""Configs that cannot be right are refused by name; contested conventions are resolved in their order."""

import pytest

from glm_dsa import ConfigError, ModelArgs
from glm_dsa.config import describe_schedule
from reference import checkpoints

BASE = checkpoints.tiny()


def args(**changes):
    return ModelArgs.from_dict({**BASE, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"new_key": 1}, r"'new_key'.*neither handled"),
        ({"model_type": "llama"}, r"model_type = 'llama': allowed are"),
        ({"hidden_size": 0}, r"hidden_size = 0: a whole number of at least 1"),
        ({"hidden_size": 64.5}, r"hidden_size = 64\.5"),
        ({"hidden_size": True}, r"hidden_size = True"),
        ({"hidden_size": None}, r"hidden_size is missing"),
        ({"rms_norm_eps": 0}, r"rms_norm_eps = 0: a finite number above 0"),
        ({"rms_norm_eps": float("nan")}, r"rms_norm_eps = nan"),
        ({"qk_rope_head_dim": 15, "qk_head_dim": 27}, r"qk_rope_head_dim = 15.*even"),
        ({"qk_head_dim": 30}, r"qk_head_dim = 30: must equal qk_nope_head_dim \+ qk_rope_head_dim = 28"),
        ({"num_key_value_heads": 2}, r"num_key_value_heads = 2: must equal num_attention_heads"),
        ({"index_head_dim": 8}, r"index_head_dim = 8: must hold the rotary part"),
        ({"n_group": 3}, r"n_group = 3: must divide"),
        ({"n_group": 16}, r"n_group = 16: must divide n_routed_experts = 16 into groups of 2"),
        ({"n_group": 4, "topk_group": 5}, r"topk_group = 5: at most n_group = 4"),
        ({"n_group": 8, "topk_group": 1}, r"num_experts_per_tok = 4: at most the 2 experts"),
        ({"num_experts_per_tok": 17}, r"num_experts_per_tok = 17"),
        ({"hidden_act": "gelu"}, r"hidden_act = 'gelu': this architecture has 'silu'"),
        ({"scoring_func": "softmax"}, r"scoring_func = 'softmax'"),
        ({"topk_method": "greedy"}, r"topk_method = 'greedy'"),
        ({"mlp_bias": True}, r"mlp_bias = True"),
        ({"moe_layer_freq": 2}, r"moe_layer_freq = 2"),
        ({"rope_parameters": {"rope_type": "default"}}, r"rope_theta = None"),
        ({"rope_theta": 5.0}, r"rope_theta = 5.0, but rope_parameters says 8000000"),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "llama3"}}, r"rope_type = 'llama3': allowed"),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn"}}, r"missing \['factor', 'original_max"),
        ({"rope_parameters": {"rope_theta": 1e6, "factor": 2}}, r"\['factor'\] have no meaning"),
        ({"rope_parameters": "default"}, r"rope_parameters = 'default': an object"),
        ({"indexer_types": ["full"] * 7}, r"7 entries for num_hidden_layers = 8"),
        ({"indexer_types": ["shared"] + ["full"] * 7}, r"layer 0 is shared"),
        ({"indexer_types": ["half"] * 8}, r"a list of 'full' and 'shared'"),
        ({"index_topk_pattern": "FSX" * 3}, r"only the letters F"),
        ({"index_topk_freq": 0}, r"index_topk_freq = 0"),
        ({"index_topk_freq": 4, "index_skip_topk_offset": 0}, r"layer 0 is shared"),
        ({"indexer_rope_interleave": "yes"}, r"indexer_rope_interleave = 'yes': true or false"),
        ({"mlp_layer_types": ["dense"] * 3}, r"mlp_layer_types: 8 entries"),
        ({"num_nextn_predict_layers": 2}, r"num_nextn_predict_layers = 2: 0 or 1"),
        ({"model_type": "glm4_moe_lite"}, r"index_topk: glm4_moe_lite has no indexer"),
    ],
    ids=str,
)  # fmt: skip
def test_impossible_values_are_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        args(**changes)


def test_a_config_that_is_no_object():
    with pytest.raises(ConfigError, match="list where an object"):
        ModelArgs.from_dict([])


def value(resolved, name):
    return next((c.value, c.source) for c in resolved.conventions if c.name == name)


def contested(resolved, name):
    return next(c.contested for c in resolved.conventions if c.name == name)


@pytest.mark.parametrize(
    ("keys", "layout", "source", "is_contested"),
    [
        ({}, "half-split", "default", True),
        ({"indexer_rope_interleave": True}, "interleaved", "key indexer_rope_interleave", False),
        ({"indexer_rope_interleave": False}, "half-split", "key indexer_rope_interleave", True),
        ({"indexer_rope_traditional": True}, "interleaved", "key indexer_rope_traditional", False),
        ({"indexer_rope_traditional": False, "indexer_rope_interleave": True}, "half-split", "key indexer_rope_traditional", True),
        ({"indexer_rope_traditional": True, "indexer_rope_interleave": False}, "interleaved", "key indexer_rope_traditional", True),
    ],
    ids=str,
)  # fmt: skip
def test_indexer_rope(keys, layout, source, is_contested):
    """The build's own key beats zai-org's; a layout that speaks against the evidence is called contested."""
    config = {k: v for k, v in BASE.items() if k != "indexer_rope_interleave"} | keys
    resolved = ModelArgs.from_dict(config)
    assert value(resolved, "indexer_rope") == (layout, source)
    assert bool(contested(resolved, "indexer_rope")) == is_contested
    overridden = ModelArgs.from_dict(config, indexer_rope="interleaved")
    assert value(overridden, "indexer_rope") == ("interleaved", "override")


def test_defaults_of_the_eps():
    assert args().indexer_norm_eps == 1e-6
    assert args().latent_norm_eps == 1e-6
    assert args(indexer_norm_eps=1e-5).indexer_norm_eps == 1e-5
    assert args(latent_norm_eps=1e-5).latent_norm_eps == 1e-5
    assert contested(args(), "latent_norm_eps")
    assert not contested(args(latent_norm_eps=1e-5), "latent_norm_eps")


def test_schedule_keys_that_contradict_each_other_are_contested():
    types = ["full"] * 8
    resolved = args(indexer_types=types, index_topk_freq=4, index_skip_topk_offset=3)
    assert value(resolved, "indexer_schedule") == ("all full", "key indexer_types")
    assert contested(resolved, "indexer_schedule") == "index_topk_freq says otherwise"
    assert (
        describe_schedule(args(index_topk_freq=4, index_skip_topk_offset=3).indexer_types) == "4 of 8 full: 0, 1, 2, 6"
    )


def test_unknown_overrides_are_refused():
    with pytest.raises(ConfigError, match="override 'eps' is not known; allowed: indexer_rope"):
        ModelArgs.from_dict(BASE, eps=1)
    with pytest.raises(ConfigError, match="indexer_rope = 'neox'"):
        ModelArgs.from_dict(BASE, indexer_rope="neox")


def test_head_dim_is_not_the_rotary_width():
    """64 in GLM-5.1, 192 in GLM-5.2: the key is redundant there, and never read."""
    assert args(head_dim=192) == args(head_dim=16) == args()


def test_args_are_frozen():
    with pytest.raises(AttributeError):
        args().hidden_size = 1
