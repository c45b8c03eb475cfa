"""Recipes: planned, converted and audited alike, to the byte; and what is no recipe is refused in a line."""

import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
import torch
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import glm_dsa
from glm_dsa import Model, ModelArgs, weights
from glm_dsa.__main__ import main
from glm_dsa.errors import CheckpointError, RecipeError
from glm_dsa.model import parameters_of
from glm_dsa.planning import plan, recipe
from glm_dsa.planning.converting import ByRecipe
from reference import checkpoints
from verify.__main__ import main as verifying
from verify.audit import audit
from verify.engines import headers

pytestmark = pytest.mark.usefixtures("unregistered")

FOR = {"glm-5.2-3.5bit": checkpoints.packable, "glm-5.1-4.5bit": checkpoints.packable, "glm-4.7-flash-8-5bit": None}


def flash():
    wide = {
        "kv_lora_rank": 64, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64, "q_lora_rank": 64,
        "intermediate_size": 128, "moe_intermediate_size": 64, "vocab_size": 320,
    }  # fmt: skip
    return checkpoints.glm_4_7(**wide)


def config_of(name):
    return flash() if FOR[name] is None else FOR[name](num_hidden_layers=5, first_k_dense_replace=1)


def stored(folder):
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def faults(folder, rules):
    found = audit.audit(headers.headers_of(str(folder)), rules)
    return [f.what for f in found.findings if f.severity == audit.FAULT]


