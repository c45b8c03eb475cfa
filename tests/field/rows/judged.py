"""Releases on trial: what agrees agrees, what is damaged is named, and an oracle that breaks is no fault of theirs."""

from verify.cases import TRAINED

from .. import asking
from .. import layouts as to
from ..asking import drifted, gated, gated_with, measured, of_source
from ..makers import built, config, small, tiny, trained, trained_build
from ..row import AGREES, FAULT, NOT_JUDGED, SETTLED, UNREADABLE, Row

FEW = ("--layers", "0-2")
CACHES = tuple(str(asking.ROOT / "verify" / f"test_{name}.py") for name in ("references", "cache"))
CACHES = (*CACHES, "--rootdir", str(asking.ROOT), "-q")
LAYOUT = (str(asking.ROOT / "verify" / "test_release_layout.py"), "--rootdir", str(asking.ROOT), "-q")
WARNS = """
import importlib.util, sys, warnings
sys.path[:] = [p for p in sys.path if not p.endswith("/first")]
del sys.modules["transformers"]
import transformers
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as m
for cls in (m.GlmMoeDsaDecoderLayer, m.GlmMoeDsaModel):
    def forward(self, *a, _was=cls.forward, **k):
        warnings.warn("`past_key_values` is deprecated, use `cache`", FutureWarning, stacklevel=2)
        return _was(self, *a, **k)
    cls.forward = forward
"""


def kept(layout):
    return lambda bench, folder: TRAINED / layout


def nan(draft):
    draft.tensors["model.layers.1.mlp.experts.3.up_proj.weight"][0, 0] = float("nan")


SWAPPED = to.swapped("model.layers.1.mlp.experts.3.up_proj.weight", "model.layers.1.mlp.experts.5.up_proj.weight")
TURNED = {"interleaved": config(indexer_rope_interleave=False), "half-split": config(indexer_rope_interleave=True)}

ROWS = [
    Row(
        "small release as HF saved it", "bf16, random weights", "zai-org/GLM-5.2", tiny(), gated(*FEW), says=("agrees",),
    ),
    Row(
        "small release in 4 bit", "packed as mlx-lm packs", "ml-explore/mlx-lm#1410", built(), gated(*FEW),
        says=("agrees",),
    ),
    Row(
        "small release in 4 bit, the indexer in 8", "as most published builds: costlier, not another model", "D4",
        built(spares="$^", bits=8), gated(*FEW), says=("agrees",), never=("FAULT",),
    ),
    Row(
        "2 index heads", "exact ties at score 0 in most rows: HF differs from itself", "D2, jundot/omlx#2243",
        small(index_n_heads=2), gated(files=CACHES), never=("FAULT",),
    ),
    Row(
        "4 index heads", "the same, less often", "D2", small(index_n_heads=4), gated(files=CACHES), never=("FAULT",),
    ),
    Row(
        "oracle that warns", "transformers 5.24 says of its own keyword that it will be gone", "D3", tiny(),
        gated_with("transformers", WARNS, *FEW), says=("agrees",), never=("FAULT",),
    ),
    Row(
        "oracle that does not import", "transformers is broken in this environment", "D3", tiny(),
        gated_with("transformers", 'raise ImportError("broken build of tokenizers")'), code=NOT_JUDGED,
        says=("transformers", "broken build"), never=("FAULT",),
    ),
    Row(
        "interleaved weights under a half-split config", "converted and never measured beyond index_topk", "ROCm/ATOM#1502",
        trained("interleaved", TURNED["interleaved"]), gated(files=LAYOUT), code=FAULT, says=("indexer_rope_interleave",),
    ),
    Row(
        "half-split weights under an interleaved config", "the other way round, in 4 bit", "ikawrakow/ik_llama.cpp#2099",
        trained_build("half-split", TURNED["half-split"]), gated(files=LAYOUT), code=FAULT,
        says=("indexer_rope_interleave",),
    ),
    Row(
        "indexers that select as by chance", "queries and keys out of order: no layout is better, so none is condemned",
        "ikawrakow/ik_llama.cpp#2063", trained("interleaved", to.shuffled_indexers),
        gated("--layers", "0", files=(LAYOUT[0], *asking.GATE)), says=("not verified",),
        never=("FAULT",),
    ),
    Row(
        "NaN in an expert", "a shard damaged on its way", "ikawrakow/ik_llama.cpp#1616", tiny(nan), gated(*FEW), code=FAULT,
        says=(r"layers\.1.*experts.*3|experts\.3",),
    ),
    Row(
        "two experts exchanged, beside the original", "a conversion that sorted names as texts", "D9", tiny(SWAPPED),
        gated("--original", of_source, *FEW), code=FAULT, says=(r"layers\.1", "expert"),
    ),
    Row(
        "pruned, beside the original", "12 of 16 experts: what is left is the original's",
        "D9, vllm-project/llm-compressor#2864", tiny(to.pruned(12)), gated("--original", of_source, *FEW),
        says=("12", "16"), never=("FAULT",),
    ),
    Row(
        "pruned, two experts exchanged, beside the original", "what is left is out of order, and the router is not", "D9",
        tiny(SWAPPED, to.pruned(12)), gated("--original", of_source, *FEW), code=FAULT, says=(r"layers\.1", "expert"),
    ),
    Row(
        "pruned, drift from the original", "where it parts, by experts that are left", "D9", tiny(to.pruned(12)),
        drifted(of_source), code=SETTLED, says=("12",), never=("refused",),
    ),
    Row(
        "pruned, quality beside the original", "predictions compared on the kept texts", "D9",
        trained("interleaved", to.pruned(12)), measured(kept("interleaved"), "--tokens", "200", "--context", "100"),
        says=("KL",),
    ),
    Row(
        "4 bit, quality beside the original", "what it cost, in nats", "ikawrakow/ik_llama.cpp#2063",
        trained_build("interleaved"), measured(kept("interleaved"), "--tokens", "200", "--context", "100"), says=("KL",),
    ),
    Row(
        "fewer bits than the unpacked parts take", "5 bits asked of a build whose norms and indexers alone take more",
        "D20", built(spares=r"mlp|embed|lm_head|indexer"), drifted(of_source, "--suggest-bits", "5", "--tokens", "48"),
        code=(AGREES, FAULT, UNREADABLE), says=("--suggest-bits",),
    ),
    Row(
        "the same model, drift", "two folders with the same weights", "D20", tiny(), drifted(of_source, "--tokens", "48"),
        code=AGREES,
    ),
    Row(
        "a second fault on one case", "what agrees is spoken of, what is a million times over its bound is not", "D21",
        tiny(), gated("--fault", "softmax-scale-of-nope", "--fault", "kv-latent-unnormed", *FEW), code=FAULT,
        says=("stages before it agree|FAULT",), never=(r"worst: [^)]*e\+0\d of its bound",),
    ),
    Row(
        "a fault of a constructor, on a release", "the latent norms are built with rms_norm_eps", "vllm-project/vllm#35515",
        tiny(), gated("--fault", "latent-eps", *FEW), code=FAULT, says=("self_attn.q_latent",),
    ),
]  # fmt: skip
