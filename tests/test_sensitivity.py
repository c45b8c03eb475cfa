"""Each check of the gate is proven able to fail: a wrong convention or a seeded fault is caught, at its stage.

Where a value is compared, the fault must move it by at least 100 times the bound that the gate uses there.
"""

import copy
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import Phase

from glm_dsa import attention, block, cache, indexer, model, moe, mtp, rope, store, weights
from glm_dsa.rope import rotate
from glm_dsa.store import KvQuantization
from verify import (
    cases,
    test_attention,
    test_behaviour,
    test_cache,
    test_cache_operations,
    test_indexer,
    test_kv_quantization,
    test_layers,
    test_logits,
    test_mtp,
    test_rope,
    test_weights,
    tolerances,
)
from verify.candidate import Ours
from verify.judge import Judge
from verify.report import FAULT, Report

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


def caught(check, *arguments):
    """The comparison at which the gate stops, or None where it is content."""
    judge = Judge(Report(), "claim", "again", 0)
    try:
        check(*[judge if a is Judge else a for a in arguments])
    except pytest.fail.Exception:
        return judge.report.comparisons[-1]
    return None


def layers(case):
    return caught(test_layers.test_each_layer_agrees_stage_by_stage, case, Judge, "long")


def free(case):
    return caught(test_logits.test_logits, case, Judge, Report(), "long", "free")


def chunks(case):
    return caught(test_cache.test_cuts, case, Judge, "chunks")


def rewind(case):
    return caught(test_cache.test_rewind, case, Judge, case.reference(case.long))


def padded(case):
    return caught(test_cache.test_left_padded_batch, case, Judge, [33, 40] + [1] * 7)


def drafts(case):
    return caught(test_mtp.check, case, Judge, "long", {"mtp_reuses_selection": True})


def drafts_anew(case):
    return caught(test_mtp.check, case, Judge, "long", {"mtp_reuses_selection": False})


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
    with pytest.raises(tolerances.ReferencesDisagree):
        caught(test_indexer.test_scores_and_selection, case, Judge, "T = 4 index_topk", "small variance")


@pytest.mark.parametrize(("name", "wrong"), [("glm-5.2-interleaved", 2e-4), ("trained-interleaved", 2e-3)])
@pytest.mark.parametrize("local", [True, False])
def test_an_oracle_that_errs_more_than_float32_explains_is_caught(built, name, wrong, local, monkeypatch):
    reference = cases.Reference(built(name), built(name).tokens(80))
    stage = "layers.1.self_attn.heads"
    assert reference.bound(stage, local)
    monkeypatch.setitem(reference.local if local else reference.accumulated, stage, wrong)
    with pytest.raises(tolerances.ReferencesDisagree):
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
    found = caught(test_rope.test_rotation, Judge, "theta 8e6", "interleaved", position)
    check_of(found, f"position {position}", margin=MARGIN if position < 200_000 and wrong == "off by one" else 1)


# -- seeded faults: (case, patch, check, the stage at which it must be caught)


def last_instead_of_first(patch):
    def rotate_last(self, x, rotation):
        rest, turned = mx.split(x, [x.shape[-1] - self.rotary], axis=-1)
        return mx.concatenate([rest, rotate(turned, rotation, self.layout)], axis=-1)

    patch.setattr(indexer.Indexer, "_rotate_first", rotate_last)


def patched_score(change):
    def apply(patch):
        original = indexer.Indexer.score
        patch.setattr(indexer.Indexer, "score", lambda self, q, k, w, mask: change(original, self, q, k, w, mask))

    return apply


def without_relu(patch):
    patch.setattr(indexer.mx, "maximum", lambda x, _: x)


def rms_for_layer_norm(patch):
    def rms(self, x):
        return mx.fast.rms_norm(x, self.weight, self.eps) + self.bias

    patch.setattr(nn.LayerNorm, "__call__", rms)  # k_norm is the only LayerNorm there is