@pytest.fixture(scope="module", params=sorted(FOR))
def build(request, tmp_path_factory, unregistered):
    """(recipe's name, a small checkpoint converted with it by the command)."""
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    source = checkpoints.write_tokenizer(checkpoints.write(folder / "hf", config_of(name)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [])
        code = main(["convert", "--hf-path", str(source), "--mlx-path", str(folder / "mlx"), "--recipe", name])
    assert code == 0
    return name, folder / "mlx"


# -- converted


def test_kept_recipes_are_these():
    assert recipe.kept() == sorted(FOR)
    for name in FOR:
        assert len(recipe.load(name).purpose) > 20


def test_planned_bytes_are_the_files(build):
    """Of all tensors together, of each, and by component."""
    name, folder = build
    rules, args = recipe.load(name), ModelArgs.from_file(folder)
    formats, found = rules.formats(args, with_mtp=True), stored(folder)
    for spec in weights.module_inventory(args):
        parts = [found[part] for part in weights.stored_parts(spec.name, found)]
        assert formats[spec.name].nbytes(spec.shape) == sum(t.nbytes for t in parts), spec.name
    planned, there = plan.plan(folder, rules), plan.plan(folder)
    assert planned.components == there.components
    assert planned.mtp == there.mtp
    assert planned.main.nbytes + planned.mtp.nbytes == sum(t.nbytes for t in found.values())


def test_audit_accepts_the_build(build, capsys):
    name, folder = build
    assert faults(folder, recipe.load(name)) == []
    assert verifying(["audit", str(folder), "--recipe", name]) == 0
    assert "headers are as they should be" in capsys.readouterr().out


def test_the_build_runs_and_mlx_lm_loads_it_by_its_config(build, registered):
    """Bits a module stand in config.json: stock loading goes by them."""
    _, folder = build
    ours, (theirs, _) = glm_dsa.load(folder), mlx_lm.load(str(folder))
    tokens = mx.array([[5, 9, 31, 7, 8]])
    assert mx.isfinite(ours(tokens)).all()
    assert mx.array_equal(ours(tokens), theirs(tokens))
    said = json.loads((folder / "config.json").read_text())["quantization"]
    bits = {p: m.bits for p, m in ours.named_modules() if hasattr(m, "bits")}
    assert {p: said[p]["bits"] for p in bits} == bits


def test_audit_rejects_one_tensor_off(build, tmp_path):
    """Packed in other bits or groups, unpacked, in another dtype; scales, or biases alone, in another."""
    name, folder = build
    rules, args = recipe.load(name), ModelArgs.from_file(folder)
    formats = rules.formats(args, with_mtp=True)
    packed = next(n for n, f in formats.items() if f.is_packed and "o_proj" in n)
    plain = next(n for n, f in formats.items() if not f.is_packed and f.dtype == "bfloat16")
    path, kept = packed.removesuffix("weight"), formats[packed]
    others = {"bits": 8 if kept.bits < 8 else 4}
    changes = {
        "bits": lambda t: requantized(t, packed, kept, **others),
        "group": lambda t: requantized(t, packed, kept, group_size=32),
        "unpacked": lambda t: unpacked(t, packed, kept),
        "dtype": lambda t: t | {plain: t[plain].float()},
        "half": lambda t: t | {plain: t[plain].half()},
        "biases": lambda t: t | {f"{path}biases": t[f"{path}biases"].float()},
        "scales": lambda t: t | {f"{path}{part}": t[f"{path}{part}"].half() for part in ("scales", "biases")},
    }
    for what, change in changes.items():
        other = Path(shutil.copytree(folder, tmp_path / what))
        (file,) = other.glob("*.safetensors")
        save_file(change(load_file(file)), file, {"format": "mlx"})
        (other / "model.safetensors.index.json").unlink()
        found = [line for line in faults(other, rules) if line.startswith("recipe")]  # config.json is wrong then, too
        assert len(found) == 1, (what, found)
        assert (plain if what in ("dtype", "half") else packed) in found[0]
        assert f"recipe {name}" in found[0]
        assert ", expected " in found[0]


def changed(folder, to, change):
    """A build whose tensors are `change`d."""
    other = Path(shutil.copytree(folder, to))
    (file,) = other.glob("*.safetensors")
    save_file(change(load_file(file)), file, {"format": "mlx"})
    (other / "model.safetensors.index.json").unlink()
    return other


def test_audit_holds_what_is_named_otherwise(build, tmp_path):
    """Experts one by one, and kv_b_proj whole: loading takes both, convert writes neither, in whatever bits they are."""
    name, folder = build
    experts = re.compile(r"(.*\.mlp)\.switch_mlp\.(.*)")

    def apart(tensors):
        out = {}
        for n, t in tensors.items():
            match = experts.fullmatch(n)
            out |= {f"{match[1]}.experts.{e}.{match[2]}": t[e].clone() for e in range(len(t))} if match else {n: t}
        return out

    def whole(tensors):
        halves = ("embed_q", "unembed_out")
        out = {n: t for n, t in tensors.items() if not any(h in n for h in halves)}
        args = ModelArgs.from_file(folder)
        rows = args.num_attention_heads * (args.qk_nope_head_dim + args.v_head_dim)
        for layer in range(args.num_hidden_layers + 1):
            out[f"model.layers.{layer}.self_attn.kv_b_proj.weight"] = torch.zeros(rows, args.kv_lora_rank).bfloat16()
        return out

    for change, where in ((apart, "switch_mlp.up_proj"), (whole, "embed_q")):
        other = changed(folder, tmp_path / change.__name__, change)
        found = faults(other, recipe.load(name))
        assert any(where in what and "not there under this name" in what for what in found)
        assert not any("recipe" in what for what in faults(other, None))


@pytest.mark.parametrize(("mode", "part"), [("mxfp8", "biases"), ("affine", "global_scale"), ("nvfp4", "global_scale")])
def test_parts_that_a_mode_does_not_have(mode, part, tmp_path, monkeypatch):
    """Beside the head: audit says that the build does not load, and loading says it in a line."""
    monkeypatch.setattr("sys.argv", [])
    source = checkpoints.write_tokenizer(checkpoints.write(tmp_path / "hf", config_of("glm-5.1-4.5bit")))
    file, out = tmp_path / "r.toml", tmp_path / "mlx"
    file.write_text(f'[[rule]]\ncomponent = "head"\nmode = "{mode}"\n' + ("bits = 4\n" if mode == "affine" else ""))
    assert main(["convert", "--hf-path", str(source), "--mlx-path", str(out), "--recipe", str(file)]) == 0
    assert faults(out, recipe.load(file)) == []
    other = changed(
        out, tmp_path / "other", lambda t: t | {f"lm_head.{part}": torch.ones(320 if part == "biases" else 1)}
    )
    assert any("does not load" in what for what in faults(other, None))
    with pytest.raises(CheckpointError, match=f"lm_head.{part}"):
        glm_dsa.load(other)


def requantized(tensors, name, kept, **changes):
    path = name.removesuffix(".weight")
    parts = [mx.array(tensors[f"{path}.{p}"].view(torch.uint8).numpy()) for p in ("weight", "scales", "biases")]
    words, scales, biases = (p.view(mx.uint32 if i == 0 else mx.bfloat16) for i, p in enumerate(parts))
    plain = mx.dequantize(words, scales, biases, **kept.packing())
    new = mx.quantize(plain, **{**kept.packing(), **changes})
    views = [torch.from_numpy(np.array(p.view(mx.uint8))) for p in new]
    kinds = (torch.uint32, torch.bfloat16, torch.bfloat16)
    return tensors | {
        f"{path}.{p}": v.view(kind) for p, v, kind in zip(("weight", "scales", "biases"), views, kinds, strict=True)
    }


def unpacked(tensors, name, kept):
    path = name.removesuffix(".weight")
    rows = tensors[name].shape[0]
    width = tensors[f"{path}.scales"].shape[-1] * kept.group_size
    left = {n: t for n, t in tensors.items() if not n.startswith(f"{path}.")}
    return left | {name: torch.zeros(rows, width, dtype=torch.bfloat16)}


def test_a_recipe_is_for_mlx_builds(tmp_path, capsys):
    source = checkpoints.write(tmp_path / "hf", config_of("glm-5.1-4.5bit"))
    assert verifying(["audit", str(source), "--recipe", "glm-5.1-4.5bit"]) == 1
    assert "expected an MLX build (convert)" in capsys.readouterr().out


def test_another_models_recipe_is_refused_in_a_line(tmp_path, capsys):
    source = checkpoints.write(tmp_path / "hf", flash())
    assert verifying(["audit", str(source), "--recipe", "glm-5.2-3.5bit"]) in (0, 1)
    capsys.readouterr()
    assert main(["plan", str(source), "--recipe", "glm-5.2-3.5bit"]) == 10
    error = capsys.readouterr().err
    assert "rule 5 (indexer: fp16) matches no tensor of this model" in error
    assert error.count("\n") == 1


# -- conversion


def test_convert_refuses_options_that_a_recipe_decides(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [])
    source = checkpoints.write_tokenizer(checkpoints.write(tmp_path / "hf", checkpoints.packable(num_hidden_layers=4)))
    for extra in (["--q-bits", "4"], ["--dtype", "float16"], ["-d"], ["--q-mode", "mxfp4"], ["--q-group-size", "32"],
                  ["--quant-predicate", "mixed_3_6"]):  # fmt: skip
        out = tmp_path / "out"
        arguments = ["convert", "--hf-path", str(source), "--mlx-path", str(out), "--recipe", "glm-5.1-4.5bit", *extra]
        assert main(arguments) == 10, extra
        error = capsys.readouterr().err
        assert "conflict: a recipe says all of it" in error
        assert not out.exists()


def test_convert_refuses_before_it_reads_anything(tmp_path, capsys):
    assert main(["convert", "--hf-path", str(tmp_path), "--mlx-path", str(tmp_path / "o"), "--recipe", "none"]) == 10
    assert capsys.readouterr().err.startswith("glm-dsa: none: no recipe")


def test_convert_says_that_it_takes_recipes(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [])
    with pytest.raises(SystemExit, match="0"):
        main(["convert", "--help"])
    assert "--recipe R" in capsys.readouterr().out


def test_a_packed_source_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [])
    source = checkpoints.write_tokenizer(checkpoints.write(tmp_path / "hf", checkpoints.packable(num_hidden_layers=4)))
    once = ["convert", "--hf-path", str(source), "--mlx-path", str(tmp_path / "a"), "--recipe", "glm-5.1-4.5bit"]
    assert main(once) == 0
    again = [
        "convert",
        "--hf-path",
        str(tmp_path / "a"),
        "--mlx-path",
        str(tmp_path / "b"),
        "--recipe",
        "glm-5.1-4.5bit",
    ]
    assert main(again) == 10
    assert "is packed already" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def converted(tmp_path, text, **source):
    """(exit status, the build's tensors) of a checkpoint converted with this recipe."""
    folder = checkpoints.write(
        tmp_path / "hf", checkpoints.packable(num_hidden_layers=4, first_k_dense_replace=1), **source
    )
    checkpoints.write_tokenizer(folder)
    (tmp_path / "r.toml").write_text(text)
    arguments = ["--hf-path", str(folder), "--mlx-path", str(tmp_path / "mlx"), "--recipe", str(tmp_path / "r.toml")]
    code = main(["convert", *arguments])
    return code, stored(tmp_path / "mlx") if code == 0 else {}


