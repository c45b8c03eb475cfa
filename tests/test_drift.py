"""Where two models drift apart: sides, first divergence, causes, repair, the command, and what it writes."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

import verify.__main__
from glm_dsa.errors import CacheError, GlmDsaError
from reference import checkpoints
from reference.kept import TRAINED, probes
from reference.stored import read_tensors
from tests.carried import write_stock
from tests.carried.compared import Trial
from tests.carried.diagnosed import HF, STOCK, diagnose
from verify import drift, faults
from verify.core import stages
from verify.core.report import AGREES, FAULT
from verify.drift import stagewise
from verify.drift.checks import same_weights
from verify.drift.stagewise import Compared, roots
from verify.engines import base, registry, spec
from verify.engines.recording import Hearing, Recording, is_given

TOKENS = np.random.default_rng(3).integers(3, 160, 60).tolist()
STOCK_CODE = "mlx_lm.models.glm_moe_dsa"


@pytest.fixture(scope="module")
def sharing(tmp_path_factory):
    """A tiny GLM-5.2."""
    return checkpoints.write(tmp_path_factory.mktemp("drift") / "sharing", checkpoints.glm_5_2(), seed=9)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A tiny GLM-5.1, which mlx-lm's own definition knows; keys of small variance."""
    return checkpoints.write(tmp_path_factory.mktemp("drift") / "plain", checkpoints.tiny(num_hidden_layers=4), seed=9)


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    return Trial(tmp_path_factory.mktemp("carried"))


# -- sides


@pytest.mark.parametrize(
    ("text", "implementation", "options", "overrides"),
    [
        ("{}", "glm_dsa", {}, {}),
        ("hf@{}", "hf", {}, {}),
        ("equations@{}", "equations", {}, {}),
        (f"{STOCK_CODE}@{{}}", STOCK_CODE, {}, {}),
        ("{},dtype=bfloat16,indexer_rope=half-split", "glm_dsa", {"dtype": "bfloat16"}, {"indexer_rope": "half-split"}),
        ("hf@{},indexer_norm_eps=1e-5,index_topk=8", "hf", {}, {"indexer_norm_eps": 1e-5, "index_topk": 8}),
    ],
)
def test_a_side_is_read(sharing, text, implementation, options, overrides):
    side, reference = drift.sides_of(text.format(sharing), None, "")
    assert (side.implementation, side.options, side.overrides) == (implementation, options, overrides)
    assert side.checkpoint == str(sharing)
    oracle = "equations" if implementation == "hf" else "hf"
    assert (reference.implementation, reference.checkpoint, reference.options) == (oracle, str(sharing), {})


def test_a_side_with_a_packed_cache_is_read_where_it_can_be_packed(sharing, tmp_path):
    wide = checkpoints.write(tmp_path / "wide", checkpoints.packable(num_hidden_layers=4))
    side, _ = drift.sides_of(f"{wide},kv_bits=8,kv_group_size=32", None, "")
    assert side.options == {"kv_bits": 8, "kv_group_size": 32}
    for asked, said in (
        ("kv_bits=8,kv_group_size=32", "do not divide"),
        ("kv_bits=0", "bits 0"),
        ("kv_bits=7", "bits 7"),
    ):
        with pytest.raises(CacheError, match=said):
            drift.sides_of(f"{sharing},{asked}", None, "")


