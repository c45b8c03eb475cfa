"""`python -m verify audit`: what headers tell, on releases of every format, on damaged ones, and at full size."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
import torch
from safetensors.torch import load_file, save_file

import glm_dsa
from glm_dsa import ModelArgs, weights
from glm_dsa.checkpoint import ITEM_BYTES
from glm_dsa.model import parameters_of
from reference import checkpoints
from reference.stored import read_tensors
from tests.builds import write_headers
from verify import audit, release
from verify.__main__ import main

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "verify" / "configs"


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


@pytest.mark.parametrize("name", sorted(f.stem for f in CONFIGS.glob("*.json")))
def test_full_size_takes_seconds(name, tmp_path):
    """In under 5 s and 500 MiB, as a process; on the 1.5 TB of each published config."""
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    folder = write_sparse(tmp_path / name, config, fp8="quantization_config" in config)
    script = (
        "import re, resource, sys, time; start = time.monotonic(); from verify.__main__ import main; code = main(sys.argv[1:]);"
        "own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if sys.platform == 'darwin' else "  # counts the parent, too
        "int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024;"
        "print(code, time.monotonic() - start, own, file=sys.stderr)"
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


def findings(folder, severity=audit.FAULT):
    return [f.what for f in audit.audit(release.headers_of(str(folder))).findings if f.severity == severity]


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
    found = audit.audit(release.headers_of(str(source)))
    assert found.findings == []
    assert found.layout == "HF"
    assert found.mtp == "present"
    total = sum(c.parameters for c in found.components.values())
    read = read_tensors(source)
    assert total == sum(read(name, torch.float32).numel() for name in read.names)
    assert found.nbytes == sum(read(name).nbytes // 4 for name in read.names) + 2 * sum(
        read(name).size for name in read.names if name.endswith("correction_bias")
    )


def test_an_indexer_on_a_shared_layer(folder):
    add(folder, **{"model.layers.3.self_attn.indexer.wk.weight": torch.zeros(128, 64)})
    assert any("an indexer on shared layers 3 (1 tensors)" in f for f in findings(folder))


def test_indexers_that_are_missing_are_named_by_layer(folder):
    remove(folder, "layers.1.self_attn.indexer.")
    (line,) = findings(folder)
    assert "no indexer on layers 1 (5 tensors missing), where one is due: indexer_schedule" in line


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
    assert "model.norm.weight is [3]: [64] is due" in text
    assert "o_proj.weight is U8: floating point is due" in text
    assert "q_a_proj.weight: FP8 without" in text
    assert any("correction bias: bf16 on 1 tensors" in f for f in findings(folder, audit.WARNING))


def test_a_router_or_an_indexer_packed_breaks_the_policy(source, tmp_path):
    model = glm_dsa.load(source)
    nn.quantize(model, 64, 4, class_predicate=lambda path, m: hasattr(m, "to_quantized"))
    tensors = parameters_of(model)
    gate = "model.layers.1.mlp.gate"
    parts = mx.quantize(tensors.pop(f"{gate}.weight"), 64, 4)
    tensors |= {f"{gate}.{part}": t for part, t in zip(weights.PACKED, parts, strict=True)}
    (tmp_path / "q").mkdir()
    mx.save_safetensors(str(tmp_path / "q" / "model.safetensors"), tensors)
    (tmp_path / "q" / "config.json").write_text((source / "config.json").read_text())
    text = "\n".join(findings(tmp_path / "q"))
    assert "router: 4 bit, groups of 64 on 1 tensors (model.layers.1.mlp.gate.weight)" in text
    assert "indexer: 4 bit, groups of 64 on" in text
    warnings = "\n".join(findings(tmp_path / "q", audit.WARNING))
    assert "embedding: 4.5 bits a weight; at least 6 are advised" in warnings
    assert "no key quantization" in warnings


def test_what_config_says_of_packing_is_held_to_the_shapes(source, tmp_path):
    """mlx-lm's mixed recipes write group_size None; that is the mode's own."""
    model = glm_dsa.load(source)
    nn.quantize(model, 64, 3, class_predicate=lambda path, m: path.endswith("o_proj"))
    (tmp_path / "q").mkdir()
    mx.save_safetensors(str(tmp_path / "q" / "model.safetensors"), parameters_of(model))
    config = json.loads((source / "config.json").read_text())
    names = [path for path, m in model.named_modules() if path.endswith("o_proj")]
    for bits, count in ((3, 0), (6, len(names))):
        own = {name: {"group_size": None, "bits": bits, "mode": "affine"} for name in names}
        said = {"quantization": {"group_size": 32, "bits": 4, "mode": "affine"} | own}
        (tmp_path / "q" / "config.json").write_text(json.dumps(config | said))
        warnings = [w for w in findings(tmp_path / "q", audit.WARNING) if "packed otherwise" in w]
        assert [w.split()[0] for w in warnings] == [str(count)] * (count > 0)


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
    assert audit.ranges(numbers) == text
