"""`python -m glm_dsa plan`: to the byte what was published, what files hold, and what a cache takes."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import gguf as theirs
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch

from glm_dsa import Model, ModelArgs, tiles, weights
from glm_dsa.__main__ import main
from glm_dsa.errors import ConfigError, RecipeError
from glm_dsa.planning import gguf, plan, recipe
from glm_dsa.planning.converting import ByRecipe
from reference import checkpoints
from tests.builds import write_build
from verify.audit import audit
from verify.engines import headers

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "verify" / "configs"
GIB = 2**30
MIXED = r"""
# attention first: of two rules that match, the first decides
blk\..*\.attn_.*=q8_0
blk\..*\.ffn_(gate|up|down)_shexp\.weight=iq6_k, blk\..*\.ffn_(gate|up|down)\.weight=iq6_k
blk\.78\.ffn_(gate|up|down)_exps\.weight=iq6_k
blk\..*\.ffn_(gate|up|down)_exps\.weight=iq4_k
token_embd\.weight=iq6_k,output\.weight=iq6_k
blk\..*\.indexer\..*=q8_0
blk\..*\.nextn\..*=q8_0
"""
CAUTIOUS = r"blk\..*\.indexer\..*=q8_0"


def asked(capsys, *arguments):
    assert main(["plan", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments):
    assert main(["plan", *map(str, arguments)]) == 10
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


# -- what was published


def test_glm_5_2_at_three_and_a_half_bits(capsys):
    found = asked(capsys, CONFIGS / "glm-5.2.json", "--recipe", "glm-5.2-3.5bit", "--kv-bits", 8)
    main_model, cache = found["without_mtp"], found["cache"]
    assert main_model["parameters"] == 743_377_019_904
    assert (round(main_model["bits"], 3), round(main_model["gb"], 2), round(main_model["gib"], 2)) == (
        3.535,
        328.48,
        305.92,
    )
    assert round(cache["latents_bytes"] / 1e9, 1) == 50.1
    assert round(cache["index_keys_bytes"] / 1e9, 1) == 5.6
    assert found["memory"]["total_bytes"] < 512e9
    assert found["machines"]["512"]["within_default"]
    assert found["machines"]["512"]["rest_bytes"] == (512 << 30) - found["memory"]["total_bytes"]
    assert not found["machines"]["256"]["holds"]


@pytest.mark.parametrize(
    ("context", "bits", "gb"), [("1M", 16, 94.2), ("1000000", 16, 89.9), ("1M", 8, 50.1), ("1000000", 8, 47.7)]
)
def test_the_cache_of_a_million_tokens(context, bits, gb, capsys):
    found = asked(capsys, CONFIGS / "glm-5.2.json", "--context", context, "--kv-bits", bits)
    assert round(found["cache"]["latents_bytes"] / 1e9, 1) == gb


def test_glm_4_7_flash_at_eight_and_five_bits(capsys):
    found = asked(capsys, CONFIGS / "glm-4.7-flash.json", "--recipe", "glm-4.7-flash-8-5bit")["without_mtp"]
    assert (round(found["bits"], 3), round(found["gib"], 2)) == (5.718, 19.93)


def test_glm_5_1_bits_from_bytes_and_at_most_so_many(capsys):
    config = CONFIGS / "glm-5.1.json"
    found = asked(capsys, config, "--recipe", "glm-5.1-4.5bit", "--size", "392.992GiB")
    assert found["without_mtp"]["parameters"] == 743_911_218_432
    assert found["without_mtp"]["bits"] <= 4.54
    assert any("4.538 bits per weight" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("options", "gib", "bits"),
    [
        (["--gguf", "bf16"], 1404.406, 16.003),
        (["--gguf", "Q8_0"], 746.302, 8.504),
        (["--custom-q", MIXED], 405.502, 4.621),
    ],
)
def test_the_gguf_of_glm_5_1(options, gib, bits, capsys):
    found = asked(capsys, CONFIGS / "glm-5.1.json", *options)["with_mtp"]
    assert (found["tensors"], found["parameters"]) == (1809, 753_864_139_008)
    assert (round(found["gib"], 3), round(found["bits"], 3)) == (gib, bits)


# -- GGUF: types, names, rules


def test_types_are_those_of_the_gguf_package():
    known = {kind.name.lower(): size for kind, size in theirs.GGML_QUANT_SIZES.items()}
    ours = {name.lower(): (kind.block, kind.nbytes) for name, kind in gguf.TYPES.items()}
    assert known == ours
    assert all(kind.row == 0 for kind in gguf.TYPES.values())


@pytest.mark.parametrize(
    ("kind", "bits"),
    [("iq1_kt", 1.75), ("iq2_ks", 2.1875), ("iq2_kl", 2.6875), ("iq3_ks", 3.1875), ("iq4_ks", 4.25), ("iq5_ks", 5.25),
     ("iq4_k", 4.5), ("iq5_k", 5.5), ("iq6_k", 6.625)],
)  # fmt: skip
def test_ik_llamas_types_have_the_bits_that_it_publishes(kind, bits):
    """bpw as its README has them, and besides a scale a row where the type has one."""
    found = gguf.IK_TYPES[kind]
    assert found.nbytes * 8 / found.block == bits
    rows = {"iq1_kt": 4, "iq2_ks": 2, "iq2_kl": 2, "iq3_ks": 2, "iq4_ks": 4, "iq5_ks": 4}
    assert found.row == rows.get(kind, 0)
    assert found.of((3, 5, 512)) == 15 * (found.row + 2 * found.nbytes)


def test_names_are_those_of_the_gguf_package():
    """Of what both know: its map from HF's names (experts merged, kv_b split as its converter does)."""
    args = ModelArgs.from_file(CONFIGS / "glm-5.1.json")
    names = theirs.get_tensor_name_map(theirs.MODEL_ARCH.GLM_DSA, args.num_hidden_layers + 1)
    renamed = {"switch_mlp": "experts", "embed_q": "k_b_proj", "unembed_out": "v_b_proj"}
    seen = 0
    for spec in weights.module_inventory(args):
        layer = weights.LAYER.fullmatch(spec.name)
        if spec.name.endswith("e_score_correction_bias"):
            assert gguf.name_of(spec.name).endswith(".exp_probs_b.bias")
            continue
        path, _, suffix = spec.name.rpartition(".")
        for mine, hf in renamed.items():
            path = path.replace(mine, hf)
        if (
            layer
            and int(layer[1]) >= args.num_hidden_layers
            and spec.part in ("mtp", "norms")
            and "layernorm" not in path
        ):
            continue  # nextn: below
        assert names.get_name(path) + f".{suffix}" == gguf.name_of(spec.name), spec.name
        seen += 1
    assert seen > 1700
    nextn = {theirs.TENSOR_NAMES[t].format(bid=78) for t in theirs.MODEL_TENSOR if t.name.startswith("NEXTN")}
    mine = {s.name.removesuffix(".weight") for s in gguf.inventory(args) if "nextn" in s.name}
    assert mine <= nextn
    assert len(mine) == 4