@pytest.mark.parametrize(
    ("candidate", "against", "ran", "on"),
    [
        ("glm_dsa", "hf@{}", ("glm_dsa", "hf"), "{}"),
        ("{}", "equations", ("glm_dsa", "equations"), "{}"),
        ("hf", None, ("hf", "equations"), "default"),
    ],
)
def test_a_side_without_a_checkpoint_runs_on_the_others(sharing, candidate, against, ran, on):
    default = TRAINED / "interleaved"
    both = drift.sides_of(candidate.format(sharing), against and against.format(sharing), str(default))
    assert tuple(s.implementation for s in both) == ran
    assert {s.checkpoint for s in both} == {str(sharing) if on == "{}" else str(default)}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected a checkpoint, an implementation, or both"),
        ("@{}", "expected IMPLEMENTATION@CHECKPOINT"),
        ("hf@", "expected IMPLEMENTATION@CHECKPOINT"),
        ("/no/such/folder", "/no/such/folder: no such folder"),
        ("{},bits=8", "no option is named bits"),
        ("{},dtype=int8", "expected one of float32, bfloat16, float16"),
        ("{},device=tpu", "expected one of cpu, gpu"),
        ("{},kv_bits=eight", "expected a whole number"),
        ("{},kv_bits=8,kv_bits=4", "kv_bits stands there twice"),
        ("{},indexer_rope=both", "expected 'interleaved' or 'half-split'"),
        ("hf@{},device=gpu", "run on the CPU here"),
        ("hf@{},kv_bits=8", "kv_bits is for this project's definition"),
        ("equations@{},dtype=bfloat16", "the equations run in float64"),
        ("no.such.module@{}", "no.such.module: no module of that name"),
        ("there/is/none.py@{}", "no such file"),
        (f"{STOCK_CODE}@{{}},indexer_rope=half-split", "nothing can be overridden"),
    ],
)
def test_what_is_no_side_is_refused_in_one_line(sharing, text, said):
    with pytest.raises((ValueError, GlmDsaError)) as refused:
        drift.sides_of(text.format(sharing), None, str(sharing))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_two_models_are_refused(sharing, plain):
    with pytest.raises(ValueError, match="expected two of one model"):
        drift.compare(str(sharing), str(plain))


