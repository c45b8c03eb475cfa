"""Configs that cannot be right are refused by name; contested conventions are resolved in their order."""

import pytest

from glm_dsa import ConfigError, ModelArgs
from glm_dsa.config import describe_schedule
from glm_dsa.config_reader import is_number, parse_json, read_json
from reference import checkpoints

BASE = checkpoints.tiny()


def args(**changes):
    return ModelArgs.from_dict({**BASE, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"new_key": 1}, r"'new_key'.*neither handled"),
        ({"model_type": "llama"}, r"model_type = 'llama': allowed are"),
        ({"hidden_size": 0}, r"hidden_size = 0: expected a whole number of at least 1"),
        ({"hidden_size": 64.5}, r"hidden_size = 64\.5"),
        ({"hidden_size": True}, r"hidden_size = True"),
        ({"model_type": None}, r"model_type is null: expected one of"),
        ({"hidden_size": None}, r"hidden_size is null: expected a whole number"),
        ({"rms_norm_eps": 0}, r"rms_norm_eps = 0: expected a finite number above 0"),
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
        ({"rope_parameters": {"rope_type": "default"}}, r"rope_theta is missing"),
        ({"rope_theta": 5.0}, r"rope_theta = 5.0, but rope_parameters says 8000000"),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "llama3"}}, r"rope_type = 'llama3': allowed"),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn"}}, r"missing \['factor', 'original_max"),
        ({"rope_parameters": {"rope_theta": 1e6, "factor": 2}}, r"\['factor'\] have no meaning"),
        ({"rope_parameters": "default"}, r"rope_parameters = 'default': expected an object"),
        ({"indexer_types": ["full"] * 7}, r"7 entries for num_hidden_layers = 8"),
        ({"indexer_types": ["shared"] + ["full"] * 7}, r"layer 0 is shared"),
        ({"indexer_types": ["half"] * 8}, r"a list of 'full' and 'shared'"),
        ({"index_topk_pattern": "FSX" * 3}, r"only the letters F"),
        ({"index_topk_freq": 0}, r"index_topk_freq = 0"),
        ({"index_topk_freq": 4, "index_skip_topk_offset": 0}, r"layer 0 is shared"),
        ({"indexer_rope_interleave": "yes"}, r"indexer_rope_interleave = 'yes': expected true or false"),
        ({"mlp_layer_types": ["dense"] * 3}, r"mlp_layer_types: expected 8 entries"),
        ({"num_nextn_predict_layers": 2}, r"num_nextn_predict_layers = 2: 0 or 1"),
        ({"model_type": "glm4_moe_lite"}, r"index_topk: glm4_moe_lite has no indexer"),
    ],
    ids=str,
)  # fmt: skip
def test_impossible_values_are_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        args(**changes)


def test_a_config_that_is_no_object():
    with pytest.raises(ConfigError, match="list; expected an object"):
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


@pytest.mark.parametrize(
    ("override", "is_allowed"),
    [
        ({"indexer_norm_eps": 1e-5}, True), ({"indexer_norm_eps": 0}, False), ({"indexer_norm_eps": 1.0}, False),
        ({"latent_norm_eps": 1.5}, False), ({"latent_norm_eps": "1e-6"}, False), ({"latent_norm_eps": True}, False),
        ({"index_topk": 1}, True), ({"index_topk": 0}, False), ({"index_topk": True}, False), ({"index_topk": 2.0}, False),
        ({"main_rope": "half-split"}, True), ({"main_rope": None}, True), ({"main_rope": ""}, False),
        ({"indexer_types": ("full",) * 8}, True), ({"indexer_types": "full"}, False), ({"indexer_types": ["full"]}, False),
        ({"indexer_types": ["shared"] * 8}, False), ({"mtp_reuses_selection": 1}, False),
        ({"mtp_zero_first_embedding": True}, True), ({"mtp_zero_first_embedding": 0}, False),
    ],
    ids=str,
)  # fmt: skip
def test_overrides(override, is_allowed):
    if not is_allowed:
        with pytest.raises(ConfigError):
            ModelArgs.from_dict(BASE, **override)
        return
    (name, due), resolved = next(iter(override.items())), ModelArgs.from_dict(BASE, **override)
    if due is None:
        assert resolved == args()
    else:
        assert getattr(resolved, name) == due
        shown = "indexer_schedule" if name == "indexer_types" else name
        assert value(resolved, shown) == ("all full" if name == "indexer_types" else due, "override")