def test_what_a_rule_keeps_in_more_bits_is_not_rounded_before(tmp_path, monkeypatch):
    """mlx-lm would cast everything to the recipe's own dtype first."""
    monkeypatch.setattr("sys.argv", [])
    text = '[[rule]]\ncomponent="indexer"\ndtype="float32"\n[[rule]]\ncomponent="attention"\ndtype="float16"'
    code, found = converted(tmp_path, text, dtype=torch.float32)
    assert code == 0
    source = stored(tmp_path / "hf")
    for name, dtype in (("self_attn.indexer.wk.weight", torch.float32), ("self_attn.o_proj.weight", torch.float16)):
        name = f"model.layers.0.{name}"
        assert torch.equal(found[name], source[name].to(dtype))
        assert not torch.equal(found[name], source[name].bfloat16().to(dtype))
    assert found["model.norm.weight"].dtype == torch.bfloat16


def test_values_beyond_float16_are_not_made_infinite(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [])
    folder = checkpoints.write(tmp_path / "hf", checkpoints.packable(num_hidden_layers=4, first_k_dense_replace=1))
    checkpoints.write_tokenizer(folder)
    name = "model.layers.0.self_attn.indexer.wk.weight"
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name][3, 5] = 1e5
            save_file(tensors, file, {"format": "pt"})
    arguments = ["--hf-path", str(folder), "--mlx-path", str(tmp_path / "mlx"), "--recipe", "glm-5.2-3.5bit"]
    assert main(["convert", *arguments]) == 10
    assert f"{name} has values beyond float16" in capsys.readouterr().err
    assert not (tmp_path / "mlx").exists()


