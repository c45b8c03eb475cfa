"""The quantized latent cache: what is packed, what is read back, and what that does to attention, selections, logits."""

import mlx.core as mx
import numpy as np
import pytest

from glm_dsa.attention import ABSORBED, EXPANDED, GATHERED
from reference.equations import Equations
from verify.cases import Case, group_size
from verify.claims.test_attention import force
from verify.core import bounds, compare, stages
from verify.engines.definition import to_numpy

CLAIM = "int8 latent cache"
pytestmark = pytest.mark.needs("packable")

CUTS = {"prefill": [80], "chunks and decode": [40, 37, 1, 1, 1]}
DTYPES = {  # half an ulp of 1, and the smallest number
    mx.float32: (2.0**-24, 0.0),
    mx.float16: (2.0**-11, 2.0**-24),
    mx.bfloat16: (2.0**-8, 0.0),
}


def packed_run(case: Case, tokens, cuts, bits, start=0, replace=None):
    """Our whole model on a packed cache: (the cache, every stage over all cuts)."""
    cache = case.ours.model.make_cache(kv_bits=bits, kv_group_size=group_size(case.args), quantized_kv_start=start)
    parts, at = [], 0
    for cut in cuts:
        rows = slice(at, at + cut)
        given = stages.of_rows(replace or {}, rows, case.args.index_topk)
        parts.append(case.ours.forward(tokens[:, rows], cache, given))
        at += cut
    whole = [
        s
        for s in parts[0]
        if all(part.get(s) is not None for part in parts) and not s.endswith(("scores", "topk", "selection"))
    ]
    return cache, {s: np.concatenate([part[s] for part in parts], axis=1) for s in whole}


def read_back(cache) -> np.ndarray:
    return to_numpy(cache.latents.read())


