"""Each check of the gate is proven able to fail: a wrong convention or a seeded fault is caught, at its stage.

Where a value is compared, the fault must move it by at least 100 times the bound that the gate uses there.
"""

import copy
import pkgutil
from dataclasses import replace

import mlx.core as mx
import pytest
from hypothesis import Phase

from glm_dsa import attention, cache, rope
from glm_dsa.store import KvQuantization
from verify import cases, faults
from verify.claims import test_cache_operations, test_kv_quantization, test_mtp, test_rope
from verify.core import bounds, stages
from verify.core.checker import Discrepancy, Judge
from verify.core.report import FAULT, RAISES, Comparison, Report
from verify.engines.definition import Ours

MARGIN = 100


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder, kept = tmp_path_factory.mktemp("cases"), {}

    def get(name):
        if name not in kept:
            spec = next(s for s in cases.default_specs() if s.name == name)
            kept[name] = cases.Case(spec, folder, seed=0)
        return kept[name]

    return get


def caught(check, **given):
    """The comparison at which a check of a claim ("test_cache.test_cuts") stops, or None where it is content."""
    judge = Judge(Report(), "claim", "again", 0)
    try:
        pkgutil.resolve_name(f"verify.claims.{check}")(judge=judge, **given)
    except Discrepancy:
        return judge.report.comparisons[-1]
    return None


def layers(case):
    return caught("test_layers.test_each_layer_agrees_stage_by_stage", case=case, regime="long")


def free(case):
    return caught("test_logits.test_logits", case=case, gate=Report(), regime="long", run="free")


def chunks(case):
    return caught("test_cache.test_cuts", case=case, name="chunks")


def rewind(case):
    return caught("test_cache.test_rewind", case=case, reference=case.reference(case.long))


def padded(case):
    return caught("test_cache.test_left_padded_batch", case=case, cuts=[33, 40] + [1] * 7)


def drafts(case):
    return caught("test_mtp.check", case=case, length=case.lengths[-1], overrides={"mtp_reuses_selection": True})


def drafts_anew(case):
    return caught("test_mtp.check", case=case, length=case.lengths[-1], overrides={"mtp_reuses_selection": False})


def packed(case):
    """The claim's first tests about the packed cache, in their order."""
    checks = {
        "test_kv_quantization.test_packed_is_mx_quantize_of_the_latents": {"cuts": [40, 37, 1, 1, 1]},
        "test_kv_quantization.test_the_error_of_each_value": {"dtype": mx.float32},
    }
    return next((found for check, more in checks.items() if (found := caught(check, case=case, bits=8, **more))), None)


def contents(folder):
    """Random sequences of cache operations, within as many as the gate draws."""
    judge = Judge(Report(), "claim", "again", 0)
    try:
        test_cache_operations.run(
            lambda: test_cache_operations.Contents(judge, folder), examples=60, steps=25, phases=[Phase.generate]
        )
    except Exception as error:
        known = [c for c in judge.report.comparisons if c.verdict == FAULT]
        return known[0] if known else Comparison("claim", "case", RAISES, FAULT, note=str(error))
    return None


def check_of(found, stage, margin=MARGIN):
    assert found is not None, "the gate did not notice"
    assert found.verdict == FAULT
    assert found.stage.startswith(stage)
    if found.bound:
        assert found.share >= margin, f"moves {found.stage} by only {found.share:.3g} bounds"


@pytest.mark.parametrize("check", [layers, free, chunks, rewind, padded, drafts, drafts_anew])
@pytest.mark.parametrize("name", ["glm-5.2-interleaved", "grouped-half-split"])
def test_without_a_fault_all_is_well(built, check, name):
    assert check(built(name)) is None


CONVENTIONS = [
    ("glm-5.2-interleaved", {"indexer_rope": "half-split"}, layers, "layers.0.self_attn.indexer.k"),
    ("glm-5.2-half-split", {"indexer_rope": "interleaved"}, layers, "layers.0.self_attn.indexer.k"),
    ("glm-5.2-interleaved", {"indexer_norm_eps": 1e-5}, layers, "layers.0.self_attn.indexer.k"),
    ("glm-5.2-interleaved", {"latent_norm_eps": 1e-5}, layers, "layers.0.self_attn.q_latent"),
    ("glm-5.1-interleaved", {"latent_norm_eps": 1e-6}, layers, "layers.0.self_attn.q_latent"),
    ("glm-4.7", {"latent_norm_eps": 1e-5}, layers, "layers.0.self_attn.q_latent"),
    ("glm-5.2-interleaved", {"main_rope": "half-split"}, layers, "layers.0.self_attn.q_rope"),
    ("glm-5.2-interleaved", {"index_topk": 15}, layers, "layers.0.self_attn.indexer.topk"),
]