def test_nothing_half_written_is_left_behind(tmp_path, capsys, monkeypatch):
    """By an error, or an interruption, while files are written: the same command can be given again."""
    import mlx_lm.utils

    monkeypatch.setattr("sys.argv", [])
    folder = checkpoints.write(tmp_path / "hf", checkpoints.packable(num_hidden_layers=4))
    checkpoints.write_tokenizer(folder)
    arguments = ["convert", "--hf-path", str(folder), "--mlx-path", str(tmp_path / "mlx")]
    for error, code in ((RuntimeError("Unable to write 134427 bytes"), 10), (KeyboardInterrupt(), 130)):

        def fails(path, *_, error=error, **__):
            Path(path).mkdir()
            (Path(path) / "model.safetensors").write_bytes(b"half")
            raise error

        for extra in (["-q"], ["--recipe", "glm-5.1-4.5bit"]):
            with monkeypatch.context() as patch:
                patch.setattr(mlx_lm.utils, "save_model", fails)
                assert main([*arguments, *extra]) == code
            assert not (tmp_path / "mlx").exists()
            capsys.readouterr()
    (tmp_path / "mlx").mkdir()
    assert main(arguments) == 10
    assert (tmp_path / "mlx").is_dir()  # what was there before is the user's


def test_a_finished_build_outlives_a_failing_upload(tmp_path, capsys, monkeypatch):
    import importlib

    def fails(*_):
        raise OSError("no network")

    monkeypatch.setattr("sys.argv", [])
    monkeypatch.setattr(importlib.import_module("mlx_lm.convert"), "upload_to_hub", fails)
    folder = checkpoints.write_tokenizer(checkpoints.write(tmp_path / "hf", checkpoints.packable(num_hidden_layers=4)))
    arguments = ["--hf-path", str(folder), "--mlx-path", str(tmp_path / "mlx"), "--recipe", "glm-5.1-4.5bit"]
    assert main(["convert", *arguments, "--upload-repo", "nobody/nothing"]) == 10
    assert "no network" in capsys.readouterr().err
    assert faults(tmp_path / "mlx", recipe.load("glm-5.1-4.5bit")) == []


