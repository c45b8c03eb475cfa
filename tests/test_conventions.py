"""Conventions are resolved once, and handed to every oracle; the reference's own reading of a config is held to that."""

import ast
import json
import shutil
from itertools import product
from pathlib import Path

import pytest

from glm_dsa import ModelArgs
from reference import checkpoints
from reference.equations import Conventions
from verify.engines.conventions import conventions_in, conventions_of
from verify.engines.headers import headers_of
from verify.release.request import OnTrial
from verify.release.run import Trial

VALUES = {
    "indexer_rope_traditional": (None, True, False),
    "indexer_rope_interleave": (None, True, False),
    "rope_interleave": (None, True, False),
    "indexer_norm_eps": (None, 1e-5),
    "latent_norm_eps": (None, 1e-5),
    "index_share_for_mtp_iteration": (None, True, False),
    "mtp_zero_first_embedding": (None, True),
}
TRAINED = Path(checkpoints.__file__).parent / "trained"
# What the published half-split builds of GLM-5.2 carry: zai-org's key, and the builder's own.
PUBLISHED = {"indexer_rope_interleave": True, "indexer_rope_traditional": False, "indexer_norm_eps": 1e-6}


def test_both_readings_agree_for_every_combination_of_keys():
    base = {k: v for k, v in checkpoints.TINY.items() if k not in VALUES}
    for values in product(*VALUES.values()):
        config = base | dict(zip(VALUES, values, strict=True))
        assert Conventions.of(config) == conventions_of(ModelArgs.from_dict(config)), config
    flash = checkpoints.glm_4_7()
    for interleave in VALUES["rope_interleave"]:
        config = flash | {"rope_interleave": interleave}
        assert Conventions.of(config).main_rope == conventions_in(config).main_rope


def test_overrides_reach_the_oracles():
    assert conventions_in(checkpoints.TINY, indexer_rope="half-split").indexer_rope == "half-split"


def test_no_oracle_of_the_gate_reads_a_convention_out_of_a_config():
    for file in (Path(__file__).parents[1] / "verify").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            reads = isinstance(node, ast.Attribute) and node.attr == "of" and ast.unparse(node.value) == "Conventions"
            assert not reads, f"{file.name}, line {node.lineno}: conventions_of(args) is the one source"


@pytest.fixture
def half_split(tmp_path):
    folder = tmp_path / "build"
    shutil.copytree(TRAINED / "half-split", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | PUBLISHED))
    return folder


def test_the_builders_own_key_decides_for_the_release_and_its_oracles(half_split):
    """The config of the published half-split builds: both keys, which contradict each other."""
    release = OnTrial.of(headers_of(str(half_split)), tokens=40, layers={0})
    trial = Trial(release, 0)
    assert release.args.indexer_rope == trial.run.truth.side.conventions.indexer_rope == "half-split"
    assert type(trial.run.theirs.layers.model.model.layers[0].self_attn.indexer).__name__ == "DeepseekV32Indexer"
    contested = next(c for c in release.args.conventions if c.name == "indexer_rope")
    assert "indexer_rope_interleave" in contested.contested