@pytest.mark.parametrize(("name", "wrong", "check", "stage"), CONVENTIONS, ids=[str(c[1]) + c[0] for c in CONVENTIONS])
def test_a_wrong_convention_is_caught(built, name, wrong, check, stage, monkeypatch):
    case = built(name)
    monkeypatch.setitem(case.__dict__, "ours", Ours(case.folder, **{**case.spec.overrides, **wrong}))
    check_of(check(case), stage)


@pytest.mark.parametrize("wrong", [{"mtp_reuses_selection": False}, {"mtp_zero_first_embedding": True}], ids=str)
def test_a_wrong_convention_of_mtp_is_caught(built, wrong, monkeypatch):
    case = built("glm-5.2-interleaved")
    monkeypatch.setattr(test_mtp, "Ours", lambda folder, **overrides: Ours(folder, **{**overrides, **wrong}))
    check_of(drafts(case), "mtp step 1 hidden" if "mtp_reuses_selection" in wrong else "mtp step 0 hidden")


def test_an_oracle_that_is_wrong_is_caught(built, monkeypatch):
    """HF's k_norm with another eps than asked for: no bound may grow to cover it, in a file that is run alone too."""
    case = built("glm-5.2-interleaved")
    monkeypatch.setattr(case.hf.model.layers[0].self_attn.indexer.k_norm, "eps", 1e-5)
    with pytest.raises(bounds.ReferencesDisagree):
        caught("test_indexer.test_scores_and_selection", case=case, length="T = 4 index_topk", scale="small variance")


@pytest.mark.parametrize(("name", "wrong"), [("glm-5.2-interleaved", 2e-4), ("trained-interleaved", 2e-3)])
@pytest.mark.parametrize("local", [True, False])
def test_an_oracle_that_errs_more_than_float32_explains_is_caught(built, name, wrong, local, monkeypatch):
    reference = cases.Reference(built(name), built(name).tokens(80))
    stage = "layers.1.self_attn.heads"
    assert reference.bound(stage, local)
    monkeypatch.setitem(reference.local if local else reference.accumulated, stage, wrong)
    with pytest.raises(bounds.ReferencesDisagree):
        reference.bound(stage, local)


@pytest.mark.parametrize(
    ("wrong", "position"),
    [("off by one", p) for p in test_rope.POSITIONS] + [("frequencies", p) for p in test_rope.POSITIONS[1:]],
)
def test_wrong_angles_are_caught_near_and_far(monkeypatch, wrong, position):
    original = rope.RotaryEmbedding.__call__

    def call(self, positions):
        if wrong == "off by one":
            return original(self, positions + 1)
        self.frequencies = self.frequencies * (1 + 1e-4)
        return original(self, positions)

    monkeypatch.setattr(rope.RotaryEmbedding, "__call__", call)
    found = caught("test_rope.test_rotation", theta="theta 8e6", layout="interleaved", position=position)
    check_of(found, f"position {position}", margin=MARGIN if position < 200_000 and wrong == "off by one" else 1)


# -- a sample of the catalogue; `make judge` takes all of it

SAMPLE = {
    "indexer-no-relu": layers,
    "shared-layer-goes-dense": free,
    "mla-rope-half": layers,
    "router-group-fill-zero": layers,
    "topk-unmasked-decode": padded,
    "rope-offset-after-cache": chunks,
    "trim-main-only": rewind,
    "kv-bits-no-op": packed,
    "right-padding-stays": contents,
    "mtp-concat-order": drafts,
}
OTHERWISE = {
    "rope-offset-after-cache": "logits (chunks)"
}  # by this check; in the gate's order another one meets it first


@pytest.mark.parametrize("name", SAMPLE)
def test_a_seeded_fault_is_caught_at_its_stage(built, name, monkeypatch, tmp_path):
    fault, check = faults.named(name), SAMPLE[name]
    case = built("grouped-interleaved" if "group" in name else "glm-5.2-interleaved")
    on_trial = tmp_path if check is contents else case
    with faults.seeded(name):
        monkeypatch.delitem(case.__dict__, "ours", raising=False)
        found = check(on_trial)
    monkeypatch.delitem(case.__dict__, "ours", raising=False)
    assert found is not None, "the gate did not notice"
    where = replace(found, stage=stages.kind(found.stage))
    check_of(where, OTHERWISE.get(name, fault.stage))
    assert check(on_trial) is None, "the fault outlived its seed"