def joined(stages, layer) -> np.ndarray:
    return np.concatenate([stages[f"layers.{layer}.self_attn.{part}"] for part in ("kv_latent", "k_rope")], axis=-1)


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("bits", [8, 4])
def test_packed_is_mx_quantize_of_the_latents(case: Case, judge, bits, cuts):
    """Exactly, on every layer; latent and rotary key each in groups of their own. Indexer keys stay as they are."""
    tokens, group, latent = case.tokens(case.long), group_size(case.args), case.args.kv_lora_rank
    cuts = case.scaled(cuts)
    cache, seen = packed_run(case, tokens, cuts, bits)
    for layer, layer_cache in enumerate(cache):
        values = joined(seen, layer)
        packed = layer_cache.latents.packed.length
        judge.holds(
            case.name, f"layers.{layer}.cache", packed == case.long, f"{case.long} tokens are packed (found: {packed})"
        )
        parts = [
            mx.quantize(mx.array(v), group_size=group, bits=bits) for v in (values[..., :latent], values[..., latent:])
        ]
        for name, ours, *due in zip(
            ("words", "scales", "biases"), layer_cache.latents.packed.read(), *parts, strict=True
        ):
            stage = f"layers.{layer}.cache.{name} ({bits} bit)"
            judge.values(case.name, stage, to_numpy(ours), np.concatenate([to_numpy(d) for d in due], axis=-1), 0.0)
        if layer_cache.has_indexer:
            keys = to_numpy(layer_cache.index_keys.read()[0])
            judge.values(
                case.name, f"layers.{layer}.cache.index_keys", keys, seen[f"layers.{layer}.self_attn.indexer.k"], 0.0
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_the_error_of_each_value(case: Case, judge, bits, dtype):
    """Within a bound derived from mx.quantize's own steps, group by group; in 16 bit too."""
    quantization = case.ours.model.make_cache(kv_bits=bits, kv_group_size=group_size(case.args))[0].quantization
    assert quantization is not None
    reference = case.reference(case.long)
    for layer in range(case.args.num_hidden_layers):
        latents = mx.array(joined(reference.hf, layer)).astype(dtype)
        back = to_numpy(quantization.rounded(latents)).astype(np.float64)
        values = to_numpy(latents).astype(np.float64)
        bound = bounds.packing_error(values, quantization.group_size, bits, *DTYPES[dtype])
        share = float((np.abs(back - values) / bound).max())
        judge.at_most(
            case.name, f"layers.{layer}.cache ({bits} bit, {dtype})", share, 1.0, "largest error / its group's bound"
        )


@pytest.mark.parametrize("start", [0, 33])
def test_reading_what_was_selected(case: Case, judge, start):
    """Unpacking only what was selected gives what unpacking everything gives, exactly."""
    cache, _ = packed_run(case, case.tokens(case.long, batch=2), [case.long], 8, start)
    random = np.random.default_rng(0)
    for layer, layer_cache in enumerate(cache):
        selection = random.integers(0, case.long, (2, 7, 16))
        every = read_back(layer_cache)
        due = np.take_along_axis(every[:, None], selection[..., None], axis=2)
        ours = to_numpy(layer_cache.latents.take(mx.array(selection.astype(np.uint32))))
        judge.values(case.name, f"layers.{layer}.cache (from {start})", ours, due, 0.0)


@pytest.mark.any_layout
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize(("bits", "start"), [(8, 0), (8, 45), (4, 0)])
def test_the_run_is_the_equations_on_what_is_read_back(case: Case, judge, bits, start, cuts):
    """The float64 equations, handed the latents that the cache reads back, agree with the packed run at every stage, within
    the bounds of the unquantized model: nothing but the packing itself changes. Whatever the cut: a token is attended as
    packed by its own query too, and those before `start` never are."""
    reference = case.reference(case.long)
    cache, seen = packed_run(case, reference.tokens, case.scaled(cuts), bits, start, reference.injections)
    given = dict(reference.given)
    latent = case.args.kv_lora_rank
    for layer, layer_cache in enumerate(cache):
        back = read_back(layer_cache)
        own = joined(seen, layer)
        if start:
            judge.values(case.name, f"layers.{layer}.cache before {start}", back[:, :start], own[:, :start], 0.0)
        changed = np.abs(back[:, start:] - own[:, start:]).max(axis=-1)
        judge.holds(case.name, f"layers.{layer}.cache", (changed > 0).all(), f"every token from {start} on is packed")
        given[f"layers.{layer}.self_attn.kv_latent"] = back[..., :latent].astype(np.float64)
        given[f"layers.{layer}.self_attn.k_rope"] = back[..., latent:].astype(np.float64)
    equations = case.equations(given)
    equations.forward(reference.tokens)
    for stage, ours in seen.items():
        if stage in equations.stages and stage in reference.hf and "gate" not in stage:
            name = f"{stage} ({bits} bit from {start})"
            judge.values(case.name, name, ours, equations.stages[stage], reference.bound(stage, local=False))


@pytest.mark.parametrize("form", [EXPANDED, ABSORBED, GATHERED])
def test_forms(case: Case, judge, monkeypatch, form):
    """Each form of attention on the packed cache, against the same form on a float cache that holds what is read back."""
    force(monkeypatch, form)
    reference, model = case.reference(case.long), case.ours.model
    for layer in (0, case.args.num_hidden_layers - 1):
        attention, outputs = model.layers[layer].self_attn, []
        x = mx.array(reference.hf[f"layers.{layer}.input_layernorm"])
        selection = reference.hf.get(f"layers.{layer}.self_attn.selection")
        packed = model.make_cache(kv_bits=8, kv_group_size=group_size(case.args))[layer]
        plain = model.make_cache()[layer]
        assert packed.quantization is not None
        append, rounded = plain.append, packed.quantization.rounded
        plain.append = lambda joined, append=append, rounded=rounded: append(rounded(joined))  # type: ignore[method-assign, misc]
        for layer_cache in (packed, plain):
            rotation, mask = model.model.rotation_and_mask(case.long, layer_cache)
            chosen = None if selection is None else mx.array(selection.astype(np.int32))
            outputs.append(to_numpy(attention(x, attention.query_latent(x), rotation, mask, layer_cache, chosen)))
        judge.values(case.name, f"layers.{layer}.self_attn.output ({form})", *outputs, 0.0)


def test_what_attention_may_lose(case: Case, judge):
    """The output of each layer's attention moves no further than the latents' error bounds allow: on the reference's
    input and selection, packed against unpacked."""
    reference, args, model = case.reference(case.long), case.args, case.ours.model
    group, latent = group_size(args), args.kv_lora_rank
    for layer in range(args.num_hidden_layers):
        attention, outputs = model.layers[layer].self_attn, []
        x = mx.array(reference.hf[f"layers.{layer}.input_layernorm"])
        selection = reference.hf.get(f"layers.{layer}.self_attn.selection")
        for bits in (None, 8):
            layer_cache = model.make_cache(kv_bits=bits, kv_group_size=group)[layer]
            rotation, mask = model.model.rotation_and_mask(case.long, layer_cache)
            chosen = None if selection is None else mx.array(selection.astype(np.int32))
            with case.ours.captured() as seen:
                attention(x, attention.query_latent(x), rotation, mask, layer_cache, chosen)
            outputs.append(to_numpy(seen[f"layers.{layer}.self_attn.heads"]).astype(np.float64))

        stage = f"layers.{layer}.self_attn."
        heads, nope = args.num_attention_heads, args.qk_nope_head_dim
        weights = case.weights(f"model.{stage}kv_b_proj.weight").reshape(heads, nope + args.v_head_dim, latent)
        q = reference.hf[stage + "q_latent"].astype(np.float64) @ case.weights(f"model.{stage}q_b_proj.weight").T
        q = q.reshape(1, case.long, heads, -1)
        absorbed = np.einsum("bshd,hdr->bshr", q[..., :nope], weights[:, :nope], optimize=True)
        queries = np.concatenate([absorbed, reference.hf[stage + "q_rope"]], axis=-1)
        tokens = joined(reference.hf, layer).astype(np.float64)
        errors = bounds.packing_error(tokens, group, 8)
        allowed = np.tril(np.ones((case.long, case.long), dtype=bool))[None]
        if selection is not None:
            allowed = allowed & compare.as_sets(selection, case.long)
        moved = bounds.attention_error(queries, tokens, errors, allowed, latent, attention.scale)
        bound = np.einsum("bshr,hdr->bshd", moved, np.abs(weights[:, nope:]), optimize=True).reshape(1, case.long, -1)
        bound += 2 * reference.bound(stage + "heads", local=True).absolute(reference.hf[stage + "heads"])
        share = float((np.abs(outputs[1] - outputs[0]) / bound).max())
        judge.at_most(case.name, stage + "heads", share, 1.0, "largest change / what the latents' errors allow")
        judge.holds(case.name, stage + "heads", share > 0, "packing shows")


@pytest.mark.needs("packable", "indexer")
def test_the_first_selection_is_unchanged(case: Case, judge):
    """The first full layer selects from what no cache has touched: exactly as without quantization, in any cut."""
    tokens, stage = case.tokens(case.long), "layers.0.self_attn.indexer.topk"
    for cuts in CUTS.values():
        chosen = []
        for bits in (None, 8, 4):
            cache, at, seen = case.ours.model.make_cache(kv_bits=bits, kv_group_size=group_size(case.args)), 0, []
            for cut in case.scaled(cuts):
                seen.append(case.ours.forward(tokens[:, at : at + cut], cache)[stage])
                at += cut
            chosen.append(np.concatenate([np.sort(s, axis=-1) for s in seen if s is not None], axis=1))
        for bits, ours in zip((8, 4), chosen[1:], strict=True):
            judge.holds(case.name, f"{stage} ({bits} bit)", np.array_equal(ours, chosen[0]), "as with a float cache")


class PackedEquations(Equations):
    """The equations with a cache that packs as mx.quantize does, in float64 otherwise.

    `noise` moves latents and rotary keys before they are packed, by as much as float32 may at that stage: some values pass
    a rounding step, as they do between two cuts of one prompt.
    """

    def __init__(self, case: Case, noise: int | None = None) -> None:
        super().__init__(case.config, case.weights, case.conventions, case.reference(case.long).given)
        self.reference, self.group = case.reference(case.long), group_size(case.args)
        self.random = None if noise is None else np.random.default_rng([case.seed, noise])
        self.forward(self.reference.tokens)

    def choose(self, stage, own):
        own = super().choose(stage, own)
        if not stage.endswith(("kv_latent", "k_rope")):
            return own
        if self.random is not None:
            most = self.reference.bound(stage, local=False).absolute(self.reference.hf[stage])
            own = own + self.random.uniform(-most, most, own.shape)
        packed = mx.quantize(mx.array(own.astype(np.float32)), group_size=self.group, bits=8)
        return to_numpy(mx.dequantize(*packed, group_size=self.group, bits=8)).astype(np.float64)


def test_drift_of_the_logits(case: Case, judge):
    """KL(float run || packed run), mean over positions, under HF's choices: at most twice what the float64 equations lose when
    they pack by mx.quantize, with float32's noise before it or without."""
    reference = case.reference(case.long)
    truth = case.equations(reference.given)
    truth.forward(reference.tokens)
    lost = [
        compare.distributions(PackedEquations(case, noise).stages["logits"], truth.stages["logits"]).kl_mean
        for noise in (None, 0, 1)
    ]
    for name, cuts in CUTS.items():
        _, packed = packed_run(case, reference.tokens, case.scaled(cuts), 8, replace=reference.injections)
        drift = compare.distributions(packed["logits"], reference.hf["logits"])
        why = f"2 x KL of the equations with packed latents, {max(lost):.2g}"
        judge.at_most(case.name, f"logits, mean KL (8 bit, {name})", drift.kl_mean, 2 * max(lost), why)
