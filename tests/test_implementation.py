"""Somebody's code on trial: mlx-lm's own, patched copies of it with a fault each, and files that are no model at all."""

import subprocess
import sys
from pathlib import Path

import mlx_lm.models.deepseek_v32
import numpy as np
import pytest

from docs import runs
from verify.cases import Case
from verify.claims import test_implementation_cache as on_caches
from verify.claims import test_implementation_kv_bits as on_kv_bits
from verify.core import stages
from verify.core.collector import Collector
from verify.core.report import Report
from verify.engines.marshal import new_cache
from verify.engines.third_party import Failed, Implementation
from verify.implementation import subject as on_trial
from verify.implementation.judge import judge_case, judged_before
from verify.implementation.subject import Theirs

ROOT = Path(__file__).parents[1]
STOCK = "mlx_lm.models.glm_moe_dsa"
SOURCE = Path(mlx_lm.models.deepseek_v32.__file__).read_text()
EPS = ("self.k_norm = nn.LayerNorm(self.head_dim)", "self.k_norm = nn.LayerNorm(self.head_dim, eps=1e-6)")
SPECS = {spec.name: spec for spec in on_trial.specs()}


def patched(folder, *changes) -> str:
    """mlx-lm's file with its eps mended, and what else is to be changed; its relative imports stay."""
    text = SOURCE
    for old, new in (EPS, *changes):
        assert old in text, old
        text = text.replace(old, new)
    file = folder / "my_glm.py"
    file.write_text(f"{text}\n\nfrom .glm_moe_dsa import ModelArgs\n")
    return str(file)


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """(name of a case, implementation) -> Theirs; each case and its references are built once."""
    cases, references = {}, {}

    def build(name, text):
        if name not in cases:
            cases[name] = Case(SPECS[name], tmp_path_factory.getbasetemp() / "checkpoints", 0)
        out = Theirs(Implementation.of(text), cases[name])
        out._references = references.setdefault(name, {})
        return out

    return build


def judged(theirs):
    """(["stage: note"] of each fault, {what was not verified: why})."""
    collector = Collector(Report(), "claim", "again", 0)
    unseen = judge_case(theirs, collector)
    assert len(collector.report.comparisons) > 50 or collector.faults
    return [f"{fault.stage}: {fault.note}" for fault in collector.faults], unseen


@pytest.mark.parametrize("case", ["glm-5.1-interleaved", "glm-5.1-half-split"])
def test_mlx_lms_own_has_one_eps_wrong(trial, case):
    faults, unseen = judged(trial(case, STOCK))
    stages = [f"layers.{i}.self_attn.indexer.k_norm" for i in range(3)]
    assert sorted(faults) == [f"{stage}: eps 1e-05 measured, 1e-06 is the reference's" for stage in stages]
    assert [*unseen] == ["modules by themselves: self_attn.kv_b_proj, mlp.experts"]


def test_with_that_eps_mended_it_agrees(trial, tmp_path):
    assert judged(trial("glm-5.1-half-split", patched(tmp_path)))[0] == []


def test_our_own_definition_agrees(trial):
    faults, unseen = judged(trial("glm-5.2-interleaved", "glm_dsa"))
    assert faults == []
    assert [*unseen] == ["modules by themselves: self_attn.kv_b_proj, mlp.experts"]