def not_carried(patch):
    """Full layers hand on what they were handed: shared layers use the selection of one full layer too low."""
    original = block.DecoderLayer.__call__

    def call(self, x, rotation, mask=None, layer_cache=None, selection=None):
        x, own = original(self, x, rotation, mask, layer_cache, selection)
        return x, selection if self.runs_indexer and selection is not None else own

    patch.setattr(block.DecoderLayer, "__call__", call)


def shared_goes_dense(patch):
    original = block.DecoderLayer.__call__
    patch.setattr(block.DecoderLayer, "__call__", lambda self, *a, **k: (original(self, *a, **k)[0], None))


def zeros_for_keys(patch):
    original = cache.LayerCache.append_index_keys

    def append(self, keys):
        seen = original(self, keys)
        self.index_keys.buffers = [mx.zeros_like(buffer) for buffer in self.index_keys.buffers]
        return mx.concatenate([seen[:, : -keys.shape[1]], keys], axis=1)

    patch.setattr(cache.LayerCache, "append_index_keys", append)


def positions_from_zero(patch):
    patch.setattr(cache.LayerCache, "offset", property(lambda self: self.start))


def trims_the_latent_only(patch):
    def trim(self, tokens):
        self.latents.trim(tokens)
        return tokens

    def append(self, keys):
        return original(self, keys)[:, : self.length + keys.shape[1]]

    original = cache.LayerCache.append_index_keys
    patch.setattr(cache.LayerCache, "trim", trim)
    patch.setattr(model, "check_caches", lambda *_: None)  # which would refuse to go on
    patch.setattr(cache.LayerCache, "append_index_keys", append)


def gathered_without_mask(longest):
    def apply(patch):
        original = attention.MultiHeadLatentAttention.attend_gathered

        def attend(self, q_nope, q_rope, tokens, selection, mask):
            seen = mask if selection.shape[1] > longest else None
            return original(self, q_nope, q_rope, tokens, selection, seen)

        patch.setattr(attention.MultiHeadLatentAttention, "attend_gathered", attend)

    return apply


def indexer_forgets_the_mask(patch):
    original = indexer.Indexer.score
    patch.setattr(indexer.Indexer, "score", lambda self, q, k, w, mask: original(self, q, k, w, None))


def selection_beats_the_mask(patch):
    original = attention.selection_mask
    patch.setattr(attention, "selection_mask", lambda selection, keys, mask: original(selection, keys, None))
    gathered_without_mask(1 << 30)(patch)


def bias_in_the_weights(patch):
    original = moe.Router.__call__

    def call(self, x):
        experts, routed = original(self, x)
        return experts, moe.tap(self, "weights", routed + self.e_score_correction_bias[experts])

    patch.setattr(moe.Router, "__call__", call)


def losing_groups_filled_with_zero(patch):
    original = mx.put_along_axis
    patch.setattr(moe.mx, "put_along_axis", lambda a, i, v, axis: original(a, i, mx.array(0.0), axis))


def router_attribute(name, value):
    def apply(patch):
        original = moe.Router.__call__

        def call(self, x):
            patch.setattr(self, name, value)
            return original(self, x)

        patch.setattr(moe.Router, "__call__", call)

    return apply


def shared_expert_missing(patch):
    def call(self, x):
        experts, routed = self.gate(x)
        out = (self.switch_mlp(x, experts) * routed[..., None]).sum(axis=-2)
        return moe.tap(self, "output", moe.tap(self, "experts", out))

    patch.setattr(moe.MixtureOfExperts, "__call__", call)


def theta_of_llama(patch):
    patch.setattr(
        model, "RotaryEmbedding", lambda args, own=model.RotaryEmbedding: own(replace(args, rope_theta=10000.0))
    )


def scale_of_nope_only(patch):
    patch.setattr(attention, "softmax_scale", lambda args: args.qk_nope_head_dim**-0.5)