def test_weights_are_the_same_or_not(sharing, tmp_path):
    twin = shutil.copytree(sharing, tmp_path / "twin")
    one, other = (drift.sides_of(str(folder), None, "")[0] for folder in (sharing, twin))
    assert same_weights(one, other)
    file = sorted(twin.glob("*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert not same_weights(one, drift.sides_of(str(twin), None, "")[0])


# -- runs


def recorded(side, given=None, folder=None):
    into = Recording(folder)
    hearing = Hearing(into, given, lambda stage: given is not None and is_given(stage, True))
    base.run(registry.engine_of(side), np.array([TOKENS]), np.arange(len(TOKENS)), hearing)
    return into


@pytest.mark.parametrize("implementation", ["glm_dsa", "equations", "mlx-lm's, put right"])
@pytest.mark.parametrize("large", [False, True])
def test_every_way_of_running_gives_hfs_stages(plain, sharing, monkeypatch, tmp_path, implementation, large):
    """A model too large for the memory is read a layer at a time, experts in chunks, and recorded on disk: the same comes out."""
    is_ours = implementation in ("glm_dsa", "equations")
    code = implementation if is_ours else write_stock(tmp_path / "right.py")
    side = drift.sides_of(f"{code}@{sharing if is_ours else plain}", None, "")[0]
    reference = recorded(side.on("hf"))
    truth = recorded(side.on("equations"), reference)
    if large:
        monkeypatch.setattr(spec, "SMALL", 0)
        monkeypatch.setattr(base, "CHUNK", 5 * 64 * 32 * 12)
        monkeypatch.setattr(base, "HEAD_ROWS", 50)
    seen = recorded(side, reference, tmp_path / "recorded" if large else None)
    if is_ours:
        assert {s for s in seen if seen[s] is not None} == {s for s in reference if reference[s] is not None}
    yard = stagewise.Yardstick(side.args, read_tensors(side.folder), reference, truth, False)
    found = list(stagewise.compared("local", seen, reference, yard))
    assert len(found) > 30
    assert {c.verdict for c in found} == {AGREES}


def test_a_recording_on_disk_is_the_same(tmp_path):
    kept = Recording(tmp_path / "here")
    kept.put("layers.3.self_attn.heads", np.arange(6.0).reshape(2, 3))
    kept.put("layers.0.self_attn.indexer.topk", None)
    assert list(kept) == ["layers.0.self_attn.indexer.topk", "layers.3.self_attn.heads"]
    assert kept["layers.0.self_attn.indexer.topk"] is None
    assert np.array_equal(kept["layers.3.self_attn.heads"], np.arange(6.0).reshape(2, 3))
    assert kept.get("norm") is None


# -- where it begins


def compared_at(*at_fault, unhanded=()):
    kinds = [k for k in stages.IN_LAYER if k not in ("eh_proj", "shared_head")]
    return [
        Compared(f"layers.0.{k}", "local", FAULT if k in at_fault else AGREES, 1.0, 0.1, handed=k not in unhanded)
        for k in kinds
    ]


@pytest.mark.parametrize(
    ("at_fault", "due", "blamed"),
    [
        (("self_attn.indexer.scores", "self_attn.indexer.topk"), ("self_attn.indexer.scores",), "indexer"),
        (("self_attn.kv_latent", "self_attn.heads", "self_attn.output"), ("self_attn.kv_latent",), "MLA"),
        (("self_attn.indexer.topk", "self_attn.heads"), ("self_attn.indexer.topk", "self_attn.heads"), "indexer and MLA"),
        (("mlp.gate.topk", "mlp.shared_experts", "mlp.output"), ("mlp.gate.topk", "mlp.shared_experts"), "router and MoE"),
        (("self_attn.indexer.k", "self_attn.q_rope", "self_attn.k_rope", "self_attn.heads"),
         ("self_attn.indexer.k", "self_attn.q_rope", "self_attn.k_rope"), "rope"),
        (("self_attn.selection", "self_attn.heads"), ("self_attn.selection",), "IndexShare"),
    ],
)  # fmt: skip
def test_what_is_wrong_by_itself_is_told_from_what_follows(at_fault, due, blamed):
    found = roots(compared_at(*at_fault))
    assert tuple(c.kind for c in found) == due
    assert stages.component(set(due)) == blamed


def test_what_could_not_be_handed_in_explains_what_follows():
    found = roots(compared_at("self_attn.indexer.topk", "self_attn.heads", unhanded=["self_attn.indexer.topk"]))
    assert [c.kind for c in found] == ["self_attn.indexer.topk", "self_attn.heads"]  # the selection in between is sound
    only = [c for c in compared_at("self_attn.indexer.topk", "self_attn.heads", unhanded=["self_attn.indexer.topk"])
            if c.kind != "self_attn.selection"]  # fmt: skip
    assert [c.kind for c in roots(only)] == ["self_attn.indexer.topk"]


# -- what is said


def test_sound_sides_agree_and_the_report_says_so(sharing, tmp_path):
    found = drift.compare(str(sharing), tokens=TOKENS)
    assert found.agrees
    assert found.divergence is None
    assert found.diagnosis is None
    assert found.cached is None
    assert found.distributions["kl_mean"] < 1e-9
    assert [g.layer for g in found.growth] == list(range(8))
    assert max(g.own for g in found.growth) < 1e-4
    assert [c.layer for c in found.choices if c.selection is not None] == [0, 1, 2, 6]
    assert {c.selection_own for c in found.choices} == {None, 1.0}
    assert len(found.tokens) == len(TOKENS)
    assert "No divergence" in found.summary()
    files = found.write(tmp_path / "out")
    told = json.loads(files[0].read_text())
    assert told["agrees"] is True
    records = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert (records[0]["type"], records[-1]["type"]) == ("header", "footer")
    assert sum(r["type"] == "comparison" for r in records) == len(found.comparisons) > 200
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.html", "report.json", "report.jsonl"]


def test_mlx_lms_eps_is_named_on_keys_of_small_variance(plain):
    found = drift.compare(f"{STOCK_CODE}@{plain}", tokens=TOKENS)
    assert found.divergence.stage == "layers.0.self_attn.indexer.topk"
    assert [(c.suspect.name, c.suspect.known_as) for c in found.causes] == [("indexer_norm_eps = 1e-05", "indexer-eps")]
    assert not found.diagnosis.unknown
    assert (found.repair.best.what, round(found.repair.best.explained, 3)) == ("selections", 1.0)
    assert "indexer-eps" in found.summary()


def test_a_layout_run_as_the_other_is_named_with_the_mass_of_both(tmp_path):
    build = shutil.copytree(TRAINED / "half-split", tmp_path / "build")
    config = json.loads((build / "config.json").read_text())
    (build / "config.json").write_text(json.dumps(config | {"indexer_rope_interleave": True}))
    others = [name for name in faults.CATALOGUE if "rope" not in name]
    text = "\n".join(probes()["texts"])[:1024]
    found = drift.compare(
        str(build), str(TRAINED / "half-split"), text=text, length=96, repair=False, without=others
    )  # fmt: skip
    assert found.same_weights
    assert [c.suspect.known_as for c in found.causes] == ["indexer-rope-layout"]
    assert found.mass.layout == "half-split"
    assert found.mass.mass["half-split"].low > found.mass.mass["interleaved"].high
    assert "The weights tell of half-split indexer RoPE, where the candidate runs interleaved" in found.summary()


def test_a_packed_cache_is_named(tmp_path):
    folder = checkpoints.write(tmp_path / "wide", checkpoints.packable(num_hidden_layers=4), seed=9)
    found = drift.compare(f"{folder},kv_bits=8", tokens=TOKENS[:40])
    assert [c.suspect.name for c in found.causes] == ["KV cache in 8 bit, groups of 64"]
    assert not found.diagnosis.unknown


@pytest.mark.parametrize(
    ("names", "where", "dtype"),
    [
        (["softmax-scale-of-nope"], STOCK, "float32"),
        (["latent-eps", "k-rope-unrotated"], HF, "float32"),
    ],
)
def test_mistakes_in_others_code_are_named(trial, names, where, dtype):
    found = diagnose(trial, names, where, dtype)
    assert found.at_its_stage
    assert not found.left
    assert len(found.named) == len(names)
    assert all(any(name in named for named in found.named) for name in names)


def all_but_a_third():
    """Suspects are tried one by one: as many as show what becomes of those that explain nothing."""
    return [name for i, name in enumerate(faults.CATALOGUE) if i % 3]


def test_what_is_not_in_the_catalogue_is_unknown_and_its_component_told(trial):
    name = "router-always-norm"
    found = diagnose(trial, [name], HF, without=[name, *all_but_a_third()])
    assert found.named == ()
    assert found.component == "router"
    assert found.left == ("mlp.gate.weights",)


def test_what_only_a_cache_shows_is_named(plain):
    """In this definition: no other implementation's cache is at hand. Uncached, all is well."""
    name = "indexer-caches-zeros"
    candidate, reference = drift.sides_of(str(plain), None, "")
    others = [f for f in all_but_a_third() if f != name]
    seeded = replace(candidate, within=lambda _: faults.seeded(name))
    found = drift.compare(seeded, reference, tokens=TOKENS[:40], without=others)
    assert found.divergence is None
    assert name in found.cached.causes
    assert not found.agrees
    assert f"{name}: " in found.summary()


# -- the command


def run(capsys, *arguments):
    code = verify.__main__.main(["drift", *map(str, arguments)])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_the_command_reports_what_is_asked_for(plain, tmp_path, capsys):
    out = tmp_path / "out"
    stage = "layers.1.self_attn.heads"
    code, said, err = run(capsys, f"{STOCK_CODE}@{plain}", "--tokens", 60, "--layers", "1-2", "--stages", "self_attn.*",
                          "--watch", stage, "--out", out)  # fmt: skip
    assert (code, err) == (1, "")
    assert "First divergence: layers.1.self_attn.indexer.topk" in said
    told = json.loads((out / "report.json").read_text())
    assert {c["layer"] for c in told["comparisons"]} == {1, 2}
    assert all(c["stage"].startswith("self_attn.") for c in told["comparisons"])
    arrays = np.load(out / f"{stage}.npz")
    assert set(arrays) == {"reference", "local", "own"}
    assert {arrays[name].shape for name in arrays} == {(60, 80)}
    assert said.split("\n\n")[-1].split() == [str(out / f) for f in (f"{stage}.npz", "report.json", "report.jsonl", "report.html")]
    assert np.abs(arrays["local"] - arrays["reference"]).max() < np.abs(arrays["own"] - arrays["reference"]).max()


def test_arrays_that_are_watched_without_a_folder_are_listed_too(plain, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said, _ = run(capsys, plain, "--tokens", 24, "--watch", "embed", "--watch", "embed")
    assert code == 0
    assert [f.name for f in tmp_path.iterdir() if f.is_file()] == ["embed.npz"]
    assert said.endswith("\n\nembed.npz\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["/no/such"], "no such folder"),
        (["{}", "--against", "hf@/no/such"], "no such folder"),
        (["{}", "--layers", "1-"], "expected numbers and ranges"),
        (["{}", "--layers", "40"], "--layers 40"),
        (["{}", "--stages", "nothing.*"], "no stage"),
        (["{}", "--watch", "layers.0.nothing"], "no such stage"),
        (["{}", "--watch", "layers.40.output"], "neither side shows it"),
        (["{}", "--tokens", "1"], "expected at least 2"),
        (["{}", "--seed", "-1"], "expected 0 or more"),
        (["{}", "--prompt-file", "/no/such"], "no such file"),
        (["{}", "--prompt-file", "{}/config.json"], "expected a tokenizer.json"),
        (["{}", "--suggest-bits", "1"], "expected 2 to 16 bits"),
        (["{}", "--suggest-bits", "4"], "--suggest-bits"),
        (["{}", "--out", "{}/config.json"], "a file is there"),
        (["{},kv_bits=8"], "KV quantization"),
        (["{},kv_group_size=32"], "nothing without kv_bits"),
        (["{},revision=main"], "revision is for repositories"),
        ([f"{STOCK_CODE}@{{}}"], "IndexShare not implemented"),
        (["{},device=gpu"], "mlx finds none here"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(sharing, capsys, arguments, said):
    code, out, err = run(capsys, *(a.format(sharing) for a in arguments))
    assert (code, out) == (10, "")
    assert err.startswith("verify: ")
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"layers": 3}, None),
        ({"layers": "3"}, "layers '3': expected their numbers"),
        ({"layers": []}, "expected their numbers"),
        ({"layers": [0.5]}, "expected their numbers"),
        ({"stages": ["norm"]}, "expected a pattern"),
        ({"suggest_bits": "4"}, "expected a number"),
        ({"suggest_bits": float("nan")}, "expected 2 to 16 bits"),
        ({"text": "a", "tokens": [1, 2]}, "text and tokens: expected one prompt"),
        ({"seed": -1}, "expected 0 or more"),
    ],
)
def test_from_python_too_what_cannot_be_is_said(plain, arguments, said):
    if said is None:
        found = drift.compare(str(plain), tokens=TOKENS[:24], **arguments)
        assert {c.layer for c in found.comparisons} <= {None, 3}
        return
    with pytest.raises(ValueError, match=said):
        drift.compare(str(plain), **arguments)


def test_hf_as_the_candidate_is_held_to_the_equations(plain):
    found = drift.compare(f"hf@{plain}", tokens=TOKENS[:24], repair=False)
    assert found.reference.implementation == "equations"
    assert found.agrees


def test_what_cannot_be_written_leaves_nothing_behind(plain, tmp_path, capsys):
    (tmp_path / "out" / "report.json").mkdir(parents=True)
    code, _, err = run(capsys, str(plain), "--tokens", "24", "--out", str(tmp_path / "out"))
    assert code == 10
    assert err.startswith("verify: ")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["report.json"]