FAULTS = {
    "softmax scale": (
        ("self.scale = self.scale * s * s", "self.scale = self.scale * s * s * 1.01"),
        "layers.0.self_attn.heads: error",
    ),
    "no mscale": (
        ("self.scale = self.scale * s * s", "pass"),
        "layers.0.self_attn.heads: as with softmax scale 1 / sqrt(qk_head_dim), without YaRN's mscale",
    ),
    "main RoPE": (("traditional=True", "traditional=False"), "layers.0.self_attn.heads: as under main RoPE half-split"),
    "dense": (
        ("topk_indices = self.indexer(x, qr, mask, cache=cache[1])", "topk_indices = None"),
        "layers.0.self_attn.heads: every key is attended to",
    ),
    "indexer RoPE": (
        ("traditional=args.indexer_rope_interleave", "traditional=not args.indexer_rope_interleave"),
        "layers.0.self_attn.indexer: as under half-split RoPE",
    ),
    "ReLU": (("scores = mx.maximum(scores, 0)", "pass"), "layers.0.self_attn.indexer: as without the ReLU"),
    "correction bias": (
        ("scores = scores + e_score_correction_bias", "pass"),
        "layers.1.mlp.gate: as without e_score_correction_bias",
    ),
    "routing weights": (
        ("scores = scores * routed_scaling_factor", "pass"),
        "layers.1.mlp.gate.weights: 0.4 times what was expected",
    ),
    "latent eps": (
        ("nn.RMSNorm(self.q_lora_rank, eps=1e-6)", "nn.RMSNorm(self.q_lora_rank, eps=1e-5)"),
        "layers.0.self_attn.q_a_layernorm: eps 1e-05 measured, 1e-06 is the reference's",
    ),
    "shared expert": (("y = y + self.shared_experts(x)", "pass"), "layers.1.mlp: error"),
    "residual": (("return h + r", "return x + r"), "layers.0: error"),
    "nothing": (("return h + r", "return None"), "layers.0: gives nothing (None); expected an array [1, 14, 64]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_where_it_is(trial, tmp_path, fault):
    """In the layers that have it, and nowhere behind it."""
    change, due = FAULTS[fault]
    faults, _ = judged(trial("glm-5.1-interleaved", patched(tmp_path, change)))
    assert faults
    assert min(faults).startswith(due), faults
    assert len({stages.kind_of(fault.split(":")[0]) for fault in faults}) == 1, faults


def test_code_that_is_cut_otherwise_is_no_fault(trial, tmp_path):
    """Index heads in another order: projections differ, the selection does not."""
    change = (
        "        # Stack experts\n",
        "        for k, v in list(weights.items()):\n"
        '            if "indexer.wq_b" in k:\n'
        "                weights[k] = v.reshape(self.args.index_n_heads, -1, v.shape[-1])[::-1].reshape(v.shape)\n"
        '            if "weights_proj" in k:\n'
        "                weights[k] = v[::-1]\n",
    )
    faults, unseen = judged(trial("glm-5.1-interleaved", patched(tmp_path, change)))
    assert faults == []
    due = "it differs from HF's; what is made of it, at the next boundary, does not"
    assert unseen["self_attn.indexer.wq_b by itself"] == unseen["self_attn.indexer.weights_proj by itself"] == due


def logits_faults(theirs, *, mended=True):
    """What is wrong with its logits in chunks, its modules judged first."""
    assert judged_before(theirs) == ""
    if not mended:
        theirs.mended.clear()
    collector = Collector(Report(), "claim", "again", 0)
    tokens = theirs.reference(theirs.case.long).reference.tokens
    cuts = theirs.case.scaled(on_caches.CUTS["chunks"])
    on_caches.judge_run(
        theirs, collector, "logits", lambda watch: on_caches.in_cuts(watch, tokens, cuts, new_cache(theirs.model))
    )
    return [fault.note for fault in collector.faults]


def test_behind_a_fault_that_was_named_caches_are_judged_on_their_own(trial):
    """The wrong eps moves the logits by itself; with HF's keys in its place, chunks agree."""
    assert logits_faults(trial("glm-5.1-interleaved", STOCK)) == []
    (note,) = logits_faults(trial("glm-5.1-interleaved", STOCK), mended=False)
    assert note.startswith("error ")


@pytest.mark.parametrize("where", ["cache", "cache[0]"])
def test_a_fault_of_the_cache_alone_is_found(trial, tmp_path, where):
    """Chunks that are rotated as if each began at position 0, in the indexer or in attention."""
    change = (f"offset = {where}.offset if cache is not None else 0", "offset = 0")
    theirs = trial("glm-5.1-interleaved", patched(tmp_path, change))
    (note,) = logits_faults(theirs)
    assert note.startswith("error ")
    assert not theirs.mended


def test_where_attention_is_at_fault_caches_are_not_judged(trial, tmp_path):
    theirs = trial("glm-5.1-interleaved", patched(tmp_path, FAULTS["dense"][0]))
    assert judged_before(theirs) == "what reads them is at fault (self_attn.heads)"


def test_kv_bits(trial):
    with pytest.raises(
        Failed, match=r"^does not engage: caches \(CacheList of KVCache, KVCache\) have no to_quantized; "
    ):
        on_kv_bits.decode_packed(trial("glm-5.1-interleaved", STOCK))
    before, after, logits = on_kv_bits.decode_packed(trial("glm-5.1-interleaved", "glm_dsa"))
    assert after < before
    assert np.isfinite(logits).all()


def test_a_model_inside_another_is_seen_too(trial, tmp_path):
    file = tmp_path / "wrapped.py"
    file.write_text(
        f"import mlx.nn as nn\nfrom {STOCK} import Model as Inner, ModelArgs\n\n"
        "class Model(nn.Module):\n"
        "    def __init__(self, config):\n        super().__init__()\n        self.language_model = Inner(config)\n"
        "    def __call__(self, tokens, cache=None):\n        return self.language_model(tokens, cache)\n"
        "    def sanitize(self, weights):\n"
        "        return {f'language_model.{k}': v for k, v in self.language_model.sanitize(weights).items()}\n"
    )
    faults, unseen = judged(trial("glm-5.1-interleaved", str(file)))
    assert sorted(faults)[0] == "layers.0.self_attn.indexer.k_norm: eps 1e-05 measured, 1e-06 is the reference's"
    assert [*unseen] == ["modules by themselves: self_attn.kv_b_proj, mlp.experts"]


def test_copies_of_indexers_are_not_indexshare(trial, tmp_path):
    """They load; but a copy scores its own layer's input."""
    change = (
        "        # Stack experts\n",
        "        for k in [k for k in weights if 'layers.2.self_attn.indexer' in k]:\n"
        "            for layer in '345':\n"
        "                weights[k.replace('layers.2.', f'layers.{layer}.')] = weights[k]\n"
        "            weights[k.replace('layers.2.', 'layers.7.')] = weights[k.replace('layers.2.', 'layers.6.')]\n",
    )
    faults, _ = judged(trial("glm-5.2-interleaved", patched(tmp_path, change)))
    assert [fault.split(":")[0] for fault in faults] == [f"layers.{i}.self_attn.heads" for i in (3, 4, 5, 7)]
    assert faults[0].endswith(
        "a shared layer has an indexer of its own; expected the selection of the full layer below"
    )


BROKEN = {
    "def __init__(self, config): raise RuntimeError('no such chip')": "RuntimeError: no such chip (broken.py, line 5)",
    "def __init__(self, config): raise SystemExit(3)": "SystemExit: 3 (broken.py, line 5)",
    "def sanitize(self, weights): return {}": "it expects tensors that the checkpoint has not: lm_head.weight",
}


@pytest.mark.parametrize("body", BROKEN)
def test_what_does_not_load_is_told_in_a_line(trial, tmp_path, body):
    file = tmp_path / "broken.py"
    file.write_text(
        f"from {STOCK} import ModelArgs\nfrom {STOCK} import Model as Base\n\nclass Model(Base):\n    {body}\n"
    )
    with pytest.raises(Failed) as error:
        judged(trial("glm-5.1-interleaved", str(file)))
    assert BROKEN[body] in str(error.value)
    assert "\n" not in str(error.value)


def test_what_raises_as_it_runs_is_told_in_a_line(trial, tmp_path):
    theirs = trial("glm-5.1-interleaved", patched(tmp_path, ("r = self.mlp(", "r = self.nlp(")))
    with pytest.raises(Failed, match=r"^AttributeError: .*'nlp'.* \(my_glm.py, line \d+\)$"):
        judged(theirs)
    assert theirs.blind_spot() == "it does not run"


def test_keys_that_its_args_ask_for(trial, tmp_path):
    file = tmp_path / "more.py"
    file.write_text(
        f"from dataclasses import dataclass\nfrom {STOCK} import Model\nfrom mlx_lm.models.base import BaseModelArgs\n\n"
        "@dataclass\nclass ModelArgs(BaseModelArgs):\n    dsa_style: str\n"
    )
    with pytest.raises(Failed, match=r"^its ModelArgs asks for keys that config.json has not: 'dsa_style'$"):
        judged(trial("glm-5.1-interleaved", str(file)))


NO_MODEL = {
    "": "it has no class Model",
    "class Model: pass": "it has no class ModelArgs",
    "class Model: pass\nclass ModelArgs: pass": "its ModelArgs has no from_dict",
    "Model = (": "its import raises SyntaxError: '(' was never closed (no_model.py, line 1)",
    "raise SystemExit(2)": "its import raises SystemExit: 2 (no_model.py, line 1)",
    "import torch_of_mine": "its import raises ModuleNotFoundError: No module named 'torch_of_mine' (no_model.py, line 1)",
    "from .nowhere import Model": "its import raises ModuleNotFoundError: No module named 'mlx_lm.models.nowhere'",
}


@pytest.mark.parametrize("text", NO_MODEL)
def test_what_is_no_model_is_refused_in_a_line(tmp_path, text):
    file = tmp_path / "no_model.py"
    file.write_text(text)
    with pytest.raises(ValueError, match="--implementation") as error:
        Implementation.of(str(file))
    assert NO_MODEL[text] in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_not_there():
    for text, due in {
        "nowhere/my_glm.py": "no such file",
        "mlx_lm.models.glm_moe_dsb": "no module of that name",
        "nosuchpackage.models": "no module of that name",
        "": "expected MODULE or FILE.py",
        f"{STOCK}:Modell": "it has no class Modell",
    }.items():
        with pytest.raises(ValueError, match=due):
            Implementation.of(text)


def run(*arguments):
    out = subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT, capture_output=True, text=True)
    return out.returncode, out.stdout + out.stderr


@pytest.mark.slow("verify/implementation", "verify/engines/third_party", "verify/gate")
def test_the_gate_on_mlx_lms_own():
    """Red, each fault named, what was not seen listed, no traceback; and none of the claims on our own definition."""
    out = runs.said(runs.STOCK)
    assert "Traceback" not in out
    table = out[out.index("\nclaim ") :]
    assert "eps 1e-05 measured, 1e-06 is the reference's  [glm-5.1-interleaved, glm-5.1-half-split, " in table
    assert "layers 0-2, self_attn.indexer.k_norm: eps" in table
    assert "IndexShare not implemented: it expects indexer tensors on shared layers 3-5, 7, of which the" in table
    assert "--kv-bits 8: does not engage: caches (CacheList of KVCache, KVCache) have no to_quantized; " in table
    assert "with 0 for the experts of losing groups" in table
    assert "implementation: logits and caches: it does not load: glm-5.2-interleaved, " in table
    assert "final logits" not in table
    assert table.strip().splitlines()[-1].startswith("verdict: FAULT in 2 of 3 claims")
