"""Layouts that people have: each reads as the plain checkpoint that it was made from, here and in the oracle; damaged, each is
refused by the name of a tensor."""

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import glm_dsa
from glm_dsa import checkpoint, layouts, storage
from glm_dsa.__main__ import main
from glm_dsa.errors import CheckpointError
from glm_dsa.model import parameters_of
from reference import checkpoints, hf
from reference.stored import read_tensors
from verify import cases
from verify.engines.definition_streamed import OurLayers
from verify.engines.headers import headers_of

CONFIG = checkpoints.packable(
    num_hidden_layers=2, first_k_dense_replace=1, n_routed_experts=4, moe_intermediate_size=128, hidden_size=128
)
LAYER = CONFIG["num_hidden_layers"]  # of the MTP layer
MTP = f"model.layers.{LAYER}."
SPARSE = "model.layers.1.mlp"


def written(folder, tensors, config, file="model.safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / file, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """{form: (tensors, config)} of one checkpoint: bf16 and FP8 as HF has them, packed as mlx-lm has it."""
    root = tmp_path_factory.mktemp("plain")
    checkpoints.write(root / "hf", CONFIG, shard_size="1GB")
    checkpoints.write_fp8(root / "hf", root / "fp8", root / "meant")
    model = glm_dsa.load(root / "hf")
    nn.quantize(model, 64, 4, class_predicate=lambda _, m: hasattr(m, "to_quantized"))
    (root / "packed").mkdir()
    mx.save_safetensors(str(root / "packed" / "model.safetensors"), parameters_of(model))
    shutil.copy(root / "hf" / "config.json", root / "packed")
    found = {}
    for form in ("hf", "fp8", "packed"):
        tensors = {n: t for file in (root / form).glob("*.safetensors") for n, t in load_file(file).items()}
        found[form] = (tensors, json.loads((root / form / "config.json").read_text()), root / form)
    return found


# -- layouts: tensors -> tensors


def prefixed(tensors):
    return {f"language_model.{name}": t for name, t in tensors.items()}


def prefixed_within(tensors):
    return {
        n.replace("model.", "model.language_model.", 1) if n.startswith("model.") else n: t for n, t in tensors.items()
    }


def stacked_experts(tensors):
    """As transformers saves its own modules, every layer's; with FP8 scales where there are such."""
    out = dict(tensors)
    for layer in (1, LAYER):
        for ending, suffix in (("weight", ""), ("weight_scale_inv", "_scale_inv")):
            path = f"model.layers.{layer}.mlp.experts"
            if f"{path}.0.gate_proj.{ending}" not in out:
                continue
            gate, up, down = (
                torch.stack([out.pop(f"{path}.{e}.{p}_proj.{ending}") for e in range(CONFIG["n_routed_experts"])])
                for p in ("gate", "up", "down")
            )
            out[f"{path}.gate_up_proj{suffix}"] = torch.cat([_bytes(gate), _bytes(up)], 1).view(gate.dtype)
            out[f"{path}.down_proj{suffix}"] = down
    return out


def fused_rows(tensors):
    """As omlx holds a packed build: gate above up, wk above weights_proj (where both are of one kind), and so the scales."""
    out = dict(tensors)
    for name in tensors:
        for upper, lower, fused in (
            ("gate_proj", "up_proj", "gate_up_proj"),
            ("wk", "weights_proj", "wk_weights_proj"),
        ):
            other = name.replace(f".{upper}.", f".{lower}.")
            if other == name or ".experts." in name or other not in out or out[other].dtype != out[name].dtype:
                continue
            if name.endswith(".weight") and f"{name}_scale_inv" in out and f"{other}_scale_inv" not in out:
                continue
            one, two = out.pop(name), out.pop(other)
            out[name.replace(f".{upper}.", f".{fused}.")] = torch.cat([_bytes(one), _bytes(two)], -2).view(one.dtype)
    return out


def _bytes(tensor):
    """torch concatenates neither FP8 nor uint32."""
    as_bytes = {torch.uint32: torch.int32, torch.float8_e4m3fn: torch.uint8}
    return tensor.view(as_bytes.get(tensor.dtype, tensor.dtype))


def head_of_mlx_vlm(tensors):
    """Its drafter's names; in the model's own file."""
    return {_head(name, "mtp.", "shared_head_norm.weight"): t for name, t in tensors.items()}


def head_of_omlx(tensors):
    glue = ("enorm", "hnorm", "eh_proj", "shared_head")
    out = {}
    for name, t in tensors.items():
        rest = name.removeprefix(MTP)
        block = "" if rest == name or rest.startswith(glue) else "block."
        out[_head(name, f"mtp.0.{block}", "norm.weight")] = t
    return out


def _head(name, prefix, norm):
    rest = name.removeprefix(MTP)
    return name if rest == name else prefix + (norm if rest == "shared_head.norm.weight" else rest)


def everything(tensors):
    return prefixed(head_of_omlx(fused_rows(tensors)))


def with_copies(tensors):
    """GLM-4.5 and engines that save their modules keep the embedding and the head once more."""
    copies = {"embed_tokens": "model.embed_tokens", "shared_head.head": "lm_head"}
    return tensors | {
        f"{MTP}{mine}.{part}": tensors[f"{own}.{part}"].clone()
        for mine, own in copies.items() for part in ("weight", "scales", "biases") if f"{own}.{part}" in tensors
    }  # fmt: skip


LAYOUTS = [
    (prefixed, "hf"), (prefixed, "fp8"), (prefixed, "packed"), (prefixed_within, "hf"), (stacked_experts, "hf"),
    (stacked_experts, "fp8"), (fused_rows, "hf"), (fused_rows, "fp8"), (fused_rows, "packed"), (head_of_mlx_vlm, "hf"),
    (head_of_mlx_vlm, "packed"), (head_of_omlx, "packed"), (everything, "packed"), (with_copies, "hf"), (with_copies, "packed"),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "form"), LAYOUTS, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_a_layout_reads_as_the_plain_checkpoint_does(plain, tmp_path, layout, form, capsys):
    tensors, config, source = plain[form]
    changed = layout(tensors)
    folder = written(tmp_path / "ck", changed, config)
    assert changed.keys() != tensors.keys()
    due, found = parameters_of(glm_dsa.load(source)), parameters_of(glm_dsa.load(folder))
    assert found.keys() == due.keys()
    for name, value in due.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert mx.array_equal(found[name], value), name
    assert main(["inventory", str(folder), "--values"]) == 0
    assert "note: " in capsys.readouterr().out
    # headers: the same names, shapes and sizes; the same bytes
    headers, own = headers_of(str(folder)).tensors, headers_of(str(source)).tensors
    assert headers.keys() == own.keys()
    for name, stored in own.items():
        assert (headers[name].dtype, headers[name].shape, headers[name].nbytes) == (
            stored.dtype, stored.shape, stored.nbytes,
        ), name  # fmt: skip
        begin, end = stored.nbytes // 3, stored.nbytes * 2 // 3
        for a, b in ((0, stored.nbytes), (begin, end)):
            assert storage.read_bytes(headers[name], a, b) == storage.read_bytes(stored, a, b), name
    # the oracle, which reads by itself
    theirs, mine = read_tensors(source), read_tensors(folder)
    assert mine.names.keys() == theirs.names.keys()
    for name in theirs.names:
        if name.endswith(("weight", "bias")):
            whole = theirs(name, torch.float32)
            assert torch.equal(mine(name, torch.float32), whole), name
            assert torch.equal(mine(name, torch.float32, slice(1, 3)), whole[1:3]), name
            assert mine.shape(name) == theirs.shape(name)


def test_arrays_that_mlx_lm_hands_over_are_turned_and_the_log_says_so(caplog):
    args = glm_dsa.ModelArgs.from_dict(checkpoints.tiny(num_hidden_layers=4))
    own = parameters_of(glm_dsa.Model(args))
    with caplog.at_level("INFO", "glm_dsa"):
        found = glm_dsa.Model(args).sanitize({f"language_model.{name}": value for name, value in own.items()})
    assert found.keys() == own.keys()
    assert [f"{len(own)} tensors are named language_model.*" in line for line in caplog.messages] == [True]


@pytest.mark.parametrize(("layout", "form"), [(stacked_experts, "fp8"), (everything, "packed")], ids=["fp8", "packed"])
def test_a_few_experts_of_a_layer_are_read_by_themselves(plain, tmp_path, layout, form):
    tensors, config, source = plain[form]
    folder = written(tmp_path / "ck", layout(tensors), config)
    due, found = (OurLayers(f, mx.float32).experts(1, 1, 3) for f in (source, folder))
    for name, value in parameters_of(due).items():
        assert mx.array_equal(parameters_of(found)[name], value), name


def test_transformers_own_modules_as_it_saves_them(tmp_path):
    """`save_pretrained(save_original_format=False)`; HF loads that itself, so all claims are judged on it."""
    checkpoints.write(tmp_path / "source", CONFIG, shard_size="1GB")
    with hf.quiet():
        model = hf.load(tmp_path / "source", dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / "ck", save_original_format=False)
    (tmp_path / "ck" / "config.json").write_text(json.dumps(CONFIG))
    due, found = (parameters_of(glm_dsa.load(tmp_path / f)) for f in ("source", "ck"))
    assert found.keys() == {n for n in due if not n.startswith(MTP)}
    assert all(mx.array_equal(due[name].astype(value.dtype), value) for name, value in found.items())
    assert f"{SPARSE}.experts.gate_up_proj" in storage.stored_headers(tmp_path / "ck")
    assert not cases.spec_of(tmp_path / "ck", None).has_mtp


@pytest.mark.parametrize(
    ("layout", "judged"), [(stacked_experts, True), (with_copies, True), (prefixed, False), (fused_rows, False),
                           (head_of_mlx_vlm, False)], ids=lambda v: str(getattr(v, "__name__", v)),
)  # fmt: skip
def test_all_claims_are_judged_where_hf_loads_a_layout(plain, tmp_path, layout, judged):
    tensors, config, _ = plain["hf"]
    folder = written(tmp_path / "ck", layout(tensors), config)
    if judged:
        assert cases.spec_of(folder, None).has_mtp
        with hf.quiet():
            model = hf.load(folder, with_mtp=True)
        for name in (n for n in tensors if n.endswith("proj.weight") and ".experts." not in n and "eh_proj" not in n):
            assert torch.equal(model.get_parameter(name), tensors[name].float()), name
    else:
        with pytest.raises(ValueError, match="HF does not load this layout"):
            cases.spec_of(folder, None)


# -- damaged


GATE_UP, BOTH_INDEXER = f"{SPARSE}.experts.gate_up_proj", "model.layers.0.self_attn.indexer.wk_weights_proj.weight"


def without(*names):
    return lambda tensors: {n: t for n, t in tensors.items() if n not in names}


def cut(name, rows=1):
    return lambda tensors: tensors | {name: tensors[name][..., :-rows, :]}


def both(name, value):
    return lambda tensors: tensors | {name: value}


DAMAGE = {
    "an odd row": (stacked_experts, "hf", cut(GATE_UP), GATE_UP),
    "two rows less": (stacked_experts, "hf", cut(GATE_UP, 2), f"{SPARSE}.experts.0.gate_proj.weight"),
    "two dimensions": (stacked_experts, "hf", lambda t: t | {GATE_UP: t[GATE_UP][0]}, GATE_UP),
    "experts missing": (stacked_experts, "hf", lambda t: t | {GATE_UP: t[GATE_UP][:3]}, f"{SPARSE}.experts.3.gate_proj"),
    "no down_proj": (stacked_experts, "hf", without(f"{SPARSE}.experts.down_proj"), f"{SPARSE}.experts.0.down_proj.weight"),
    "both forms": (stacked_experts, "hf", both(f"{SPARSE}.experts.3.up_proj.weight", torch.ones(128, 128)), GATE_UP),
    "a scale's row less": (stacked_experts, "fp8", cut(f"{GATE_UP}_scale_inv"), f"{GATE_UP}_scale_inv"),
    "no scale": (stacked_experts, "fp8", without(f"{GATE_UP}_scale_inv"), f"{SPARSE}.experts.0.gate_proj.weight"),
    "indexer cut": (fused_rows, "packed", cut(BOTH_INDEXER), BOTH_INDEXER),
    "indexer's both forms": (
        fused_rows, "hf", both("model.layers.0.self_attn.indexer.wk.weight", torch.ones(128, 128)), BOTH_INDEXER
    ),
    "words without scales": (
        fused_rows, "packed", without(f"{SPARSE}.switch_mlp.gate_up_proj.scales"), f"{SPARSE}.switch_mlp.gate_proj"
    ),
    "stack's both forms": (
        fused_rows, "packed", both(f"{SPARSE}.switch_mlp.up_proj.scales", torch.ones(4, 128, 2)),
        f"{SPARSE}.switch_mlp.gate_up_proj.scales",
    ),
    "with and without the prefix": (prefixed, "hf", both("model.norm.weight", torch.ones(128)), "language_model.model.norm"),
    "half of it without the prefix's model": (
        prefixed, "hf", without("language_model.model.norm.weight"), "model.norm.weight"
    ),
    "a vision tower": (prefixed, "hf", both("vision_tower.patch.weight", torch.ones(4)), "vision_tower.patch.weight"),
    "a head's tensor missing": (head_of_omlx, "packed", without("mtp.0.norm.weight"), f"{MTP}shared_head.norm.weight"),
    "a head twice": (head_of_mlx_vlm, "hf", both(f"{MTP}enorm.weight", torch.ones(128)), "mtp.enorm.weight"),
    "another model's head": (head_of_mlx_vlm, "hf", both("mtp.fc.weight", torch.ones(4)), "mtp.fc.weight"),
    "a copy of another vocabulary": (with_copies, "hf", cut(f"{MTP}embed_tokens.weight"), f"{MTP}embed_tokens.weight"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_layout_is_refused_by_name(plain, tmp_path, what, capsys):
    layout, form, damage, named = DAMAGE[what]
    tensors, config, _ = plain[form]
    folder = written(tmp_path / "ck", damage(layout(tensors)), config)
    assert main(["inventory", str(folder)]) == 10
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert named in said
    with pytest.raises(CheckpointError):
        glm_dsa.load(folder)


@pytest.mark.parametrize("what", [w for w in DAMAGE if "both forms" in w or "twice" in w or "with and without" in w])
def test_the_oracle_takes_no_two_tensors_for_one(plain, tmp_path, what):
    layout, form, damage, named = DAMAGE[what]
    tensors, config, _ = plain[form]
    with pytest.raises(ValueError, match="both hold") as error:
        read_tensors(written(tmp_path / "ck", damage(layout(tensors)), config))
    assert named in str(error.value)


def test_quantized_modules_are_known_by_the_names_that_config_json_has():
    args = glm_dsa.ModelArgs.from_dict(CONFIG)
    indexer = "self_attn.indexer"
    for said, due in {
        "lm_head": ["lm_head"],
        "language_model.lm_head": ["lm_head"],
        "language_model.model.layers.1.mlp.switch_mlp.gate_up_proj": [
            f"{SPARSE}.switch_mlp.gate_proj", f"{SPARSE}.switch_mlp.up_proj"
        ],
        f"mtp.0.block.{indexer}.wk_weights_proj": [f"{MTP}{indexer}.wk", f"{MTP}{indexer}.weights_proj"],
        "mtp.eh_proj": [f"{MTP}eh_proj"],
        "mtp.fc": ["mtp.fc"],
    }.items():  # fmt: skip
        assert layouts.modules(args, said) == due


def test_a_block_of_scales_that_two_matrices_share_is_refused(tmp_path):
    config = {**CONFIG, "moe_intermediate_size": 64}
    shapes = {GATE_UP: (4, 128, 128), f"{GATE_UP}_scale_inv": (4, 2, 1)}
    with pytest.raises(glm_dsa.errors.WeightsError, match=f"{GATE_UP}_scale_inv.*cannot be divided"):
        layouts.plan(shapes, glm_dsa.ModelArgs.from_dict(config))


def test_a_stack_stands_for_no_more_tensors_than_a_model_has():
    args = glm_dsa.ModelArgs.from_dict(CONFIG)
    for shape in ((10**15, 2, 0), (0, 2, 2), (1025, 2, 2)):
        with pytest.raises(glm_dsa.errors.WeightsError, match=GATE_UP):
            layouts.plan({GATE_UP: shape}, args)
    beyond = "model.layers.77.mlp.experts.gate_up_proj"
    assert layouts.plan({beyond: (8, 2, 2)}, args).parts == {beyond: layouts.Part(beyond)}


# -- the MTP layer


@pytest.mark.parametrize("form", ["hf", "packed"])
@pytest.mark.parametrize("named", [0, None])
def test_an_mtp_layer_that_config_json_does_not_name_is_left_unread(plain, tmp_path, form, named, capsys):
    tensors, config, source = plain[form]
    config = {k: v for k, v in (config | {"num_nextn_predict_layers": named}).items() if v is not None}
    folder = written(tmp_path / "ck", tensors, config)
    model = glm_dsa.load(folder)
    due = {n: v for n, v in parameters_of(glm_dsa.load(source)).items() if not n.startswith(MTP)}
    assert model.mtp is None
    assert parameters_of(model).keys() == due.keys()
    assert all(mx.array_equal(value, due[name]) for name, value in parameters_of(model).items())
    assert main(["inventory", str(folder)]) == 0
    assert f"layer {LAYER}" in capsys.readouterr().out
    assert not any(name.startswith(MTP) for name in read_tensors(folder).names)
    assert any("num_nextn_predict_layers" in note for note in headers_of(str(folder)).notes)


def test_a_layer_too_many_is_no_mtp_layer(plain, tmp_path):
    """config.json of a shorter model: nothing is left unread for that."""
    tensors, config, _ = plain["packed"]
    changes = {"num_nextn_predict_layers": 0, "num_hidden_layers": 1}
    folder = written(tmp_path / "ck", tensors, config | changes)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\..*num_hidden_layers"):
        glm_dsa.load(folder)


def pruned(tensors, keep=2):
    """The main model's experts fewer; the MTP layer as it was."""
    out = {}
    for name, t in tensors.items():
        if not name.startswith(f"{SPARSE}."):
            out[name] = t
        elif ".experts." in name:
            if int(name.split(".experts.")[1].split(".")[0]) < keep:
                out[name] = t
        elif ".switch_mlp." in name or ".gate." in name:
            out[name] = t[:keep]
        else:
            out[name] = t
    return out


@pytest.mark.parametrize("form", ["hf", "packed"])
def test_an_mtp_layer_with_more_experts_than_the_model_is_dropped(plain, tmp_path, form, capsys):
    tensors, config, _ = plain[form]
    changes = {"n_routed_experts": 2, "num_experts_per_tok": 2}
    folder = written(tmp_path / "ck", pruned(tensors), config | changes)
    bare = {n: t for n, t in pruned(tensors).items() if not n.startswith(MTP)}
    due = parameters_of(glm_dsa.load(written(tmp_path / "bare", bare, config | changes)))
    model = glm_dsa.load(folder)
    assert model.mtp is None
    assert all(mx.array_equal(value, due[name]) for name, value in parameters_of(model).items())
    assert main(["inventory", str(folder)]) == 0
    assert "4 experts, the model 2" in capsys.readouterr().out
    assert not any(name.startswith(MTP) for name in read_tensors(folder).names)
    fewer = config | {"n_routed_experts": 8}
    with pytest.raises(CheckpointError, match=r"mlp\.(gate|experts|switch_mlp)"):
        glm_dsa.load(written(tmp_path / "fewer", tensors, fewer))


# -- a head beside the model


def apart(plain, form="packed", layout=lambda tensors: tensors):
    tensors, config, source = plain[form]
    tensors = layout(tensors)
    is_head = layouts.is_of_mtp
    args = glm_dsa.ModelArgs.from_dict(config)
    head = {n: t for n, t in tensors.items() if is_head(args, n)}
    return {n: t for n, t in tensors.items() if n not in head}, head, config, source


@pytest.mark.parametrize(
    ("form", "layout"),
    [("hf", dict), ("packed", dict), ("packed", head_of_mlx_vlm), ("packed", head_of_omlx), ("packed", everything)],
)
def test_a_head_beside_the_model_is_read(plain, tmp_path, form, layout, capsys):
    main_part, head, config, source = apart(plain, form, layout)
    folder = written(tmp_path / "ck", main_part, config)
    assert glm_dsa.load(folder).mtp is None
    names = sorted(head)
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({n: head[n].contiguous() for n in part}, folder / f"mtp-0000{i + 1}-of-00002.safetensors")
    due, found = parameters_of(glm_dsa.load(source)), parameters_of(glm_dsa.load(folder))
    assert found.keys() == due.keys()
    assert all(mx.array_equal(value, due[name]) for name, value in found.items())
    assert main(["inventory", str(folder)]) == 0
    assert "mtp-00001-of-00002.safetensors" in capsys.readouterr().out
    assert read_tensors(folder).names.keys() == read_tensors(source).names.keys()
    if form == "hf":
        with pytest.raises(ValueError, match="HF does not load this layout"):
            cases.spec_of(folder, None)


def test_a_head_that_is_not_read_is_named(plain, tmp_path):
    main_part, head, config, _ = apart(plain, "packed", head_of_mlx_vlm)
    other = head | {"mtp.fc.weight": torch.ones(4, 4)}
    folder = written(tmp_path / "ck", main_part, config)
    save_file(other, folder / "mtp.safetensors")
    assert glm_dsa.load(folder).mtp is None
    assert any("mtp.fc.weight" in note for note in headers_of(str(folder)).notes)
    assert not any(name.startswith(MTP) for name in read_tensors(folder).names)
    whole = written(tmp_path / "whole", main_part | head, config)
    save_file({n: torch.zeros_like(t) for n, t in head.items()}, whole / "mtp.safetensors")
    assert any("mtp.safetensors" in note and "own files" in note for note in headers_of(str(whole)).notes)
    assert glm_dsa.load(whole).mtp.eh_proj.scales.any(), "the model's own"
    (whole / "mtp.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match=r"mtp\.safetensors"):
        glm_dsa.load(whole)


def test_a_head_alone_is_no_model(plain, tmp_path, capsys):
    """mlx-vlm's drafter by itself."""
    _, head, config, _ = apart(plain, "packed", head_of_mlx_vlm)
    alone = {"model_type": "glm_moe_dsa_mtp", "text_config": config, "block_size": 2, "tie_word_embeddings": False}
    folder = written(tmp_path / "ck", head, alone)
    assert main(["inventory", str(folder)]) == 10
    said = capsys.readouterr().err
    assert "glm_moe_dsa_mtp" in said
    assert "mtp.safetensors" in said


# -- converted


@pytest.mark.parametrize(
    ("layout", "choice", "kept"),
    [(everything, None, True), (everything, "drop", False), (everything, "keep", True), (pruned, None, False)],
)
def test_conversion_keeps_the_mtp_layer_or_drops_it(registered, plain, tmp_path, layout, choice, kept):
    form = "packed" if layout is everything else "hf"
    tensors, config, _ = plain[form]
    config = config | ({"n_routed_experts": 2, "num_experts_per_tok": 2} if layout is pruned else {})
    config |= {"quantization": {"group_size": 64, "bits": 4, "mode": "affine"}} if form == "packed" else {}
    folder = checkpoints.write_tokenizer(written(tmp_path / "ck", layout(tensors), config))
    mlx_lm.convert(str(folder), str(tmp_path / "out"), mtp=choice)
    found, due = (parameters_of(glm_dsa.load(f)) for f in (tmp_path / "out", folder))
    assert found.keys() == {n for n in due if kept or not n.startswith(MTP)}
    assert all(mx.array_equal(value, due[name]) for name, value in found.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == int(kept)
    if not kept:
        with pytest.raises(glm_dsa.GlmDsaError, match="--mtp keep"):
            mlx_lm.convert(str(tmp_path / "out"), str(tmp_path / "again"), mtp="keep")
        assert not (tmp_path / "again").exists()


def test_a_choice_that_is_none_is_refused(registered):
    with pytest.raises(glm_dsa.GlmDsaError, match="keep or drop"):
        mlx_lm.convert("a", "b", mtp="maybe")


@pytest.mark.parametrize(("form", "layout"), [("hf", dict), ("packed", everything)])
def test_mlx_lm_is_given_a_head_beside_the_model(registered, plain, tmp_path, form, layout):
    main_part, head, config, source = apart(plain, form, layout)
    config |= {"quantization": {"group_size": 64, "bits": 4, "mode": "affine"}} if form == "packed" else {}
    folder = written(tmp_path / "ck", main_part, config)
    save_file({n: t.contiguous() for n, t in head.items()}, folder / "mtp.safetensors")
    model, _ = mlx_lm.utils.load_model(folder)
    due = parameters_of(glm_dsa.load(source))
    assert parameters_of(model).keys() == due.keys()
    assert all(mx.array_equal(value, due[name]) for name, value in parameters_of(model).items())
    (folder / "mtp.safetensors").unlink()
    assert mlx_lm.utils.load_model(folder)[0].mtp is None
    del head[next(n for n in head if n.endswith("norm.weight"))]
    save_file({n: t.contiguous() for n, t in head.items()}, folder / "mtp.safetensors")
    with pytest.raises(CheckpointError, match=r"norm\.weight"):
        mlx_lm.utils.load_model(folder)


def test_mlx_lms_loader_names_a_float64_tensor(registered, plain, tmp_path):
    tensors, config, _ = plain["hf"]
    folder = written(tmp_path / "ck", tensors | {"model.norm.weight": tensors["model.norm.weight"].double()}, config)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: model\.norm\.weight is F64"):
        mlx_lm.utils.load_model(folder)


# -- dtypes


def test_float64_is_read_and_rounded_once(plain, tmp_path):
    tensors, config, source = plain["hf"]
    bias, norm = f"{SPARSE}.gate.e_score_correction_bias", "model.norm.weight"
    values = {n: tensors[n].double() + torch.rand(tensors[n].shape, dtype=torch.float64) for n in (bias, norm, GATE)}
    folder = written(tmp_path / "ck", tensors | values, config)
    found = parameters_of(glm_dsa.load(folder))
    for name, value in values.items():
        due = value.float().numpy()
        assert found[name].dtype == mx.float32
        assert np.array_equal(np.array(found[name]), due), name
        assert np.array_equal(np.array(storage.read_piece(headers_of(str(folder)).tensors[name])), due)
        assert np.array_equal(read_tensors(folder)(name), value.numpy())
    assert np.array_equal(np.array(storage.read_piece(headers_of(str(folder)).tensors[GATE], slice(1, 3))),
                          values[GATE][1:3].float().numpy())  # fmt: skip
    others = parameters_of(glm_dsa.load(source))
    assert all(mx.array_equal(found[name], value) for name, value in others.items() if name not in values)
    half = parameters_of(glm_dsa.load(folder, mx.float16))[norm]
    assert np.array_equal(np.array(half), values[norm].float().half().numpy())
    values[norm][5] = float("nan")
    with pytest.raises(CheckpointError, match=norm):
        glm_dsa.load(written(tmp_path / "nan", tensors | values, config))


GATE = f"{SPARSE}.gate.weight"


def test_all_claims_are_judged_where_hf_keeps_what_is_stored(plain, tmp_path):
    """It casts all to one dtype, but for the correction bias: of several, some would be rounded, and ours not."""
    tensors, config, _ = plain["hf"]
    bias = f"{SPARSE}.gate.e_score_correction_bias"
    folder = written(tmp_path / "bias", tensors | {bias: tensors[bias].double()}, config)
    assert cases.spec_of(folder, None).has_mtp
    for dtype in (torch.float64, torch.float32):
        folder = written(tmp_path / str(dtype), tensors | {GATE: tensors[GATE].to(dtype)}, config)
        with pytest.raises(ValueError, match="one dtype"):
            cases.spec_of(folder, None)


@pytest.mark.parametrize(
    "dtype", ["int8", "int16", "int32", "int64", "uint16", "uint64", "bool", "float8_e5m2", "float8_e8m0fnu", "complex64"]
)  # fmt: skip
def test_a_dtype_that_nothing_here_has_is_refused_by_name(plain, tmp_path, dtype, capsys):
    tensors, config, _ = plain["hf"]
    odd = torch.ones(tensors[GATE].shape).to(getattr(torch, dtype))
    folder = written(tmp_path / "ck", tensors | {GATE: odd}, config)
    assert main(["inventory", str(folder)]) == 10
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"model.safetensors: {GATE} " in said
    with pytest.raises(CheckpointError, match=GATE):
        checkpoint.read_headers(folder)
