"""Releases on trial: what agrees agrees, what is damaged is named, and an oracle that breaks is no fault of theirs."""

import json

import pytest
import torch

from reference.kept import TRAINED

from .. import asking
from .. import layouts as to
from ..asking import drifted, gated, gated_with, measured, of_source
from ..makers import built, config, file, json_file, small, tiny, trained, trained_build
from ..row import AGREES, FAULT, NOT_JUDGED, SETTLED, UNREADABLE, Row

FEW = ("--layers", "0-2")
CACHES = tuple(str(asking.ROOT / "verify" / "claims" / f"test_{name}.py") for name in ("references", "cache"))
CACHES = (*CACHES, "--rootdir", str(asking.ROOT), "-q")
HEADERS = (f"{asking.GATE[0]}::test_headers", *asking.GATE[1:])  # files and headers alone
LAYOUT = (str(asking.ROOT / "verify" / "claims" / "test_release_layout.py"), "--rootdir", str(asking.ROOT), "-q")
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


def halves_exchanged(draft):
    """Of kv_b_proj: what makes keys makes values."""
    for name, w in draft.tensors.items():
        if name.endswith("kv_b_proj.weight"):
            keys, values = w.reshape(4, 2, 32, -1).unbind(1)
            draft.tensors[name] = torch.stack([values, keys], 1).reshape(w.shape)


def letters_rotated(draft):
    said = json.loads(draft.files["tokenizer.json"])
    letters = "abcdefghijklmnopqrstuvwxyz"
    ids = [said["model"]["vocab"][letter] for letter in letters]
    said["model"]["vocab"] |= dict(zip(letters, ids[1:] + ids[:1], strict=True))
    draft.files["tokenizer.json"] = json.dumps(said)


def beside(*steps, **more):
    """A build in 4 bit of the kept checkpoint, its files changed, held against that one's: what is asked, by its headers."""
    return {
        "made": trained_build("interleaved", *steps), "asked": gated("--original", kept("interleaved"), files=HEADERS), **more
    }  # fmt: skip


SWAPPED = to.swapped("model.layers.1.mlp.experts.3.up_proj.weight", "model.layers.1.mlp.experts.5.up_proj.weight")
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<|sep|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# tests/test_exits.py has the like: a broken import as a process, a warning in this one
ORACLE = pytest.mark.slow("verify/engines", "verify/gate", "verify/core", "reference/", "tests/field")
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
        marks=pytest.mark.slow("verify/claims", "verify/core", "verify/cases", "verify/gate", "glm_dsa/", "tests/field"),
    ),
    Row(
        "oracle that warns", "transformers 5.24 says of its own keyword that it will be gone", "D3", tiny(),
        gated_with("transformers", WARNS, *FEW), says=("agrees",), never=("FAULT",), marks=ORACLE,
    ),
    Row(
        "oracle that does not import", "transformers is broken in this environment", "D3", tiny(),
        gated_with("transformers", 'raise ImportError("broken build of tokenizers")'), code=NOT_JUDGED,
        says=("transformers", "broken build"), never=("FAULT",), marks=ORACLE,
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
    Row(
        "4 bit, files beside the original's", "its files as they were", "zai-org/GLM-5.2",
        **beside(says=("verdict: agrees",), never=("FAULT", "files: ")),
    ),
    Row(
        "index_topk under --index-topk", "16 for 64, hidden by the override that big models are run with", "P1",
        trained_build("interleaved", config(index_topk=16)),
        gated("--original", kept("interleaved"), "--index-topk", "32", files=HEADERS), code=FAULT,
        says=("index_topk = 16, the original's says 64",),
    ),
    Row(
        "fewer experts a token beside the original", "2 for 4: no tensor tells", "P1",
        trained_build("interleaved", config(num_experts_per_tok=2)), gated("--original", kept("interleaved"), *FEW),
        code=FAULT, says=("num_experts_per_tok = 2, the original's says 4", "cost: KL"),
    ),
    Row(
        "positions cut beside the original", "max_position_embeddings of a smaller model", "P2",
        **beside(config(max_position_embeddings=128), code=FAULT, says=("max_position_embeddings = 128",)),
    ),
    Row(
        "letters rotated beside the original", "a tokenizer of another model of as many tokens", "P2",
        **beside(letters_rotated, code=FAULT, says=("26 of 262 tokens have other ids",)),
    ),
    Row(
        "an end lost beside the original", "generation_config lists one of two ends", "P2, Blaizzy/mlx-vlm#2112",
        **beside(json_file("generation_config.json", eos_token_id=[1]), code=FAULT, says=("eos_token_id lacks 5",)),
    ),
    Row(
        "config.json's end is a word, beside the original", "every quotation mark ends the answer", "P2",
        **beside(config(eos_token_id=[7]), code=FAULT, says=("eos_token_id has 7",)),
    ),
    Row(
        "other padding beside the original", "nothing breaks by it, and it is said", "P2",
        **beside(config(pad_token_id=5), says=("files: warning: .*pad_token_id = 5", "verdict: agrees"), never=("FAULT",)),
    ),
    Row(
        "a mended chat template beside the original", "the commonest change of all is no fault", "P2, ml-explore/mlx-lm#340",
        **beside(
            file("chat_template.jinja", TEMPLATE),
            says=("files: warning: .*another chat template", "verdict: agrees"), never=("FAULT",),
        ),
    ),
    Row(
        "other sampling beside the original", "a temperature of the publisher's own", "P2",
        **beside(
            json_file("generation_config.json", temperature=0.3), says=("files: note: .*temperature = 0.3", "verdict: agrees"),
            never=("FAULT", "files: warning"),
        ),
    ),
    Row(
        "half-split by the builder's own key, beside the original", "the original's key says interleaved: contested", "D1",
        **beside(
            config(indexer_rope_traditional=False, indexer_norm_eps=1e-6),
            says=("files: warning: .*builder's own key", "verdict: agrees"),
            never=("FAULT",),
        ),
    ),
    Row(
        "weights alone beside an original with a tokenizer", "nothing to compare: said, and no fault", "antirez/ds4#496",
        **beside(
            *(file(name, None) for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")),
            says=("the release has no tokenizer.json", "verdict: agrees"), never=("FAULT",),
        ),
    ),
    Row(
        "model_file", "mlx-lm may run that code, and not what is judged", "P6, ml-explore/mlx-lm#1410",
        trained_build("interleaved", config(model_file="model.py"), file("model.py", "raise SystemExit")),
        gated(files=HEADERS), says=(r"not verified(.|\n)*model_file = model.py \(the file is there\)", "verdict: agrees"),
        never=("FAULT",),
    ),
    Row(
        "another rope_theta without an original", "weights cannot tell; a figure shows", "P7",
        trained("interleaved", config(rope_parameters={"rope_theta": 8000000, "rope_type": "default"})), gated(),
        says=("perplexity of the text: release 4.0", "config values"), never=("FAULT",),
    ),
    Row(
        "halves exchanged without an original", "weights cannot tell; a figure shows", "P7",
        trained("interleaved", halves_exchanged), gated(), says=(r"perplexity of the text: release 7\d",), never=("FAULT",),
        marks=pytest.mark.slow("verify/release", "verify/claims/test_release", "verify/gate", "glm_dsa/", "tests/field"),
    ),
]  # fmt: skip