def test_the_first_rule_that_matches_decides():
    args = ModelArgs.from_file(CONFIGS / "glm-5.2.json")
    kinds = {s.name: gguf.stored_as(s, gguf.rules_of(MIXED))[0] for s in gguf.inventory(args)}
    assert kinds["blk.78.ffn_up_exps.weight"] == "iq6_k"  # the rule for all layers comes later
    assert kinds["blk.77.ffn_up_exps.weight"] == "iq4_k"
    assert kinds["blk.3.ffn_gate_inp.weight"] == kinds["blk.0.attn_norm.weight"] == "f32"
    assert kinds["blk.3.exp_probs_b.bias"] == "f32"
    kinds = {
        s.name: gguf.stored_as(s, gguf.rules_of("ffn=q4_K,ffn_down=q8_0", "q6_K"))[0] for s in gguf.inventory(args)
    }
    assert kinds["blk.0.ffn_down.weight"] == "q4_K"
    assert kinds["output.weight"] == "q6_K"


def test_rows_that_no_block_divides_are_of_another_type_and_that_is_said(capsys):
    """attn_k_b has rows of 192 (qk_nope): ik_llama.cpp puts q5_0 there for iq4_k."""
    found = asked(capsys, CONFIGS / "glm-5.1.json", "--custom-q", ".*=iq4_k")
    assert any("q5_0 instead (blk.0.attn_k_b.weight" in note for note in found["notes"])
    assert found["components"]["attention"]["formats"]["q5_0"] == 78