def heads_not_scaled(patch):
    original = indexer.Indexer.head_weights
    patch.setattr(
        indexer.Indexer,
        "head_weights",
        lambda self, x: indexer.tap(self, "weights", original(self, x) * self.heads**0.5),
    )


def one_head_decides(original, self, q, k, w, mask):
    return original(self, q[:, :, :1], k, w[:, :, :1], mask)


def hidden_first(patch):
    step = mtp.MtpLayer.step

    def call(self, hidden, embeddings, *rest):
        joined = mx.concatenate([self.hnorm(hidden), self.enorm(embeddings)], axis=-1)
        projection = self.eh_proj

        class Swapped(nn.Module):
            def __call__(self, _):
                return projection(joined)

        self.eh_proj = Swapped()
        try:
            return step(self, hidden, embeddings, *rest)
        finally:
            self.eh_proj = projection

    patch.setattr(mtp.MtpLayer, "step", call)


def key_not_written_on_reuse(patch):
    original = mtp.MtpLayer.step

    def step(self, hidden, embeddings, rotation, mask, layer_cache, reuse=None):
        out = original(self, hidden, embeddings, rotation, mask, layer_cache, reuse)
        layer_cache.index_keys.trim(1 if reuse is not None else 0)
        return out

    patch.setattr(mtp.MtpLayer, "step", step)


def draft_hidden_before_the_norm(patch):
    original = mtp.MtpLayer.step

    def step(self, *arguments):
        kept, norm = [], self.shared_head.norm

        class Spy(nn.Module):
            def __call__(self, x):
                kept.append(x)
                return norm(x)

        self.shared_head.norm = Spy()
        try:
            out, selection = original(self, *arguments)
        finally:
            self.shared_head.norm = norm
        return (kept[0] if arguments[-1] is not None else out), selection

    patch.setattr(mtp.MtpLayer, "step", step)


def main_models_selection(patch):
    """The first draft step reuses a selection that is not its own: here, the oldest keys."""
    original = mtp.MtpLayer.step

    def step(self, hidden, embeddings, rotation, mask, layer_cache, reuse=None):
        count = hidden.shape[1]
        foreign = mx.broadcast_to(mx.arange(16), (hidden.shape[0], count, 16)) if reuse is None else reuse
        return original(self, hidden, embeddings, rotation, mask, layer_cache, foreign)

    patch.setattr(mtp.MtpLayer, "step", step)


def kv_bits_ignored(patch):
    patch.setattr(store.LatentStore, "append", lambda self, values, _=None: self.plain.append(values))


def indexer_keys_packed_too(patch):
    original = cache.LayerCache.append_index_keys

    def append(self, keys):
        padded = mx.pad(keys, [(0, 0), (0, 0), (0, -keys.shape[-1] % 32)])
        return original(
            self, KvQuantization(8, 32).rounded(padded)[..., : keys.shape[-1]] if self.quantization else keys
        )

    patch.setattr(cache.LayerCache, "append_index_keys", append)


def own_tokens_attended_in_float(patch):
    """As mlx-lm's switch after each chunk does: a call's tokens are packed when they have been attended to."""
    original, read = cache.LayerCache.append, store.LatentStore.read

    def append(self, joined):
        stored = original(self, joined)
        before = read(stored)[:, : -joined.shape[1]]
        return store.LatentStore.of(mx.concatenate([before, joined], axis=1))

    patch.setattr(cache.LayerCache, "append", append)


def biases_forgotten(patch):
    original = KvQuantization.unpack
    patch.setattr(KvQuantization, "unpack", lambda self, w, s, b: original(self, w, s, mx.zeros_like(b)))


def packing_starts_late(patch):
    original = cache.LayerCache._first
    patch.setattr(cache.LayerCache, "_first", lambda self: [column + (column > 0) for column in original(self)])


def scales_in_16_bit(patch):
    original = KvQuantization.pack
    patch.setattr(
        KvQuantization,
        "pack",
        lambda self, x: [a.astype(mx.bfloat16).astype(a.dtype) if i else a for i, a in enumerate(original(self, x))],
    )


