"""`python -m verify audit`: what headers tell, on releases of every format, on damaged ones, and at full size."""

import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import pytest
import torch
from safetensors.torch import load_file, save_file

import glm_dsa
from glm_dsa import ModelArgs, weights
from glm_dsa.errors import LONGEST, CheckpointError
from glm_dsa.model import parameters_of
from glm_dsa.planning import recipe
from glm_dsa.storage import ITEM_BYTES
from reference import checkpoints
from reference.stored import read_tensors
from tests.builds import write_headers
from verify.__main__ import main
from verify.audit import audit
from verify.claims import test_release
from verify.core import findings as merging
from verify.engines import headers
from verify.gate import options

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "verify" / "configs"
OTHER_SIZES = pytest.mark.slow("verify/audit", "verify/configs", "glm_dsa/weights")


def write_sparse(folder, config, fp8=False):
    """A release of full size whose files are all header: the data is a hole."""

    def tensors():
        for spec in weights.inventory(ModelArgs.from_dict(config)):
            is_fp8 = fp8 and len(spec.shape) == 2 and not any(part in spec.name for part in checkpoints.NOT_FP8)
            dtype = "F8_E4M3" if is_fp8 else "F32" if spec.name.endswith("e_score_correction_bias") else "BF16"
            yield spec.name, dtype, spec.shape, math.prod(spec.shape) * ITEM_BYTES[dtype]
            if is_fp8:
                scale = tuple(-(-n // 128) for n in spec.shape)
                yield f"{spec.name}_scale_inv", "F32", scale, 4 * math.prod(scale)

    return write_headers(folder, config, tensors())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(f.stem, marks=[] if f.stem == "glm-5.2" else OTHER_SIZES)
        for f in sorted(CONFIGS.glob("*.json"))
    ],
)
def test_full_size_takes_seconds(name, tmp_path):
    """In under 5 s of a processor and 500 MiB; on the 1.5 TB of each published config."""
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    folder = write_sparse(tmp_path / name, config, fp8="quantization_config" in config)
    script = (
        "import re, resource, sys, time; start = time.process_time(); from verify.__main__ import main; code = main(sys.argv[1:]);"
        "own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if sys.platform == 'darwin' else "  # counts the parent, too
        "int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024;"
        "print(code, time.process_time() - start, own, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "audit", str(folder), "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    code, seconds, peak = done.stderr.split()[-3:]
    assert code == "0", done.stdout[-2000:] + done.stderr
    found = json.loads(done.stdout)
    assert found["bytes"] > 6e10
    assert float(seconds) < 5
    assert int(peak) < 500 << 20


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    config = checkpoints.packable(num_hidden_layers=5, first_k_dense_replace=1)
    return checkpoints.write(tmp_path_factory.mktemp("audit") / "hf", config)


@pytest.fixture
def folder(source, tmp_path):
    return Path(shutil.copytree(source, tmp_path / "release"))


def findings(folder, severity=audit.FAULT, strict=False):
    """Of tensors and config.json: no tokenizer lies beside them."""
    found = audit.audit(headers.headers_of(str(folder)), strict=strict, with_chat=False)
    return [f.what for f in found.findings if f.severity == severity]


def add(folder, **tensors):
    checkpoints.add_shard(folder, "model-more.safetensors", {n.replace("__", "."): t for n, t in tensors.items()})


def remove(folder, part):
    """All tensors whose name holds `part`, from shards and index."""
    index = json.loads((folder / checkpoints.INDEX).read_text())
    for file in set(index["weight_map"].values()):
        kept = {n: t for n, t in load_file(folder / file).items() if part not in n}
        save_file(kept, folder / file, {"format": "pt"})
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if part not in n}
    (folder / checkpoints.INDEX).write_text(json.dumps(index))


def test_a_sound_release_has_no_findings(source):
    """But that no tokenizer lies beside it."""
    assert findings(source, audit.WARNING) == findings(source, audit.NOTE) == findings(source) == []
    found = audit.audit(headers.headers_of(str(source)))
    assert [f.severity for f in found.findings] == [audit.WARNING, audit.NOTE]
    assert found.layout == "HF"
    assert found.mtp == "present"
    total = sum(c.parameters for c in found.components.values())
    read = read_tensors(source)
    assert total == sum(read(name, torch.float32).numel() for name in read.names)
    assert found.nbytes == sum(read(name).nbytes // 4 for name in read.names) + 2 * sum(
        read(name).size for name in read.names if name.endswith("correction_bias")
    )


