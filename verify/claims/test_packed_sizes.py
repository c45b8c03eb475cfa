"""Weights at the sizes in use: every bit width and group size, 256 experts, vocabularies beyond 16 bit; and embeddings for tokens.

Each answer is held to float64 on the weights as reference/packed.py unpacks them, within what float32 can lose in the sum.
Over 400 lines: one part of one claim a file.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch

import glm_dsa
from glm_dsa import InputError, WeightsError, trace, weights
from glm_dsa.inputs import check_embeddings, check_tokens
from glm_dsa.linear import MultiLinear, QuantizedMultiLinear, QuantizedSwitchLinear, SwitchLinear
from glm_dsa.model import Model, parameters_of
from reference import checkpoints, packed
from verify.cases import Case, Spec
from verify.claims.test_weights import same, save_mlx
from verify.core import bounds
from verify.engines.definition import to_numpy

CLAIM = "sizes in use"

Packing = packed.Packing
AFFINE = [Packing(bits, group, "affine") for bits in packed.AFFINE_BITS for group in (32, 64, 128)]
PACKINGS = [*AFFINE, *(Packing(*sizes, mode) for sizes, mode in packed.FLOAT_MODES.items())]
USUAL = (None, Packing(4, 64, "affine"), Packing(8, 64, "affine"), Packing(4, 32, "mxfp4"))  # run at all sizes
PAIRS, EXPERTS = 16_384, 256  # 2048 tokens to 8 experts each
LONGEST = 200_000


def name_of(packing: Packing | None) -> str:
    return "unpacked" if packing is None else f"{packing.mode}, {packing.bits} bit in groups of {packing.group_size}"


def packed_as(packing: Packing) -> dict:
    return {"group_size": packing.group_size, "bits": packing.bits, "mode": packing.mode}


of_each_packing = pytest.mark.parametrize("packing", PACKINGS, ids=name_of)


def meant(module) -> tuple[np.ndarray, np.ndarray]:
    """A module's weight in float64, and the magnitudes that it is summed from: |scale * code| + |bias|."""
    if "scales" not in module:
        weight = to_numpy(module.weight).astype(np.float64)
        return weight, np.abs(weight)
    biases = module.get("biases")
    words, scales = (torch.from_numpy(np.array(part)) for part in (module.weight, module.scales))
    packing, bias = Packing(module.bits, module.group_size, module.mode), None
    if biases is not None:
        bias = torch.from_numpy(np.array(biases))
    weight = packed.dequantize(words, scales, bias, packing, dtype=torch.float64).numpy()
    if biases is None:
        return weight, np.abs(weight)
    spread = np.repeat(np.array(biases, dtype=np.float64), packing.group_size, axis=-1)
    return weight, np.abs(weight - spread) + np.abs(spread)


def share(ours: np.ndarray, x: np.ndarray, weight: np.ndarray, magnitude: np.ndarray) -> float:
    """The largest error of x @ weight^T, [.., in] and [out, in] or a stack of both, over what float32 may lose there."""
    due = np.einsum(
        "...si,...oi->...so", x.astype(np.float64), weight
    )  # in one thread: a BLAS starts more than these are worth
    # Cauchy and Schwarz: no sum of |x| |w| is larger
    most = np.linalg.norm(x, axis=-1)[..., None] * np.linalg.norm(magnitude, axis=-1)[..., None, :]
    return float((np.abs(ours - due) / bounds.product_error(most, x.shape[-1])).max())


def routed(ours: np.ndarray, x: np.ndarray, experts: np.ndarray, weight: np.ndarray, magnitude: np.ndarray) -> float:
    """The same of pairs: x [P, 1, in], experts int [P] -> [P, 1, out]."""
    owns = (experts == expert for expert in np.unique(experts))
    return max(share(ours[own], x[own], weight[(e := experts[own][0])], magnitude[e]) for own in owns)


def fits(judge, stage: str, worst: float) -> None:
    judge.at_most("packed", stage, worst, 1.0, "largest error / what float32 may lose in the sum")


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape, dtype=np.float32)


# -- the modules