def taken_one_further(patch):
    original = store.LatentStore.take
    patch.setattr(
        store.LatentStore, "take", lambda self, tokens: original(self, mx.minimum(tokens + 1, self.length - 1))
    )


KV_FAULTS = {
    "kv-bits-no-op": (kv_bits_ignored, "layers.0.cache"),
    "kv-quantizes-indexer": (indexer_keys_packed_too, "layers.0.cache.index_keys"),
    "kv-own-tokens-in-float": (own_tokens_attended_in_float, "layers.0.self_attn.heads (8 bit"),
    "kv-biases-forgotten": (biases_forgotten, "layers.0.cache (8 bit"),
    "kv-starts-late": (packing_starts_late, "layers.0.cache"),
    "kv-scales-in-16-bit": (scales_in_16_bit, "layers.0.cache.scales"),
    "kv-takes-the-next-token": (taken_one_further, "layers.0.cache (from 0)"),
}


def kv(case):
    """The claims about the packed cache, in their order."""
    cuts = [40, 37, 1, 1, 1]
    checks = [
        lambda: caught(test_kv_quantization.test_packed_is_mx_quantize_of_the_latents, case, Judge, 8, cuts),
        lambda: caught(test_kv_quantization.test_the_error_of_each_value, case, Judge, 8, mx.float32),
        lambda: caught(test_kv_quantization.test_reading_what_was_selected, case, Judge, 0),
        lambda: caught(
            test_kv_quantization.test_the_run_is_the_equations_on_what_is_read_back, case, Judge, 8, 45, cuts
        ),
    ]
    return next((found for check in checks if (found := check())), None)


@pytest.mark.parametrize("fault", KV_FAULTS)
def test_a_fault_of_the_packed_cache_is_caught(built, fault, monkeypatch):
    patch, stage = KV_FAULTS[fault]
    case = built("glm-5.2-interleaved")
    with monkeypatch.context() as context:
        patch(context)
        found = kv(case)
    check_of(found, stage)
    assert kv(case) is None, "the fault outlived its patch"


@pytest.mark.parametrize("name", ["glm-5.2-interleaved", "glm-4.7"])
def test_four_bits_for_eight_drift_too_far(built, name, monkeypatch):
    """Where nothing else would tell them apart."""
    case = built(name)
    original = test_kv_quantization.packed_run
    monkeypatch.setattr(test_kv_quantization, "packed_run", lambda c, t, cuts, bits: original(c, t, cuts, 4))
    found = caught(test_kv_quantization.test_drift_of_the_logits, case, Judge)
    assert found is not None
    assert "KL" in found.stage


def test_attention_that_loses_more_than_packing_explains_is_caught(built, monkeypatch):
    case = built("glm-5.2-interleaved")
    original = KvQuantization.unpack
    monkeypatch.setattr(KvQuantization, "unpack", lambda self, w, s, b: original(self, w, s, b * 1.1))
    found = caught(test_kv_quantization.test_what_attention_may_lose, case, Judge)
    assert found is not None
    assert found.stage == "layers.0.self_attn.heads"


def trim_forgets_the_index_keys(patch):
    patch.setattr(cache.LayerCache, "trim", lambda self, tokens: self.latents.trim(tokens))


def extract_takes_a_pad(patch):
    original = cache.LayerCache.extract

    def extract(self, row):
        self.left_padding = [max(pads - 1, 0) for pads in self.left_padding]
        return original(self, row)

    patch.setattr(cache.LayerCache, "extract", extract)


def filter_forgets_the_index_keys(patch):
    original = cache.LayerCache._rows

    def rows(self, chosen):
        out = original(self, chosen)
        out.index_keys = self.index_keys.rows(mx.array(sorted(chosen))).placed(out.length - self.length, out.length)
        return out

    patch.setattr(cache.LayerCache, "_rows", rows)