def test_a_topk_of_the_checkpoints_own_is_no_convention():
    assert "index_topk" not in {c.name for c in args().conventions}


# What is meant where zai-org's configs say nothing.
MEANT = {
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "attention_bias": False, "norm_topk_prob": True, "n_group": 1,
    "topk_group": 1, "num_nextn_predict_layers": 0, "n_shared_experts": 1, "mtp_zero_first_embedding": False,
    "routed_scaling_factor": 2.5, "mlp_layer_types": ("dense",) * 3 + ("sparse",) * 5, "indexer_types": ("full",) * 8,
}  # fmt: skip


@pytest.mark.parametrize("key", MEANT)
def test_what_is_meant_by_silence(key):
    silent = ModelArgs.from_dict({k: v for k, v in BASE.items() if k != key})
    assert getattr(silent, key) == MEANT[key]
    assert silent == args(**{key: None})  # null counts as missing, as in HF


def test_what_is_contested_says_why():
    assert contested(args(), "latent_norm_eps").endswith("rms_norm_eps = 1e-05")
    assert contested(args(rms_norm_eps=None), "latent_norm_eps").endswith("rms_norm_eps = 1e-05")
    assert not contested(args(rms_norm_eps=1e-6), "latent_norm_eps")
    assert not contested(args(), "main_rope")
    assert contested(args(rope_interleave=False), "main_rope") == (
        "HF never reads this key here, and turns interleaved pairs"
    )
    flash = {**checkpoints.glm_4_7(), "rope_interleave": False}
    assert value(ModelArgs.from_dict(flash), "main_rope") == ("half-split", "key rope_interleave")
    assert not contested(ModelArgs.from_dict(flash), "main_rope")
    neither = {**BASE, "indexer_rope_traditional": True, "indexer_rope_interleave": False}
    assert contested(ModelArgs.from_dict(neither), "indexer_rope") == (
        "indexer_rope_traditional = True but indexer_rope_interleave = False"
    )


def test_what_is_contested_of_drafts():
    assert contested(args(), "mtp_zero_first_embedding") == "vLLM zeroes the embedding at position 0"
    assert not contested(args(mtp_zero_first_embedding=True), "mtp_zero_first_embedding")
    assert not contested(args(num_nextn_predict_layers=0), "mtp_zero_first_embedding")
    assert not contested(args(), "mtp_reuses_selection")
    assert "engines differ" in contested(args(index_share_for_mtp_iteration=True), "mtp_reuses_selection")
    flash = ModelArgs.from_dict(checkpoints.glm_4_7())
    assert not flash.mtp_reuses_selection
    assert "mtp_reuses_selection" not in {c.name for c in flash.conventions}
    assert flash.mtp_owns_embeddings
    assert value(flash, "mtp_hidden") == ("after the shared-head norm", "default")
    assert not args().mtp_owns_embeddings


def test_which_layers_are_what():
    """Of 8 layers 3 are dense; the MTP layer, number 8, has experts and an indexer of its own."""
    shared = args(indexer_types=["full", *["shared"] * 7])
    assert [shared.is_sparse(i) for i in range(9)] == [False] * 3 + [True] * 6
    assert [shared.runs_indexer(i) for i in range(9)] == [True, *[False] * 7, True]
    flash = ModelArgs.from_dict(checkpoints.glm_4_7())
    assert not flash.runs_indexer(0)
    assert flash.indexer_norm_eps == 1e-6
    assert (flash.index_topk, flash.index_n_heads, flash.index_head_dim, flash.indexer_types) == (0, 0, 0, ())


def test_json_that_is_not_read(tmp_path):
    file = tmp_path / "config.json"
    for text, message in (
        (f'{{"a": {"1" * 60}}}', "67 bytes; expected a JSON file of at most 66 bytes"), ("[1]", "list; expected a JSON object"),
        ('{"b":1,"a":1,"a":2}', "the key 'a' comes twice"), ("{", "not valid JSON"),
    ):  # fmt: skip
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_json(file, 66)
    file.write_text(f'{{"a": {"1" * 59}}}')
    assert read_json(file, 66) == {"a": int("1" * 59)}
    file.write_text('{"a": {"__float__": "Infinity"}, "b": {"__float__": "1"}, "c": {"__float__": "NaN", "d": 1}}')
    found = read_json(file)
    assert found["a"] == float("inf")
    assert (found["b"], found["c"]) == ({"__float__": "1"}, {"__float__": "NaN", "d": 1})
    with pytest.raises(ConfigError, match=r"nowhere.json: No such file"):
        read_json(tmp_path / "nowhere.json")
    with pytest.raises(ConfigError, match="no regular file"):
        read_json(tmp_path)