@pytest.mark.parametrize("packing", [None, *PACKINGS], ids=name_of)
def test_modules(judge, gate, packing):
    """Linear maps, the embedding and its head, heads both ways, experts with few pairs and as many as a chunk makes."""
    kind = name_of(packing)

    def made(module, weight):
        module.weight = mx.array(weight)
        if packing is None:
            return module
        ours = module.to_quantized(**packed_as(packing))
        due = dict(zip(("weight", "scales", "biases"), mx.quantize(module.weight, **packed_as(packing)), strict=False))
        parts = {name: ours[name] for name in ("weight", "scales", "biases") if ours.get(name) is not None}
        are_equal = parts.keys() == due.keys() and all(mx.array_equal(parts[name], due[name]).item() for name in due)
        judge.holds("packed", kind, are_equal, "packed as `mx.quantize` packs it, bit for bit")
        return ours

    def run(module, x: np.ndarray, *more, **options) -> np.ndarray:
        return to_numpy(module(mx.array(x), *more, **options))

    linear, table = made(nn.Linear(128, 8, bias=False), normal(8, 128)), made(nn.Embedding(60, 128), normal(60, 128))
    weight, head = meant(linear), meant(table)
    most = (2048, PAIRS) if packing in USUAL else (60, 600)
    for tokens in (1, most[0]):
        x = normal(1, tokens, 128)
        fits(judge, f"linear ({kind})", share(run(linear, x), x, *weight))
        fits(judge, f"tied head ({kind})", share(run(table.as_linear, x), x, *head))
    ids = np.arange(60).reshape(15, 4)
    lost = np.abs(run(table, ids) - head[0][ids]) / bounds.product_error(head[1][ids], 1)
    fits(judge, f"embedding ({kind})", float(lost.max()))

    heads = made(MultiLinear(64, 4, 128), normal(64, 4, 128))
    weight = meant(heads)
    turned = [part.swapaxes(-1, -2) for part in weight]
    for rows, tokens in ((16, 1), (2, 60)):
        x, back = normal(rows, 64, tokens, 128), normal(rows, 64, tokens, 4)
        fits(judge, f"heads ({kind})", share(run(heads, x), x, *weight))
        fits(judge, f"heads, the other way ({kind})", share(run(heads, back, transpose=False), back, *turned))

    experts = made(SwitchLinear(EXPERTS, 4, 128), normal(EXPERTS, 4, 128))
    judge.holds("packed", kind, packing is None or "scales" in experts, "what is to be packed is")
    weight = meant(experts)
    if packing is not None:
        gap = np.abs(to_numpy(experts.dequantized().weight) - weight[0])
        fits(judge, f"unpacked ({kind})", float((gap / bounds.product_error(weight[1], 1)).max()))
        gate.ran(bits=packing.bits, group=packing.group_size)
    random = np.random.default_rng(0)
    for pairs, is_sorted in ((1, False), (63, False), (64, True), (most[1], False), (most[1], True)):
        chosen = random.integers(0, EXPERTS, pairs, dtype=np.int32)
        chosen[-1] = EXPERTS - 1
        chosen = np.sort(chosen) if is_sorted else chosen
        x = normal(pairs, 1, 128)
        out = run(experts, x, mx.array(chosen), is_sorted)
        fits(judge, f"experts, {pairs} pairs ({kind})", routed(out, x, chosen, *weight))
        gate.ran(pairs=out.shape[0])
    one = made(SwitchLinear(2, 2048, 128), normal(2, 2048, 128))  # as many rows as an expert of GLM-5.2 has
    x, chosen = normal(2, 1, 128), np.array([1, 0], dtype=np.int32)
    fits(judge, f"experts of 2048 rows ({kind})", routed(run(one, x, mx.array(chosen)), x, chosen, *meant(one)))


# -- a model of them