def test_what_rules_leave_open_is_said(capsys):
    found = asked(capsys, CONFIGS / "glm-5.1.json", "--custom-q", "blk\\.99\\.=q8_0," + CAUTIOUS)
    notes = "\n".join(found["notes"])
    assert r"'blk\\.99\\.' decides for no tensor" in notes
    assert "no rule names" in notes
    assert "bf16" in notes


def test_rules_as_people_write_them(tmp_path):
    """Spaces, comments behind a rule, Windows' line ends, a byte order mark; of a pattern that comes twice the second is idle."""
    due = (("ffn_.*_exps", "q8_0"), ("attn_k_b", "q4_K"))
    written = "# all\r\n  ffn_.*_exps = Q8_0   # was ffn=q4_0\r\n\r\nattn_k_b=q4_k,\r\n"
    assert gguf.rules_of(written).rules == due
    file = tmp_path / "rules"
    file.write_bytes(b"\xef\xbb\xbf" + written.encode())
    assert gguf.rules_of(str(file)).rules == due
    args = ModelArgs.from_file(CONFIGS / "glm-5.1.json")
    notes = gguf.planned(args, gguf.rules_of("_exps=q8_0,_exps=q4_K,[[a]exps=q8_0"))[1]
    assert sum("'_exps' decides for no tensor" in note for note in notes) == 1


# As Thireus' GGUF Tool Suite writes recipes (a heading, f32 for what is f32 anyway, repacked types), and as its benchmark
# has the same rules (in quotes, locked).
RECIPE = r"""## Model head & embeddings — qbits: 32 8
^output_norm\.weight$=f32
'^token_embd\.weight$=bf16=locked'
"^output\.weight$=Q8_0",
'^blk\.0\.attn_norm\.weight$'=f32=locked

## Multi-headed attention parameters
^blk\.([0-9]|[1-6][0-9]|7[0-8])\.attn_.*\.weight$=iq4_xs
# ffn_down_exps — qbits: 1
^blk\.([3-9]|[1-6][0-9]|7[0-8])\.ffn_down_exps\.weight$=iq1_m_r4
'_(gate|up)_exps=iq5_k_r4', '\.ffn_[a-z]{2,4}\.=q6_K'
## Summary
# GPU Total: 11.744 GiB (95.1%)

## THE END!
"""


def test_recipes_of_thireus_are_read():
    rules = gguf.rules_of(RECIPE)
    assert [kind for _, kind in rules.rules] == [
        "f32", "bf16", "q8_0", "f32", "iq4_xs", "iq1_m_r4", "iq5_k_r4", "q6_K",
    ]  # fmt: skip
    assert rules.rules[-1][0] == r"\.ffn_[a-z]{2,4}\."  # a comma in quotes parts nothing
    notes = gguf.planned(ModelArgs.from_file(CONFIGS / "glm-5.1.json"), rules)[1]
    assert not any("decides for no tensor" in note for note in notes)  # f32 for a norm is what it is


def test_a_rule_for_what_is_f32_whatever_it_says_is_told_of():
    rules = gguf.rules_of("attn_norm=q8_0,blk=q6_K")
    notes = gguf.planned(ModelArgs.from_file(CONFIGS / "glm-5.1.json"), rules)[1]
    assert sum("decides for no tensor" in note for note in notes) == 1