def right_padding_stays(patch):
    patch.setattr(cache.LayerCache, "finalize", lambda self: setattr(self, "right_padding", None))


def copies_share(patch):
    patch.setattr(cache.LayerCache, "__deepcopy__", lambda self, _: copy.copy(self), raising=False)


def rows_are_packed_from_one_column(patch):
    original = cache.LayerCache._first
    patch.setattr(cache.LayerCache, "_first", lambda self: [max(original(self))] * len(original(self)))


def saved_without_its_start(patch):
    original = cache.LayerCache.state

    def state(self):
        value = list(original.fget(self))
        value[3] = value[3] and [*value[3][:2], 0]
        return tuple(value)

    patch.setattr(cache.LayerCache, "state", property(state, original.fset))


OPERATION_FAULTS = (
    trim_forgets_the_index_keys, extract_takes_a_pad, filter_forgets_the_index_keys, right_padding_stays, copies_share,
    rows_are_packed_from_one_column, saved_without_its_start,
)  # fmt: skip


@pytest.mark.parametrize("fault", OPERATION_FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_of_a_cache_operation_is_found(fault, monkeypatch, tmp_path):
    """By the random sequences, within as many as the gate draws."""
    fault(monkeypatch)
    judge = Judge(Report(), "claim", "again", 0)
    with pytest.raises(Exception, match=r"FAULT|dimensions must match|latents beside"):
        test_cache_operations.run(
            lambda: test_cache_operations.Contents(judge, tmp_path), examples=60, steps=25, phases=[Phase.generate]
        )


def test_a_batch_whose_positions_forget_the_pads_is_found(built, monkeypatch, tmp_path):
    """Which contents alone do not show."""
    case = built("glm-5.2-interleaved")
    length = property(lambda self: self.start + self.length if self.left_padding is None else self.every_rows_length())
    monkeypatch.setattr(cache.LayerCache, "offset", length)
    monkeypatch.setattr(
        cache.LayerCache,
        "every_rows_length",
        lambda self: mx.array([self.length] * len(self.left_padding)),
        raising=False,
    )
    machine = test_cache_operations.Conversations
    with pytest.raises(AssertionError, match=r"logits \(batch, other cuts\)   FAULT"):
        test_cache_operations.run(
            lambda: machine(case, Judge(Report(), "claim", "again", 0), tmp_path, {}), 6, 10, phases=[Phase.generate]
        )


FAULTS = {
    "indexer-nope-first": (last_instead_of_first, layers, "layers.0.self_attn.indexer.k"),
    "indexer-no-relu": (without_relu, layers, "layers.0.self_attn.indexer.scores"),
    "indexer-per-head-topk": (patched_score(one_head_decides), layers, "layers.0.self_attn.indexer.scores"),
    "indexer-rmsnorm": (rms_for_layer_norm, layers, "layers.0.self_attn.indexer.k"),
    "indexer-heads-not-scaled": (heads_not_scaled, layers, "layers.0.self_attn.indexer.weights"),
    "indexer-ignores-mask": (indexer_forgets_the_mask, layers, "layers.0.self_attn.indexer.scores"),
    "indexer-caches-zeros": (zeros_for_keys, chunks, "logits (chunks)"),
    "shared-from-wrong-layer": (not_carried, free, "layers.3.self_attn.selection"),
    "shared-layer-goes-dense": (shared_goes_dense, free, "layers.3.self_attn.selection"),
    "selection-beats-mask": (selection_beats_the_mask, layers, "layers.0.self_attn.heads"),
    "topk-unmasked-decode": (gathered_without_mask(1), padded, "logits (row of 21"),
    "rope-theta-default": (theta_of_llama, free, "layers.0.self_attn.indexer.k"),
    "softmax-scale": (scale_of_nope_only, layers, "layers.0.self_attn.heads"),
    "rope-offset-after-cache": (positions_from_zero, chunks, "logits (chunks)"),
    "trim-main-only": (trims_the_latent_only, rewind, "logits (rewind)"),
    "router-bias-in-weights": (bias_in_the_weights, layers, "layers.3.mlp.gate.weights"),
    "router-group-fill-zero": (losing_groups_filled_with_zero, layers, "layers.1.mlp.gate.topk"),
    "router-no-norm": (router_attribute("normalize", False), layers, "layers.3.mlp.gate.weights"),
    "router-no-scale": (router_attribute("scale", 1.0), layers, "layers.3.mlp.gate.weights"),
    "shared-expert-missing": (shared_expert_missing, layers, "layers.3.mlp.output"),
    "mtp-concat-order": (hidden_first, drafts, "mtp step 0 hidden"),
    "mtp-reuse-skips-key-write": (key_not_written_on_reuse, drafts, "mtp cache"),
    "mtp-hidden-before-norm": (draft_hidden_before_the_norm, drafts, "mtp step 1 hidden"),
    "mtp-uses-main-selection": (main_models_selection, drafts, "mtp"),
}
REBUILT = ("rope-theta-default", "softmax-scale")  # take effect when a model is built
GROUPED = ("router-group-fill-zero",)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_is_caught_at_its_stage(built, fault, monkeypatch):
    patch, check, stage = FAULTS[fault]
    case = built("grouped-interleaved" if fault in GROUPED else "glm-5.2-interleaved")
    assert case.ours  # built without the fault
    with monkeypatch.context() as context:
        patch(context)
        if fault in REBUILT:
            context.setitem(case.__dict__, "ours", Ours(case.folder, **case.spec.overrides))
        found = check(case)
    check_of(found, stage)
    assert check(case) is None, "the fault outlived its patch"


def test_a_missed_fp8_scale_is_caught(monkeypatch):
    monkeypatch.setattr(weights, "dequantize_fp8", lambda weight, scale, name="": mx.from_fp8(weight, dtype=mx.float32))
    check_of(caught(test_weights.test_fp8_blocks, Judge, (128, 128)), "weight")


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


def test_one_rows_selection_for_all_is_caught(built, monkeypatch):
    case = built("glm-5.2-interleaved")
    original = attention.selection_mask
    monkeypatch.setattr(attention, "selection_mask", lambda selection, keys, mask: original(selection[:1], keys, mask))
    found = caught(test_attention.test_forms, case, Judge, monkeypatch, attention.EXPANDED, [80])
    check_of(found, "layers.0.self_attn.heads (expanded)")


def test_a_form_that_differs_is_caught(built, monkeypatch):
    case = built("glm-5.2-interleaved")
    original = attention.MultiHeadLatentAttention.attend_absorbed
    monkeypatch.setattr(
        attention.MultiHeadLatentAttention, "attend_absorbed", lambda self, *a: original(self, *a) * 1.001
    )
    found = caught(test_attention.test_forms, case, Judge, monkeypatch, attention.ABSORBED, [80])
    check_of(found, "layers.0.self_attn.heads (absorbed)")


# -- what only a trained model shows

TRAINED_CASE = "trained-interleaved"


def recall(case):
    return caught(test_behaviour.test_recall_from_beyond_index_topk, case, Judge, Report())


def own_drafts(case):
    return caught(test_behaviour.test_drafts, case, Judge, Report())


def layout_told(case):
    return caught(test_behaviour.test_the_weights_tell_their_layout, case, Judge, Report())


def the_most_recent(patch):
    original = indexer.Indexer.select
    patch.setattr(
        indexer.Indexer,
        "select",
        lambda self, scores: original(self, mx.where(mx.isinf(scores), scores, mx.arange(scores.shape[-1]))),
    )


@pytest.mark.parametrize(
    ("patch", "check", "stage"),
    [(the_most_recent, recall, "answer"), (hidden_first, own_drafts, "drafts of text")],
)
def test_a_fault_of_behaviour_is_caught(built, patch, check, stage, monkeypatch):
    case = built(TRAINED_CASE)
    patch(monkeypatch)
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