WIDE = checkpoints.tiny(
    hidden_size=128, intermediate_size=128, moe_intermediate_size=128, kv_lora_rank=128, q_lora_rank=128, qk_nope_head_dim=128,
    qk_rope_head_dim=16, qk_head_dim=144, v_head_dim=32, num_hidden_layers=2, first_k_dense_replace=1, n_routed_experts=4,
    num_experts_per_tok=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def wide(request, tmp_path_factory) -> Case:
    """A checkpoint whose matrices groups of 128 divide."""
    return Case(Spec("widths of 128", WIDE), tmp_path_factory.mktemp("sizes"), request.config.getoption("--seed"))


@pytest.fixture(scope="module")
def dense(wide) -> dict[str, mx.array]:
    return parameters_of(glm_dsa.load(wide.folder, dtype=mx.float32))


@of_each_packing
def test_a_packed_model(wide, dense, judge, gate, tmp_path, monkeypatch, packing):
    """Loaded from a folder as mlx-lm saves it, whatever config.json says of its bits: each packed matrix answers as what it
    means does, on what the model hands it; and the logits are those of the same model unpacked."""
    model, kind = Model(wide.args), name_of(packing)
    model.load_weights(list(dense.items()))
    matrices = {n.removesuffix(".weight") for n, p in dense.items() if p.ndim > 1 and ".gate." not in n}
    nn.quantize(model, class_predicate=lambda _, module: hasattr(module, "to_quantized") and packed_as(packing))
    save_mlx(model, tmp_path / "packed", {**wide.config, "quantization": {"group_size": 64, "bits": 4}})
    loaded = glm_dsa.load(tmp_path / "packed")
    judge.holds(wide.name, kind, same(parameters_of(loaded), parameters_of(model)), "loads packed, bit for bit")
    of_kind = {path: m for path, m in loaded.named_modules() if "scales" in m}
    other = sorted(matrices ^ of_kind.keys())
    judge.holds(wide.name, kind, not other, f"every matrix but the router's is packed (other: {other[:3]})")
    told = {packed_of(module) for module in of_kind.values()}
    judge.holds(wide.name, kind, told == {packing}, f"read as {kind} (found: {', '.join(map(name_of, told))})")

    means = {id(module): meant(module) for module in of_kind.values()}
    met = answers(monkeypatch, means)
    length = wide.args.index_topk + 4  # the indexers are asked
    tokens = mx.array(wide.tokens(length))
    with trace.capture(loaded) as seen:
        logits = loaded(tokens)
        loaded.draft(seen["norm"], tokens, loaded.make_mtp_cache(), 1)
    silent = [path for path, module in of_kind.items() if id(module) not in met]
    judge.holds(wide.name, kind, not silent, f"each of them is asked (not: {silent[:3]})")
    for path, module in of_kind.items():
        fits(judge, f"{path} ({kind})", met[id(module)])
    plain = unpacked(loaded, means)
    with trace.capture(plain, {s: v for s, v in seen.items() if s.endswith(".topk")}):
        due = plain(tokens)
    bound = wide.reference(length).bound("logits", local=False)
    judge.values(wide.name, f"logits ({kind})", to_numpy(logits), to_numpy(due), bound)
    gate.ran(bits=packing.bits, group=packing.group_size)


def packed_of(module) -> Packing:
    return Packing(module.bits, module.group_size, module.mode)


def answers(monkeypatch, means) -> dict[int, float]:
    """{id of a packed module: the worst of its answers so far, as `share` counts}, from now on."""
    met: dict[int, float] = {}

    def watch(kind: type, name: str, judged) -> None:
        own = getattr(kind, name)

        def call(module, x, *more, **options):
            out = own(module, x, *more, **options)
            worst = judged(to_numpy(out), to_numpy(x), means[id(module)], *more, **options)
            met[id(module)] = max(met.get(id(module), 0.0), worst)
            return out

        monkeypatch.setattr(kind, name, call)

    def of_heads(out, x, weight, transpose=True):
        return share(out, x, *(part if transpose else part.swapaxes(-1, -2) for part in weight))

    def of_pairs(out, x, weight, experts, *_):
        return routed(out, x, np.array(experts), *weight)

    def of_rows(out, ids, weight):
        ids = ids.astype(np.int64)
        return float((np.abs(out - weight[0][ids]) / bounds.product_error(weight[1][ids], 1)).max())

    watch(nn.QuantizedLinear, "__call__", lambda out, x, weight: share(out, x, *weight))
    watch(nn.QuantizedEmbedding, "__call__", of_rows)
    watch(nn.QuantizedEmbedding, "as_linear", lambda out, x, weight: share(out, x, *weight))
    watch(QuantizedMultiLinear, "__call__", of_heads)
    watch(QuantizedSwitchLinear, "__call__", of_pairs)
    return met


def unpacked(model: Model, means) -> Model:
    """The same model with what its packed weights mean, in float32."""
    plain, weight_of = Model(model.args), {}
    for path, module in model.named_modules():
        if id(module) in means:
            weight_of[f"{path}.weight"] = mx.array(means[id(module)][0].astype(np.float32))
    rest = {n: p for n, p in parameters_of(model).items() if n.rpartition(".")[0] + ".weight" not in weight_of}
    plain.load_weights([*weight_of.items(), *rest.items()])
    return plain


# -- vocabularies


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "first_k_dense_replace": 1}
VOCABULARIES = [
    (65_535, checkpoints.tiny, False, None), (65_536, checkpoints.tiny, True, None), (65_537, checkpoints.tiny, False, None),
    (154_880, checkpoints.tiny, False, None), (154_880, checkpoints.tiny, True, Packing(4, 32, "affine")),
    (154_880, checkpoints.glm_4_7, False, Packing(8, 32, "mxfp8")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("vocabulary", "family", "tied", "packing"), VOCABULARIES, ids=lambda x: getattr(x, "__name__", str(x))
)
def test_vocabularies(judge, gate, tmp_path, vocabulary, family, tied, packing):
    """Embedding, logits, drafts and their choices, of ids at both ends and beyond 16 bit, from a folder."""
    config = family(**SMALL, vocab_size=vocabulary, tie_word_embeddings=tied)
    model = Model(glm_dsa.ModelArgs.from_dict(config))
    tables = [
        path for path, m in model.named_modules() if path.endswith(("embed_tokens", "lm_head", "shared_head.head"))
    ]
    drawn = 0.02 * normal(vocabulary, 32)
    for number, path in enumerate(tables):
        weight = np.roll(drawn, number)
        weight[-64:] = np.concatenate([4 * np.eye(32), -4 * np.eye(32)])  # whatever the hidden: the last ids win
        model.load_weights([(f"{path}.weight", mx.array(weight))], strict=False)
    if packing is not None:
        nn.quantize(model, class_predicate=lambda path, _: path in tables and packed_as(packing))
    save_mlx(model, tmp_path / "vocabulary", config)
    model = glm_dsa.load(tmp_path / "vocabulary")
    modules, name = dict(model.named_modules()), f"{vocabulary:,} tokens, {name_of(packing)}"
    means = {path: meant(modules[path]) for path in tables}
    embedding, head = means["model.embed_tokens"], means["model.embed_tokens" if tied else "lm_head"]
    last = model.args.num_hidden_layers
    own = [means.get(f"model.layers.{last}.{part}", main) for part, main in
           (("embed_tokens", embedding), ("shared_head.head", head))]  # fmt: skip

    ids = np.array([[0, 1, 255, 256, 32_768, 65_534, vocabulary // 2, vocabulary - 65, vocabulary - 2, vocabulary - 1]])
    tokens = mx.array(ids)

    def looked_up(stage, found, table):
        lost = np.abs(to_numpy(found) - table[0][ids]) / bounds.product_error(table[1][ids], 1)
        fits(judge, f"{stage} ({name})", float(lost.max()))

    with trace.capture(model) as seen:
        logits = model(tokens)
    looked_up("embedding", seen["embed"], embedding)
    fits(judge, f"logits ({name})", share(to_numpy(logits), to_numpy(seen["norm"]), *head))
    cache = model.make_mtp_cache()
    looked_up("embedding of a draft", model._draft_embeddings(tokens, cache), own[0])
    due, steps = np.roll(ids, -1, axis=1), model.draft(seen["norm"], mx.array(np.roll(ids, -1, axis=1)), cache, 4)
    for step, draft in enumerate(steps):
        fed = to_numpy(draft.tokens)
        judge.holds(
            "packed", f"draft's tokens ({name})", np.array_equal(fed, due), f"step {step} is fed {due} (found: {fed})"
        )
        due = np.argmax(to_numpy(draft.logits)[:, -1], axis=-1)[:, None]
        judge.holds(
            "packed", f"draft's tokens ({name})", due.min() >= vocabulary - 64, f"one of the last wins (found: {due})"
        )
    of_steps, hidden = (
        np.concatenate([to_numpy(getattr(draft, part)) for draft in steps], axis=1) for part in ("logits", "hidden")
    )
    fits(judge, f"draft's logits ({name})", share(of_steps, hidden, *own[1]))
    gate.ran(vocabulary=logits.shape[-1])


@pytest.mark.parametrize("rows", [1, 16])
def test_tokens_of_the_longest_prompt_are_looked_at(judge, rows):
    """One that is no token is met and named wherever it stands; all others are taken."""
    vocabulary, length = 154_880, LONGEST if rows == 1 else 2048
    ids = np.random.default_rng(rows).integers(0, vocabulary, (rows, length))
    ids[-1, -1] = vocabulary - 1
    check_tokens(mx.array(ids), vocabulary, first=True)
    for wrong in (vocabulary, -1):
        ids[-1, -1] = wrong
        try:
            check_tokens(mx.array(ids), vocabulary, first=False)
            said = "nothing"
        except InputError as error:
            said = str(error)
        where = f"token {wrong} at [{rows - 1}, {length - 1}]"
        judge.holds("tokens", "tokens looked at", where in said, f"{where} is refused (said: {said[:60]})")


@pytest.mark.parametrize("family", [checkpoints.glm_5_2, checkpoints.glm_4_7])
def test_embeddings_in_the_place_of_tokens(judge, gate, family):
    """Of a prompt, chunks behind a cache, decode and a padded batch: the same bits as for the tokens, which are not looked at."""
    one_head = {"num_attention_heads": 1, "num_key_value_heads": 1, "index_n_heads": 1}
    model = Model(glm_dsa.ModelArgs.from_dict(family(**SMALL, **one_head, vocab_size=50)))
    random = np.random.default_rng(0)
    for rows, pads, calls in ((1, None, (2048, 512, 1)), (16, list(range(16)), (100, 60, 1))):
        caches = [model.make_cache(left_padding=pads) for _ in range(3)]
        for length in calls:
            tokens = mx.array(random.integers(0, 50, (rows, length)))
            embeddings, none = model.model.embed_tokens(tokens), mx.zeros((rows, 0), mx.int32)
            due = model(tokens, caches[0])
            for what, cache, ids in (("", caches[1], tokens * 0 + 1_000_000), (", no tokens", caches[2], none)):
                ours = to_numpy(model(ids, cache, embeddings))
                is_same = np.array_equal(ours, to_numpy(due))
                judge.holds("embeddings", f"input_embeddings{what}", is_same, f"{rows} x {length}: the tokens' logits")
            gate.ran(**{"chunk" if caches[0][0].length > length else "prompt": due.shape[1]}, batch=due.shape[0])
    check_embeddings(mx.zeros((1, LONGEST, 2)), mx.zeros((1, LONGEST), mx.int32), 2)


# -- what is read


@of_each_packing
def test_reading_packed_matrices(judge, packing):
    """The kind follows from the shapes at every width in use; an early build's kv_b_proj of 64 heads is taken apart."""
    bits, group, kind = packing.bits, packing.group_size, name_of(packing)
    for width in (128, 2048, 6144, 12_288, 16_384):
        scales = mx.zeros((2, width // group), mx.float32 if packing.mode == "affine" else mx.uint8)
        parts = {"m.weight": mx.zeros((2, width * bits // 32), mx.uint32), "m.scales": scales, "m.biases": scales}
        found = weights.packing_of("m", parts, width)
        judge.holds(
            "packed", f"kind ({kind})", found == packed_as(packing), f"{kind}, rows of {width} (found: {found})"
        )

    args = glm_dsa.ModelArgs.from_dict(
        checkpoints.tiny(num_attention_heads=64, num_key_value_heads=64, kv_lora_rank=128, num_hidden_layers=1)
    )
    height, stem = args.qk_nope_head_dim + args.v_head_dim, "model.layers.0.self_attn"
    linear = nn.Linear(128, 64 * height, bias=False).to_quantized(**packed_as(packing))
    parts = {f"{stem}.kv_b_proj.{part}": linear[part] for part in weights.PACKED if part in linear}
    split = weights.to_modules(args, parts, mx.float32)
    weight, magnitude = (part.reshape(64, height, 128) for part in meant(linear))
    keys, nope = split[f"{stem}.embed_q.weight"], args.qk_nope_head_dim
    most = bounds.product_error(magnitude[:, :nope].swapaxes(-1, -2), 1)
    fits(judge, f"embed_q ({kind})", float((np.abs(to_numpy(keys) - weight[:, :nope].swapaxes(-1, -2)) / most).max()))
    values = QuantizedMultiLinear(mx.zeros((1, 1, 128)), **packed_as(packing))
    for part in weights.PACKED:
        values[part] = split.get(f"{stem}.unembed_out.{part}")
    judge.holds(
        "packed", f"unembed_out ({kind})", np.array_equal(meant(values)[0], weight[:, nope:]), "the same rows, packed"
    )


def test_groups_of_16_are_no_affine_ones(judge):
    """mlx packs and multiplies none: they are refused by name, not read as something else."""
    parts = {"m.weight": mx.zeros((2, 16), mx.uint32), "m.scales": mx.zeros((2, 8)), "m.biases": mx.zeros((2, 8))}
    with pytest.raises(WeightsError, match="m"):
        weights.packing_of("m", parts, 128)
    judge.holds("packed", "kind (groups of 16)", True, "refused")


@pytest.mark.parametrize("shape", [(32_770, 130), (130, 32_770)], ids=str)
def test_fp8_of_large_matrices(judge, shape):
    """Each block has the scale of its own place to the last row and column in use."""
    random, blocks = np.random.default_rng(0), [-(-n // 128) for n in shape]
    bytes_ = random.integers(0, 0x70, shape, dtype=np.uint8)  # no NaN
    scale = random.random(blocks, dtype=np.float32)
    spread = torch.from_numpy(scale.repeat(128, 0)[: shape[0]].repeat(128, 1)[:, : shape[1]])
    due = (torch.from_numpy(bytes_).view(torch.float8_e4m3fn).float() * spread).bfloat16().float().numpy()
    ours = to_numpy(weights.dequantize_fp8(mx.array(bytes_), mx.array(scale)))
    judge.holds("fp8", f"weight {list(shape)}", np.array_equal(ours, due), "bit for bit")


@pytest.mark.parametrize(("layers", "experts"), [(1, 256), (78, 3)], ids=["256 experts", "78 layers"])
def test_layers_and_experts_of_a_release(judge, layers, experts):
    """Each tensor of HF's layout gets to its place, to the last expert and to the MTP layer behind the last."""
    config = checkpoints.tiny(
        num_hidden_layers=layers, first_k_dense_replace=0, n_routed_experts=experts, num_experts_per_tok=2
    )
    args = glm_dsa.ModelArgs.from_dict(config)
    stems = [f"model.layers.{layer}.mlp" for layer in range(layers + 1)]
    numbers = {
        f"{stem}.experts.{expert}.{projection}.weight": 1000 * layer + expert
        for layer, stem in enumerate(stems) for expert in range(experts) for projection in weights.PROJECTIONS
    }  # fmt: skip
    split = weights.to_modules(args, {name: mx.array([[number]]) for name, number in numbers.items()})
    due = {f"{stem}.switch_mlp.{p}.weight": [[[1000 * layer + e]] for e in range(experts)]
           for layer, stem in enumerate(stems) for p in weights.PROJECTIONS}  # fmt: skip
    found = {name: tensor.tolist() for name, tensor in split.items()}
    other = [name for name in due if found.get(name) != due[name]]
    judge.holds(
        "release", "mlp.switch_mlp", found.keys() == due.keys() and not other, f"in their order (other: {other[:2]})"
    )