def test_repacked_types_take_their_own_bytes():
    """bpw as ik_llama.cpp publishes it; of all but two as the plain type."""
    assert gguf.ALL["iq5_k_r4"] == gguf.ALL["iq5_k"]
    assert gguf.ALL["iq1_m_r4"].of((256, 6144)) == 256 * (6144 * 1.75 // 8 + 2)
    assert gguf.ALL["iq1_s_r4"].of((256, 6144)) == 256 * (6144 * 1.5 // 8 + 2)
    args = ModelArgs.from_file(CONFIGS / "glm-5.1.json")
    odd = next(s for s in gguf.inventory(args) if s.name == "blk.0.attn_k_b.weight")  # rows of 192
    assert (
        gguf.stored_as(odd, gguf.rules_of(".=iq4_k_r4"))[0]
        == gguf.stored_as(odd, gguf.rules_of(".=iq4_k"))[0]
        == "q5_0"
    )


@pytest.mark.parametrize("pattern", ["^(a|b|[a-z0-9._]+)+Z", "(.*)*Z", ".*.*.*.*.*.*.*.*Z"])
def test_a_pattern_that_backtracks_for_ever_ends_within_a_second_and_is_named(pattern, tmp_path, capsys):
    file = tmp_path / "rules.txt"
    file.write_text(f"attn=q8_0\n{pattern}=q4_K\nffn=q8_0\n")
    begun = resource.getrusage(resource.RUSAGE_CHILDREN)
    error = refused(capsys, CONFIGS / "glm-5.1.json", "--custom-q", file)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)  # of computing, whatever else this machine does
    assert 0.3 < ended.ru_utime + ended.ru_stime - begun.ru_utime - begun.ru_stime < 1
    assert str(file) in error
    assert repr(pattern) in error


def test_what_is_tried_is_what_would_be_found():
    """By a process of its own, all names at once, as by a name at a time."""
    names = [spec.name for spec in gguf.inventory(ModelArgs.from_file(CONFIGS / "glm-5.1.json"))]
    for said in (RECIPE, MIXED, CAUTIOUS, "nothing=q8_0"):
        rules = gguf.rules_of(said)
        tried = rules.tried(names)
        assert tried == rules
        assert [tried.type_of(name) for name in names] == [rules.type_of(name) for name in names]


def test_patterns_that_could_backtrack_and_do_not_are_followed():
    args = ModelArgs.from_file(CONFIGS / "glm-5.1.json")
    many = "\n".join(f"^blk\\.{i}\\.(.*_)*(exps|shexp)\\..*.*=q6_K" for i in range(300))
    assert gguf.planned(args, gguf.rules_of(many))[0]["experts"].told().startswith("q6_K")


def test_rules_from_a_file(tmp_path, capsys):
    file = tmp_path / "rules.txt"
    file.write_text(MIXED)
    found = asked(capsys, CONFIGS / "glm-5.1.json", "--custom-q", file)
    assert round(found["with_mtp"]["gib"], 3) == 405.502


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ("blk(=q8_0", "no regular expression"),
        ("blk=q9_9", "unknown type 'q9_9'"),
        ("nothing", "a file of rules, or PATTERN=TYPE"),
        ("", "--custom-q: empty"),
        ("a=i8", "i8 keeps whole numbers"),
        ("=q8_0", "expected PATTERN=TYPE"),
        (" # =q8_0\n", "no rules"),
        ("'blk=q8_0", "a quote that is not closed"),
        ("blk=locked", "expected PATTERN=TYPE"),
        ("f32=locked", "expected PATTERN=TYPE"),
        ("a" * 5000 + "=q8_0", "4,096 at most"),
        ("blk{1,2}=q8_0", "expected PATTERN=TYPE"),  # there too, commas part rules
    ],
)
def test_bad_rules_are_one_line(rules, said, capsys):
    assert said in refused(capsys, CONFIGS / "glm-5.1.json", "--custom-q", rules)


def test_a_block_that_divides_no_row_and_has_nothing_in_its_place(tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(checkpoints.tiny(num_hidden_layers=4)))  # rows of 12 and 48
    error = refused(capsys, config, "--gguf", "q8_0")
    assert "blocks of 32 (q8_0)" in error


# -- builds on disk, of any size


@pytest.mark.parametrize(
    ("config", "name"),
    [("glm-5.2", "glm-5.2-3.5bit"), ("glm-5.1", "glm-5.1-4.5bit"), ("glm-4.7-flash", "glm-4.7-flash-8-5bit")],
)
@pytest.mark.parametrize("with_mtp", [False, True])
def test_a_build_of_full_size_has_the_bytes_that_were_planned(config, name, with_mtp, tmp_path, capsys):
    """Its headers name 300 GB and more; `plan` counts them, `audit --recipe` accepts them."""
    params = json.loads((CONFIGS / f"{config}.json").read_text())
    args, rules = ModelArgs.from_dict(params), recipe.load(name)
    folder = write_build(tmp_path / "build", params, rules.formats(args, with_mtp))
    planned, stored = asked(capsys, CONFIGS / f"{config}.json", "--recipe", name), asked(capsys, folder)
    assert stored["without_mtp"] == planned["without_mtp"]
    assert stored["components"] == planned["components"]
    assert stored["mtp"] == (planned["mtp"] if with_mtp else None)
    found = audit.audit(headers.headers_of(str(folder)), rules)
    assert [f.what for f in found.findings if f.severity == audit.FAULT] == []
    assert found.nbytes == stored["with_mtp"]["bytes"]