def test_an_indexer_on_a_shared_layer_is_a_larger_model_and_no_other(folder):
    add(folder, **{"model.layers.3.self_attn.indexer.wk.weight": torch.zeros(128, 64)})
    (line,) = findings(folder, audit.WARNING)
    assert "an indexer on shared layers 3 (1 tensors)" in line
    assert findings(folder) == []
    assert findings(folder, strict=True) == [line]


def test_indexers_that_are_missing_are_named_by_layer(folder):
    remove(folder, "layers.1.self_attn.indexer.")
    (line,) = findings(folder)
    assert "no indexer on layers 1 (5 tensors missing); expected one: indexer_schedule" in line


def test_missing_and_surplus_tensors_are_named(folder):
    remove(folder, "experts.3.up_proj")
    add(folder, **{"model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)})
    text = "\n".join(findings(folder))
    assert "missing: model.layers.1-5.mlp.experts.3.up_proj.weight (5 tensors)" in text
    assert "not expected: model.layers.0.self_attn.q_proj.weight" in text


def test_shapes_and_dtypes(folder):
    add(
        folder,
        **{
            "model.norm.weight": torch.zeros(3),
            "model.layers.0.self_attn.o_proj.weight": torch.zeros(64, 256, dtype=torch.uint8),
            "model.layers.1.mlp.gate.e_score_correction_bias": torch.zeros(16).bfloat16(),
            "model.layers.0.self_attn.q_a_proj.weight": torch.zeros(64, 64).to(torch.float8_e4m3fn),
        },
    )
    for shard in folder.glob("model-0*.safetensors"):  # each tensor in one shard
        kept = {n: t for n, t in load_file(shard).items() if n not in load_file(folder / "model-more.safetensors")}
        save_file(kept, shard, {"format": "pt"})
    text = "\n".join(findings(folder))
    assert "model.norm.weight is [3]: expected [64]" in text
    assert "o_proj.weight is U8: expected floating point" in text
    assert "q_a_proj.weight: FP8 without" in text
    assert any("correction bias: bf16 on 1 tensors" in f for f in findings(folder, audit.WARNING))


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    """Everything in 4 bit that can be."""
    model = glm_dsa.load(source)
    nn.quantize(model, 64, 4, class_predicate=lambda path, m: hasattr(m, "to_quantized"))
    return write_packed(source, tmp_path_factory.mktemp("packed") / "mlx", parameters_of(model))


def write_packed(source, folder, tensors):
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    (folder / "config.json").write_text((source / "config.json").read_text())
    return folder


def test_few_bits_in_an_indexer_or_an_embedding_are_a_warning_and_under_strict_a_fault(packed, source):
    against = ("indexer: 4 bit, groups of 64 on ", "embedding: 4.5 bits a weight; at least 6 are advised")
    assert findings(packed) == []
    warnings = findings(packed, audit.WARNING)
    assert all(any(what in line for line in warnings) for what in against)
    strict = findings(packed, strict=True)
    assert all(any(what in line for line in strict) for what in against)
    assert findings(source, strict=True) == []
    assert main(["audit", str(packed)]) == 0
    assert main(["audit", str(packed), "--policy", "strict"]) == 1


def test_the_gate_judges_by_the_policy_that_is_asked_for(packed, given):
    """`--policy strict` belongs to `--checkpoint`."""
    for policy, is_sound in (("usual", True), ("strict", False)):
        config = given({"--checkpoint": str(packed), "--policy": policy})
        config.stash = {options.ASKED: options.Asked.of(config)}
        held = []
        judge = SimpleNamespace(holds=lambda name, stage, ok, note, held=held: held.append((ok, note)))
        gate = SimpleNamespace(add=lambda comparison: None, not_verified={})
        test_release.test_headers(judge, gate, SimpleNamespace(config=config))
        assert [ok for ok, _ in held] == [is_sound], held
        assert ("indexer: 4 bit" in held[0][1]) != is_sound
    with pytest.raises(ValueError, match="--policy belongs to --checkpoint"):
        options.Asked.of(given({"--policy": "strict"}))


def test_a_packed_router_does_not_load(packed, source, tmp_path):
    """So it is no matter of policy."""
    gate = "model.layers.1.mlp.gate"
    tensors = mx.load(str(packed / "model.safetensors"))
    parts = mx.quantize(tensors.pop(f"{gate}.weight"), 64, 4)
    tensors |= {f"{gate}.{part}": t for part, t in zip(weights.PACKED, parts, strict=True)}
    folder = write_packed(source, tmp_path / "q", tensors)
    (line,) = findings(folder)
    assert f"{gate}.weight: packed" in line
    assert "router: 4 bit" in "\n".join(findings(folder, audit.WARNING))
    with pytest.raises(CheckpointError, match=r"mlp\.gate"):
        glm_dsa.load(folder)


def add_strays(tensors):
    text = (
        random.Random(0)
        .randbytes(50_000 * 24)
        .translate(bytes(b"abcdefgh.\x1b{}#/0123"[i % 18] for i in range(256)))
        .decode()
    )
    return {text[i : i + 24]: ("BF16", [1]) for i in range(0, len(text), 24)}


def misshape(tensors):
    return {name: (dtype, [i + 1, 2]) for i, (name, (dtype, _)) in enumerate(tensors.items())}


@pytest.mark.parametrize("hostile", [add_strays, misshape])
def test_no_input_makes_more_than_sixty_lines(hostile, source, tmp_path):
    """50,000 names that nobody knows; every tensor of a wrong shape that no other has."""
    config = json.loads((source / "config.json").read_text())
    specs = {s.name: ("BF16", list(s.shape)) for s in weights.inventory(ModelArgs.from_dict(config))}
    changed = specs | hostile(specs)
    folder = write_headers(tmp_path / "h", config, ((n, d, s, 2 * math.prod(s)) for n, (d, s) in changed.items()))
    found = audit.audit(headers.headers_of(str(folder)), recipe.load("glm-5.2-3.5bit"))
    out = audit.render(found)
    assert out.count("\n") < audit.LINES
    assert max(map(len, out.split("\n"))) < LONGEST + 100
    assert out.replace("\n", "").isprintable()
    merged = json.loads(audit.as_json(found))["findings"]
    assert len(merged) < 60
    counted = sum(f["count"] for f in merged if f["severity"] == audit.FAULT)
    of_model = sum(
        not weights.is_mtp(ModelArgs.from_dict(config), n) for n in specs
    )  # an MTP layer of other shapes is left out
    assert counted >= (50_000 if hostile is add_strays else of_model)


def test_a_recipe_that_a_build_does_not_follow_takes_few_lines(packed, tmp_path, capsys):
    """A rule for each layer, all broken: merged; the same build under its own recipe has nothing to merge."""
    rules = tmp_path / "r.toml"
    rules.write_text(
        "".join(f'[[rule]]\ntensors = "*"\nlayers = "{i}"\nbits = {b}\n' for i, b in enumerate((2, 3, 5, 6, 8)))
    )
    assert main(["audit", str(packed), "--recipe", str(rules)]) == 1
    out = capsys.readouterr().out
    assert out.count("\n") <= audit.LINES
    assert "more findings" in out or "more tensors" in out
    plain = [f for f in findings(packed) if "recipe" in f]
    assert plain == []


def test_what_cannot_be_audited_is_told_in_a_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    for target, message in (
        (str(tmp_path / "no"), "no such folder, and no name of a repository"),
        (str(tmp_path / "empty"), "config.json: No such file or directory"),
        ("nobody/nothing-at-all", "no such folder here, and the hub does not give it"),
    ):
        assert main(["audit", target]) == 10
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert main(["audit", str(ROOT / "reference" / "trained" / "interleaved"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mtp"] == "present"


@pytest.mark.parametrize(
    ("numbers", "text"), [([0, 1, 2, 6], "0-2,6"), ([5], "5"), ([1, 3, 5], "1,3,5"), ([], "")], ids=str
)
def test_ranges(numbers, text):
    assert merging.ranges(numbers) == text
