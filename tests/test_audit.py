"""`python -m verify audit`: what headers tell, on releases of every format, on damaged ones, and at full size."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from glm_dsa import ModelArgs, weights
from reference import checkpoints

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "verify" / "configs"
SHARD = 5 << 30


def write_sparse(folder, config, fp8=False):
    """A checkpoint of full size whose files are all header: the data is a hole."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shards, size = [{}], 0
    for spec in weights.inventory(ModelArgs.from_dict(config)):
        is_fp8 = fp8 and len(spec.shape) == 2 and not any(part in spec.name for part in checkpoints.NOT_FP8)
        parts = {spec.name: ("F8_E4M3" if is_fp8 else "BF16", spec.shape)}
        if spec.name.endswith("e_score_correction_bias"):
            parts = {spec.name: ("F32", spec.shape)}
        if is_fp8:
            parts[f"{spec.name}_scale_inv"] = ("F32", tuple(-(-n // 128) for n in spec.shape))
        for name, (dtype, shape) in parts.items():
            count = int(np.prod(shape)) * {"F8_E4M3": 1, "BF16": 2, "F32": 4}[dtype]
            if size + count > SHARD:
                shards, size = [*shards, {}], 0
            shards[-1][name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [size, size + count]}
            size += count
    index = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        header = json.dumps(shard).encode()
        with (folder / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(header)) + header)
            stream.truncate(8 + len(header) + max(t["data_offsets"][1] for t in shard.values()))
        index |= dict.fromkeys(shard, file)
    (folder / checkpoints.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


@pytest.mark.parametrize("name", sorted(f.stem for f in CONFIGS.glob("*.json")))
def test_full_size_takes_seconds(name, tmp_path):
    """In under 5 s and 500 MiB, as a process; on the 1.5 TB of each published config."""
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    folder = write_sparse(tmp_path / name, config, fp8="quantization_config" in config)
    script = (
        "import resource, sys, time; start = time.monotonic(); from verify.__main__ import main; code = main(sys.argv[1:]);"
        "used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "print(code, time.monotonic() - start, used if sys.platform == 'darwin' else used * 1024, file=sys.stderr)"
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
    print(name, seconds, int(peak) / 2**20, found["bytes"] / 1e12)
    assert float(seconds) < 5
    assert int(peak) < 500 << 20