def test_an_fp8_release_is_loaded_unpacked(tmp_path, capsys):
    source = checkpoints.write(tmp_path / "plain", checkpoints.packable(num_hidden_layers=4))
    checkpoints.write_fp8(source, tmp_path / "fp8", tmp_path / "again")
    found, plain = asked(capsys, tmp_path / "fp8"), asked(capsys, source)
    assert "fp8" in found["components"]["experts"]["formats"]
    assert found["without_mtp"]["bytes"] < plain["without_mtp"]["bytes"]
    assert found["memory"]["weights_bytes"] == plain["memory"]["weights_bytes"]


def test_a_config_alone_that_says_packed(tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(checkpoints.packable() | {"quantization": {"bits": 4, "group_size": 64}}))
    assert "give the build's folder, or --recipe" in refused(capsys, config)
    assert asked(capsys, config, "--recipe", "glm-5.1-4.5bit")["without_mtp"]["bits"] < 16
    found = asked(capsys, CONFIGS / "glm-5.2-fp8.json")
    assert "loading unpacks it" in found["notes"][0]


def test_a_folder_with_a_tensor_missing(tmp_path, capsys):
    params = checkpoints.packable(num_hidden_layers=4)
    formats = recipe.load("glm-5.1-4.5bit").formats(ModelArgs.from_dict(params), False)
    del formats["model.layers.3.mlp.gate.weight"]
    write_build(tmp_path / "build", params, formats)
    assert "model.layers.3.mlp.gate.weight: missing" in refused(capsys, tmp_path / "build")


def test_a_build_of_another_config_is_refused(tmp_path, capsys):
    params = checkpoints.packable(num_hidden_layers=4)
    formats = recipe.load("glm-5.1-4.5bit").formats(ModelArgs.from_dict(params), False)
    for change, said in (
        ({"vocab_size": 32000}, "model.embed_tokens.weight is [320, 12]: expected [32000, 12]"),
        ({"moe_intermediate_size": 4096}, "does config.json belong to these weights?"),
    ):
        folder = write_build(tmp_path / said[:9], params, formats)
        (folder / "config.json").write_text(json.dumps(params | change))
        assert said in refused(capsys, folder)


def test_tensors_too_many_are_said_and_not_counted(tmp_path, capsys):
    folder = checkpoints.write(tmp_path / "hf", checkpoints.packable(num_hidden_layers=4))
    before = asked(capsys, folder)
    checkpoints.add_shard(folder, "model-more.safetensors", {"model.layers.0.extra.weight": torch.zeros(3)})
    after = asked(capsys, folder)
    assert "model.layers.0.extra.weight" in after["notes"][0]
    assert after["with_mtp"] == before["with_mtp"]


def test_a_gguf_of_a_build_without_mtp_has_none(tmp_path, capsys):
    params = checkpoints.packable(num_hidden_layers=4)
    formats = recipe.load("glm-5.1-4.5bit").formats(ModelArgs.from_dict(params), False)
    assert asked(capsys, write_build(tmp_path / "build", params, formats), "--gguf", "bf16")["mtp"] is None


def test_what_is_published_in_a_packing_that_is_not_read(tmp_path, capsys):
    config = tmp_path / "config.json"
    for method in ("awq", {"a": []}):
        config.write_text(json.dumps(checkpoints.packable() | {"quantization_config": {"quant_method": method}}))
        assert "give --recipe" in refused(capsys, config)


# -- memory


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_the_cache_planned_is_the_cache_that_is_there(bits):
    """Bytes a token of real caches, in 16 bit, MTP's too."""
    args = ModelArgs.from_dict(checkpoints.packable())
    model = Model(args)
    model.set_dtype(mx.bfloat16)
    kv = {} if bits == 16 else {"kv_bits": bits}
    caches = [*model.make_cache(**kv), model.make_mtp_cache(**kv)]
    tokens = 256  # a whole step of their buffers
    for cache in caches:
        cache.append(mx.zeros((1, tokens, cache.widths.latent + cache.widths.rope), mx.bfloat16))
        if cache.has_indexer:
            cache.append_index_keys(mx.zeros((1, tokens, cache.widths.index), mx.bfloat16))
    found = plan.Cache.of(args, tokens, bits)
    main_model = caches[:-1]
    assert found.latents == sum(c.latents.nbytes for c in main_model)
    assert found.index_keys == sum(c.index_keys.nbytes for c in main_model)
    assert found.mtp == caches[-1].latents.nbytes + caches[-1].index_keys.nbytes