@pytest.mark.parametrize("name", ["glm-5.2-interleaved", "glm-4.7"])
def test_four_bits_for_eight_drift_too_far(built, name, monkeypatch):
    """Where nothing else would tell them apart."""
    case = built(name)
    original = test_kv_quantization.packed_run
    monkeypatch.setattr(
        test_kv_quantization, "packed_run", lambda c, t, cuts, bits, **kw: original(c, t, cuts, 4, **kw)
    )
    found = caught("test_kv_quantization.test_drift_of_the_logits", case=case)
    assert found is not None
    assert "KL" in found.stage


def test_attention_that_loses_more_than_packing_explains_is_caught(built, monkeypatch):
    case = built("glm-5.2-interleaved")
    original = KvQuantization.unpack
    monkeypatch.setattr(KvQuantization, "unpack", lambda self, w, s, b: original(self, w, s, b * 1.1))
    found = caught("test_kv_quantization.test_what_attention_may_lose", case=case)
    assert found is not None
    assert found.stage == "layers.0.self_attn.heads"


def test_copies_that_share_their_buffers_are_found(monkeypatch, tmp_path):
    monkeypatch.setattr(cache.LayerCache, "__deepcopy__", lambda self, _: copy.copy(self), raising=False)
    found = contents(tmp_path)
    assert found is not None
    assert found.verdict == FAULT


def test_every_norms_eps_counts(built, monkeypatch):
    """rms_norm_eps is 0.05 in one case: at the published 1e-5 another eps would hide in the rounding."""
    case = built("grouped-interleaved")
    backbone = case.ours.model.model
    for norm, check, stage in (
        (backbone.norm, free, "norm"),
        (backbone.layers[1].input_layernorm, layers, "layers.1.input_layernorm"),
        (backbone.layers[1].post_attention_layernorm, layers, "layers.1.post_attention_layernorm"),
    ):
        with monkeypatch.context() as context:
            context.setattr(norm, "eps", 1e-6)
            check_of(check(case), stage)


@pytest.mark.parametrize("norm", ["enorm", "hnorm", "shared_head"])
def test_every_mtp_norms_eps_counts(built, monkeypatch, norm):
    case = built("grouped-interleaved")

    def build(*arguments, **overrides):
        ours = Ours(*arguments, **overrides)
        module = getattr(ours.model.mtp, norm)
        getattr(module, "norm", module).eps = 1e-6
        return ours

    monkeypatch.setattr(test_mtp, "Ours", build)
    check_of(drafts_anew(case), "mtp step 0 hidden")


def test_a_form_that_differs_is_caught(built, monkeypatch):
    case = built("glm-5.2-interleaved")
    original = attention.MultiHeadLatentAttention.attend_absorbed
    monkeypatch.setattr(
        attention.MultiHeadLatentAttention, "attend_absorbed", lambda self, *a: original(self, *a) * 1.001
    )
    found = caught("test_attention.test_forms", case=case, monkeypatch=monkeypatch, form=attention.ABSORBED, cuts=[80])
    check_of(found, "layers.0.self_attn.heads (absorbed)")


# -- what only a trained model shows

TRAINED_CASE = "trained-interleaved"


def recall(case):
    return caught("test_behaviour.test_recall_from_beyond_index_topk", case=case, gate=Report())


def own_drafts(case):
    return caught("test_behaviour.test_drafts", case=case, gate=Report())


def layout_told(case):
    return caught("test_behaviour.test_the_weights_tell_their_layout", case=case, gate=Report())


@pytest.mark.parametrize(
    ("name", "check", "stage"),
    [("indexer-selects-recent", recall, "answer"), ("mtp-concat-order", own_drafts, "drafts of text")],
)
def test_a_fault_of_behaviour_is_caught(built, name, check, stage):
    case = built(TRAINED_CASE)
    with faults.seeded(name):
        check_of(check(case), stage)


def test_the_wrong_layout_loses_what_was_said(built, monkeypatch):
    case = built(TRAINED_CASE)
    monkeypatch.setitem(case.__dict__, "ours", Ours(case.folder, indexer_rope="half-split"))
    check_of(recall(case), "answer")


def test_a_checkpoint_that_names_the_wrong_layout_is_caught(built, tmp_path):
    """HF under the same wrong convention agrees with it in every number: the weights alone speak."""
    case = cases.Case(replace(built(TRAINED_CASE).spec, overrides={"indexer_rope": "half-split"}), tmp_path, seed=0)
    assert free(case) is None
    check_of(layout_told(case), "captured mass")