def test_a_recipe_that_packs_nothing_leaves_no_word_of_packing(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", [])
    config = checkpoints.packable(num_hidden_layers=4) | {
        "quantization_config": {"quant_method": "fp8"},
        "dtype": "bfloat16",
    }
    folder = checkpoints.write_tokenizer(checkpoints.write(tmp_path / "hf", checkpoints.packable(num_hidden_layers=4)))
    (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "r.toml").write_text('dtype = "float16"\n[[rule]]\ncomponent = "norms"\ndtype = "float16"')
    arguments = ["--hf-path", str(folder), "--mlx-path", str(tmp_path / "mlx"), "--recipe", str(tmp_path / "r.toml")]
    assert main(["convert", *arguments]) == 0
    said = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert "quantization_config" not in said
    assert said["dtype"] == "float16"
    assert faults(tmp_path / "mlx", recipe.load(tmp_path / "r.toml")) == []


WIDE = ModelArgs.from_dict(checkpoints.packable(num_hidden_layers=4, first_k_dense_replace=1))
PACKINGS = st.one_of(
    st.builds(
        lambda b, g: f"bits = {b}\ngroup_size = {g}", st.sampled_from([2, 3, 4, 5, 6, 8]), st.sampled_from([32, 64])
    ),
    st.sampled_from(['mode = "mxfp4"', 'mode = "mxfp8"', 'mode = "nvfp4"', "bits = 4"]),
    st.builds(lambda d: f'dtype = "{d}"', st.sampled_from(["float32", "float16", "bfloat16"])),
)
PLACES = st.one_of(
    st.builds(
        lambda cs: f"component = {json.dumps(cs)}",
        st.lists(st.sampled_from(["embedding", "head", "attention", "indexer", "dense mlp", "experts", "shared experts", "mtp"]),
                 min_size=1, max_size=3, unique=True),
    ),
    st.sampled_from(['tensors = "*"', 'tensors = "*_proj.weight"', 'layers = "0-2"', 'layers = 3\ncomponent = "experts"']),
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@for_all(
    st.lists(st.tuples(PLACES, PACKINGS), min_size=1, max_size=5), st.sampled_from(["bfloat16", "float16", "float32"])
)
def test_any_recipe_makes_what_it_plans(rules, dtype):
    """Packed by mlx itself: of every tensor bits, groups, mode and bytes; what the last rule says, that was done."""
    text = f'dtype = "{dtype}"\n' + "".join(f"[[rule]]\n{place}\n{how}\n" for place, how in rules)
    import tomllib

    predicate = ByRecipe(recipe.parse(tomllib.loads(text), "any"))
    model = Model(WIDE)
    predicate.prepare(model)
    nn.quantize(model, class_predicate=lambda p, m: hasattr(m, "to_quantized") and predicate(p, m))
    predicate.check(model)
    found = parameters_of(model)
    components = plan.of_formats(WIDE, predicate.formats)
    assert sum(c.nbytes for c in components.values()) == sum(a.nbytes for a in found.values())
    assert found["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == mx.float32


def test_what_can_be_packed_is_what_has_a_packed_form():
    model = Model(WIDE)
    can = {f"{p}.weight" for p, m in model.named_modules() if hasattr(m, "to_quantized")}
    assert {s.name for s in weights.module_inventory(WIDE) if s.is_packable} == can
    assert {s.name: s.shape for s in weights.module_inventory(WIDE)} == {
        n: a.shape for n, a in parameters_of(model).items()
    }


def test_a_build_that_is_not_as_planned_is_not_written(monkeypatch):
    predicate = ByRecipe(recipe.load("glm-5.1-4.5bit"))
    model = Model(WIDE)
    predicate.prepare(model)
    with pytest.raises(RecipeError, match="were planned; nothing written"):
        predicate.check(model)


# -- what a recipe says


def parsed(text):
    import tomllib

    return recipe.parse(tomllib.loads(text), "r.toml")


def test_the_last_rule_that_matches_decides():
    rules = parsed(
        """
        [[rule]]
        tensors = "*"
        bits = 8
        [[rule]]
        component = "attention"
        bits = 4
        [[rule]]
        tensors = "*.o_proj.weight"
        layers = "1-2,4"
        dtype = "float32"
        """
    )
    formats = {n: str(f) for n, f in rules.formats(WIDE, True).items()}
    assert formats["model.layers.0.self_attn.o_proj.weight"] == "4 bit, groups of 64"
    assert formats["model.layers.1.self_attn.o_proj.weight"] == "fp32"
    assert formats["model.layers.4.self_attn.o_proj.weight"] == "fp32"  # the MTP layer
    assert formats["model.layers.0.self_attn.indexer.wk.weight"] == "8 bit, groups of 64"
    assert formats["model.layers.1.mlp.gate.weight"] == "bf16"  # the router cannot be packed, and is passed by
    assert formats["model.norm.weight"] == "bf16"


def test_parts_of_the_mtp_layer_follow_the_rules_of_their_kind():
    rules = parsed('[[rule]]\ncomponent="experts"\nbits=3\n[[rule]]\ncomponent="attention"\nbits=4')
    formats = {n: str(f) for n, f in rules.formats(WIDE, True).items()}
    assert formats["model.layers.4.mlp.switch_mlp.up_proj.weight"] == "3 bit, groups of 64"
    assert formats["model.layers.4.eh_proj.weight"] == "bf16"
    rules = parsed('[[rule]]\ncomponent="experts"\nbits=3\n[[rule]]\ncomponent="mtp"\nbits=8')
    formats = {n: str(f) for n, f in rules.formats(WIDE, True).items()}
    assert formats["model.layers.4.mlp.switch_mlp.up_proj.weight"] == "8 bit, groups of 64"
    assert formats["model.layers.3.mlp.switch_mlp.up_proj.weight"] == "3 bit, groups of 64"


BAD = {
    '[[rule]]\ncomponent = "mla"\nbits = 4': r"rule 1: unknown component 'mla'; known are embedding",
    '[[rule]]\ncomponent = "experts"\nbits = 7': r"rule 1: bits = 7: expected one of 2, 3, 4, 5, 6, 8",
    '[[rule]]\ncomponent = "experts"\nbits = "4"': r"rule 1: bits = '4'",
    '[[rule]]\ncomponent = "experts"\nbits = true': r"rule 1: bits = True",
    '[[rule]]\ncomponent = "experts"\nbits = 4\ngroup_size = 48': r"group_size = 48: expected one of 32, 64, 128",
    '[[rule]]\ncomponent = "experts"\nbits = 4\ngroup_size = 128': r"gate_proj.weight has rows of 64, which groups of 128",
    '[[rule]]\ncomponent = "experts"\nbits = 3\nmode = "mxfp4"': r"bits = 3 and mode 'mxfp4' conflict",
    '[[rule]]\ncomponent = "experts"\nmode = "mxfp5"': r"mode 'mxfp5': expected one of affine, mxfp4, mxfp8, nvfp4",
    '[[rule]]\ncomponent = "experts"\nbits = 4\ndtype = "float16"': r"dtype and bits conflict",
    '[[rule]]\ncomponent = "experts"\ndtype = "fp16"': r"dtype = 'fp16': expected one of float32, bfloat16, float16",
    '[[rule]]\ncomponent = "experts"': r"expected bits .* or dtype",
    '[[rule]]\ncomponent = "experts"\ngroup_size = 64': r"expected bits .* or dtype",
    "[[rule]]\nbits = 4": r"what is it for\?",
    '[[rule]]\ncomponent = "experts"\nbit = 4': r"unknown key 'bit'",
    '[[rule]]\ntensors = "*.no_proj.weight"\nbits = 4': r"matches no tensor of this model",
    '[[rule]]\ncomponent = "experts"\nlayers = "0"\nbits = 4': r"matches no tensor of this model",
    '[[rule]]\ncomponent = "experts"\nlayers = "9-3"\nbits = 4': r"from the lower number to the higher",
    '[[rule]]\ncomponent = "experts"\nlayers = "some"\nbits = 4': r"layers = 'some': expected numbers and ranges",
    '[[rule]]\ncomponent = "experts"\nlayers = 1.5\nbits = 4': r"layers = 1.5",
    '[[rule]]\ncomponent = "router"\nbits = 8': r"mlp.gate.weight cannot be packed",
    '[[rule]]\ncomponent = ["attention", "norms"]\nbits = 8': r"layernorm.weight cannot be packed",
    '[[rule]]\ntensors = "*correction_bias"\ndtype = "bfloat16"': r"is kept in float32, always",
    '[[rule]]\ntensors = 3\nbits = 4': r"tensors = 3: expected a pattern",
    '[[rule]]\ncomponent = [3]\nbits = 4': r"component = \[3\]",
    '[[rule]]\ncomponent = "experts"\nmode = ["mxfp4"]': r"mode \['mxfp4'\]: expected one of",
    '[[rule]]\ncomponent = "experts"\nmode = "mxfp4"\nbits = 4.0': r"bits = 4.0 and mode 'mxfp4' conflict",
    '[[rule]]\ncomponent = "experts"\nbits = ' + "9" * 5000: r"not valid TOML",
    "name = 0x" + "f" * 5000 + "\n[[rule]]": r"not valid TOML",
    "[[rule]]\ncomponent = []\nbits = 4": r"component = \[\]: expected a name",
    '[[rule]]\ncomponent = "experts"\nlayers = "3,7-500"\nbits = 4': r"layers 3, 7-500: .*: layer 500; the last of this model is 4",
    '[[rule]]\ncomponent = ["experts", "dense mlp"]\nlayers = "1-3"\nbits = 4': r"of component dense mlp nothing matches",
    "[[rule]]\n" * 5000: r"5,000 rules; a recipe has at most",
    "rule = 3": r"no rules",
    "": r"no rules",
    "x = 1": r"unknown key 'x'",
    "name = 3\n[[rule]]": r"name = 3: expected a text",
    "dtype = 'int8'\n[[rule]]": r"dtype = 'int8'",
    "[[rule": r"not valid TOML",
}  # fmt: skip


@pytest.mark.parametrize("text", sorted(BAD))
def test_bad_recipes_are_one_line_that_says_what_and_where(text, tmp_path, capsys):
    file, config = tmp_path / "r.toml", tmp_path / "config.json"
    file.write_text(text)
    config.write_text(json.dumps(checkpoints.packable(num_hidden_layers=4, first_k_dense_replace=1)))
    assert main(["plan", str(config), "--recipe", str(file)]) == 10
    error = capsys.readouterr().err
    assert error.startswith(f"glm-dsa: {file}: ")
    assert re.search(BAD[text], error), error
    assert error.count("\n") == 1


def test_files_that_are_no_recipes(tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(checkpoints.packable()))
    binary = tmp_path / "b.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    large = tmp_path / "l.toml"
    large.write_bytes(b"#" * (recipe.LARGEST + 1))
    for file, said in ((tmp_path, "no recipe"), (binary, "not valid TOML"), (large, "a recipe has at most")):
        assert main(["plan", str(config), "--recipe", str(file)]) == 10
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