@pytest.mark.parametrize(
    ("dtype", "rules", "item", "index_item"),
    [
        ("float32", 'component = "norms"\ndtype = "float32"', 4, 4),
        ("bfloat16", 'component = "norms"\ndtype = "float32"', 4, 2),  # one float32 tensor, and all behind it is
        ("bfloat16", 'component = "attention"\ndtype = "float16"', 4, 2),  # two that meet make float32
        ("bfloat16", 'component = "indexer"\ndtype = "float32"', 2, 4),
        ("bfloat16", 'component = "indexer"\ndtype = "float16"', 2, 2),
        ("bfloat16", 'component = "router"\ndtype = "float32"', 2, 2),
        ("float16", 'component = "experts"\nbits = 4', 2, 2),
    ],
)
def test_the_cache_is_kept_in_what_the_model_runs_in(dtype, rules, item, index_item, tmp_path, capsys):
    args = ModelArgs.from_dict(checkpoints.packable(num_hidden_layers=4))
    file, config = tmp_path / "r.toml", tmp_path / "config.json"
    file.write_text(f'dtype = "{dtype}"\n[[rule]]\n{rules}\n')
    config.write_text(json.dumps(checkpoints.packable(num_hidden_layers=4)))
    predicate, model = ByRecipe(recipe.load(file)), Model(args)
    predicate.prepare(model)
    nn.quantize(model, class_predicate=lambda p, m: hasattr(m, "to_quantized") and predicate(p, m))
    caches = model.make_cache()
    mx.eval(model(mx.arange(3, 259)[None], caches))
    found = asked(capsys, config, "--recipe", file, "--context", 256)
    assert found["cache"]["latents_bytes"] == sum(c.latents.nbytes for c in caches)
    assert found["cache"]["index_keys_bytes"] == sum(c.index_keys.nbytes for c in caches)
    assert {c.latents.plain.buffers[0].dtype.size for c in caches} == {item}
    assert {c.index_keys.buffers[0].dtype.size for c in caches if c.has_indexer} == {index_item}
    assert any("float32" in note for note in found["notes"]) == (item == 4)


def test_scales_of_one_byte_say_nothing_of_the_dtype(tmp_path, capsys):
    """mxfp4 in a model in float16: it runs in 16 bit."""
    params = checkpoints.packable(num_hidden_layers=4)
    (tmp_path / "r.toml").write_text('dtype = "float16"\n[[rule]]\ncomponent = "experts"\nmode = "mxfp4"')
    formats = recipe.load(tmp_path / "r.toml").formats(ModelArgs.from_dict(params), False)
    assert asked(capsys, write_build(tmp_path / "build", params, formats))["cache"]["kept"] == "16 bit"


@pytest.mark.parametrize(("chunk", "elements"), [(128, 1 << 18), (64, 1 << 20)])
def test_prefill_takes_no_more_than_is_said(chunk, elements, monkeypatch):
    """And no less than a twelfth: a plan's other figures are exact, this one is a bound."""
    monkeypatch.setitem(tiles.ELEMENTS, mx.DeviceType.cpu, elements)
    config = json.loads((ROOT / "verify" / "bench" / "eighth.json").read_text())
    args = ModelArgs.from_dict(
        config | {"num_hidden_layers": 4, "n_routed_experts": 16, "vocab_size": 320, "index_topk": 256}
    )
    model = Model(args)
    mx.eval(model.parameters())
    caches, context = model.make_cache(), 2048
    for cache in caches:
        cache.append(mx.random.normal((1, context, cache.widths.latent + cache.widths.rope)))
        if cache.has_indexer:
            cache.append_index_keys(mx.random.normal((1, context, cache.widths.index)))
        mx.eval(cache.latents.plain.buffers, cache.index_keys.buffers)
    tokens = mx.random.randint(3, 320, (1, chunk))
    mx.eval(tokens)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(model.logits(model.model(tokens, caches)[:, -1:]))
    most = plan.prefill_bytes(args, chunk, elements, item=4)
    assert most / plan.IN_FLIGHT <= mx.get_peak_memory() - before <= 1.25 * most