def test_a_convention_in_words():
    known = {str(c) for c in args().conventions}
    assert "indexer_norm_eps = 1e-06 (default)" in known
    assert "mtp_zero_first_embedding = False (default); CONTESTED: vLLM zeroes the embedding at position 0" in known


def test_numbers_that_fit():
    assert is_number(10**15)
    assert not is_number(10**15 + 1)
    assert is_number(1e300)


def test_json_of_too_many_parts():
    assert parse_json(b'{"a": [[]]}', 3 * 32) == {"a": [[]]}
    with pytest.raises(ValueError, match="3 objects and lists; expected at most 2"):
        parse_json(b'{"a": [[]]}', 3 * 32 - 1)
    with pytest.raises(ValueError, match="nested too deep"):
        parse_json(b"[" * 100_000 + b"]" * 100_000, 1 << 25)


YARN = {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("changes", "is_allowed"),
    [
        ({"hidden_size": 1 << 24}, True), ({"hidden_size": (1 << 24) + 1}, False), ({"num_hidden_layers": 257}, False),
        ({"vocab_size": 1}, True), ({"rms_norm_eps": 1e-30}, True), ({"rms_norm_eps": 9e-31}, False),
        ({"routed_scaling_factor": 1e9}, True), ({"routed_scaling_factor": 1.1e9}, False),
        ({"routed_scaling_factor": 10**15}, False), ({"rms_norm_eps": True}, False),
        ({"rope_parameters": {"rope_theta": 1.0}}, False), ({"rope_parameters": {"rope_theta": 1.5}}, True),
        ({"rope_parameters": {"rope_theta": 1e9}}, True), ({"rope_parameters": {"rope_theta": 2e9}}, False),
        ({"rope_parameters": {"rope_theta": 10**16}}, False), ({"rope_parameters": {"rope_theta": True}}, False),
        ({"rope_theta": 8000000}, True), ({"rope_parameters": {"rope_theta": 1e6, "type": "default"}}, True),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, False),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 1.0}}, True),
        ({"rope_parameters": YARN}, True), ({"rope_parameters": {**YARN, "factor": 1}}, True),
        ({"rope_parameters": {**YARN, "factor": 0.5}}, False), ({"rope_parameters": {**YARN, "factor": 2e9}}, False),
        ({"rope_parameters": {**YARN, "original_max_position_embeddings": 0.5}}, False),
        ({"rope_parameters": {**YARN, "beta_fast": 0}}, True), ({"rope_parameters": {**YARN, "beta_fast": -1}}, False),
        ({"rope_parameters": {**YARN, "mscale": "1"}}, False), ({"rope_parameters": {**YARN, "truncate": 1}}, False),
        ({"rope_parameters": {**YARN, "truncate": False}}, True), ({"rope_parameters": {**YARN, "low": 1}}, False),
        ({"qk_head_dim": None}, True), ({"qk_head_dim": 28.0}, False), ({"num_key_value_heads": None}, True),
        ({"n_routed_experts": 1024}, True), ({"n_routed_experts": 1025}, False),
        ({"n_routed_experts": 1, "num_experts_per_tok": 1}, True), ({"num_experts": 16}, True), ({"num_experts": 15}, False),
        ({"n_routed_experts": 2, "n_group": 2, "topk_group": 2, "num_experts_per_tok": 2}, False),
        ({"mlp_bias": 0}, False), ({"moe_layer_freq": True}, False), ({"hidden_act": None}, True),
        ({"n_group": 8, "topk_group": 2}, True), ({"num_experts_per_tok": 16}, True), ({"index_topk_freq": 1}, True),
        ({"index_skip_topk_offset": 0}, True), ({"index_skip_topk_offset": -1}, False), ({"index_head_dim": 16}, True),
        ({"indexer_types": ["full"] * 9}, True), ({"indexer_types": ["full"] * 8 + ["shared"]}, False),
        ({"indexer_types": ["full"] * 10}, False), ({"first_k_dense_replace": -1}, False),
        ({"num_nextn_predict_layers": 0}, True), ({"num_nextn_predict_layers": -1}, False),
    ],
    ids=str,
)  # fmt: skip
def test_where_values_end(changes, is_allowed):
    if is_allowed:
        args(**changes)
    else:
        with pytest.raises(ConfigError):
            args(**changes)