def test_index_keys_of_an_indexer_in_16_bit_stay_so_beside_other_dtypes():
    """An indexer in float16 in a model in bfloat16: what both make is float32, and would take twice the cache."""
    model = Model(ModelArgs.from_dict(checkpoints.packable(num_hidden_layers=4)))
    model.set_dtype(mx.bfloat16)
    model.model.layers[0].self_attn.indexer.set_dtype(mx.float16)
    cache = model.make_cache()
    model(mx.array([[5, 6, 7]]), cache)
    assert cache[0].index_keys.buffers[0].dtype == mx.float16
    assert cache[1].index_keys.buffers[0].dtype == mx.bfloat16


# -- the command


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--context", "0"], "--context 0: expected a number of tokens"),
        (["--context", "1T"], "--context 1T"),
        (["--kv-bits", "7"], "--kv-bits 7: expected 16, or one of"),
        (["--size", "much"], "--size much: expected bytes"),
        (["--chunk", "0"], "--chunk 0"),
        (["--recipe", "no-such"], "no-such: no recipe"),
        (["--recipe", "glm-5.1-4.5bit", "--gguf", "q8_0"], "expected one of both"),
        (["--gguf", "q0"], "--gguf: unknown type 'q0'"),
        (["--gguf", "Q4_K_M"], "--gguf: Q4_K_M is a mixture of types, which llama-quantize chooses; expected one type, q4_K say"),
        (["--gguf", "IQ3_M"], "--gguf: IQ3_M is a mixture of types, which llama-quantize chooses; expected one type, iq3_xxs say"),
        (["--gguf", ""], "--gguf: unknown type ''"),
        (["--gguf", "i64"], "--gguf: i64 keeps whole numbers"),
        (["--size", "0.000001"], "--size 0.000001: expected bytes"),
        (["--recipe", "glm-4.7-flash-8-5bit", "--custom-q", "a=q8_0"], "expected one of both"),
    ],
)
def test_bad_options_are_one_line(options, said, capsys):
    assert said in refused(capsys, CONFIGS / "glm-5.2.json", *options)


def test_bad_configs_are_one_line(tmp_path, capsys):
    assert "No such file" in refused(capsys, tmp_path / "none.json")
    config = tmp_path / "config.json"
    config.write_text(json.dumps(checkpoints.tiny(num_hidden_layers=0)))
    assert "num_hidden_layers = 0" in refused(capsys, config)
    config.write_text(json.dumps(checkpoints.tiny()))  # rotary keys of 16
    assert "keep this cache unquantized" in refused(capsys, config, "--kv-bits", 8)


def test_as_a_process_the_output_may_be_cut_short():
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m glm_dsa plan verify/configs/glm-5.2.json | head -1"],
        capture_output=True, text=True, cwd=ROOT, timeout=60, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.startswith("verify/configs/glm-5.2.json: glm_moe_dsa, unpacked, bfloat16")
    assert done.stderr == ""


def test_text_and_json_say_the_same(capsys):
    arguments = [str(CONFIGS / "glm-5.2.json"), "--recipe", "glm-5.2-3.5bit", "--kv-bits", "8"]
    found = asked(capsys, *arguments)
    assert main(["plan", *arguments]) == 0
    text = capsys.readouterr().out
    for name, component in found["components"].items():
        row = next(line for line in text.splitlines() if line.startswith(f"{name}  "))
        assert f"{component['parameters']:,}" in row
        assert f"{component['bits']:.3f}" in row
        assert {f"{component['bytes'] / 1e9:.2f}", f"{component['bytes'] / GIB:.3f}"} <= set(row.split())
    for sold, fits in found["machines"].items():
        rests = [line.split()[2] for line in text.splitlines() if line.startswith(f"{sold} GB")]
        assert rests == ([f"{fits['rest_bytes'] / 1e9:.1f}"] if fits["holds"] else [])
    assert f"{found['memory']['total_bytes'] / 1e9:.2f}" in text
    assert sum(c["bytes"] for c in found["components"].values()) == found["without_mtp"]["bytes"]
    assert found["with_mtp"]["bytes"] == found["without_mtp"]["bytes"] + found["mtp"]["bytes"]


def test_errors_are_of_this_package():
    with pytest.raises(RecipeError):
        plan.tokens("many")
    with pytest.raises(ConfigError):
        plan.plan(Path("/nowhere/config.json"))
    assert np.isclose(plan.nbytes("1.5 GiB"), 1.5 * GIB)
