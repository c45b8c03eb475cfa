"""A release's files beside its original's: what breaks is a FAULT, what differs a warning, what says the same is silent."""

import json
import re
import shutil

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from reference.kept import TRAINED
from verify.audit import audit, companions, config_keys, foreign_code, template
from verify.core.findings import FAULT, NOTE, WARNING, Findings
from verify.engines.headers import Release, headers_of
from verify.engines.layout_evidence import kept_texts
from verify.release import cost
from verify.release import prompt as prompts

KEPT = TRAINED / "interleaved"
SPECIAL = ["<|pad|>", "<|endoftext|>", "<|user|>", "<|sep|>"]
TOKENIZER, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
GENERATION, CONFIG = "generation_config.json", "config.json"
CHAT = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}\n{% if tools %}\n{{ tools }}\n{% endif %}\n"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The kept config, a tokenizer with merges, a template, ends."""
    folder = tmp_path_factory.mktemp("beside") / "original"
    folder.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(kept_texts().values(), trainer)
    tokenizer.save(str(folder / TOKENIZER))
    write(folder, SETTINGS, {"eos_token": SPECIAL[1], "pad_token": SPECIAL[0], "model_max_length": 4096})
    write(folder, GENERATION, {"eos_token_id": [1, 3], "pad_token_id": 0, "temperature": 1.0})
    (folder / TEMPLATE).write_text(CHAT)
    config = json.loads((KEPT / CONFIG).read_text()) | {"eos_token_id": [1, 3], "vocab_size": 400}
    write(folder, CONFIG, config)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "release")


def write(folder, name, said):
    (folder / name).write_text(json.dumps(said))


def keys(file, **changes):
    """Keys of a JSON file; None takes one away."""

    def step(folder):
        said = json.loads((folder / file).read_text()) | changes
        write(folder, file, {k: v for k, v in said.items() if v is not None})

    return step


def edit(change, file=TOKENIZER):
    def step(folder):
        said = json.loads((folder / file).read_text())
        change(said)
        write(folder, file, said)

    return step


def text(file, to):
    return lambda folder: (folder / file).write_text(to)


def gone(*files):
    return lambda folder: [(folder / file).unlink() for file in files] and None


def release_of(folder):
    return Release(str(folder), folder, json.loads((folder / CONFIG).read_text()), {})


def compared(folder, original):
    findings = Findings()
    mine, theirs = release_of(folder), release_of(original)
    config_keys.judge(mine, theirs, findings)
    not_compared = companions.judge(mine, theirs, findings)
    return findings.merged(), not_compared


# -- sound


def merges_as_texts(said):
    said["model"]["merges"] = [" ".join(m) for m in said["model"]["merges"]]


def defaults_left_out(said):
    said["model"] = {k: said["model"][k] for k in ("type", "vocab", "merges")}
    del said["normalizer"], said["truncation"]


def template_inside(folder):
    said = (folder / TEMPLATE).read_text()
    gone(TEMPLATE)(folder)
    keys(SETTINGS, chat_template=said)(folder)


SILENT = {
    "a copy": lambda folder: None,
    "ends in another order": keys(GENERATION, eos_token_id=[3, 1]),
    "keys in another order": edit(lambda said: said.update(model=said.pop("model"))),
    "merges as texts": edit(merges_as_texts),
    "defaults left out": edit(defaults_left_out),
    "as mlx-lm's convert leaves it": keys(
        SETTINGS, is_local=True, backend="tokenizers", tokenizer_class="TokenizersBackend", extra_special_tokens=["<|user|>"]
    ),
    "a special token as an object": keys(SETTINGS, eos_token={"content": SPECIAL[1], "lstrip": False}),
    "the template inside": template_inside,
    "a template with blank space": text(TEMPLATE, "\n" + CHAT + "\n\n"),
    "a template with a comment": text(TEMPLATE, "{# for tools #}" + CHAT),
    "more files": text("notes.json", "{}"),
    "config of a converter": keys(
        CONFIG, quantization={"bits": 4, "group_size": 32}, quantization_config={"bits": 4, "group_size": 32},
        transformers_version="5.24.0", architectures=["X"], torch_dtype="bfloat16", head_dim=192, mlx_lm_version="0.32.2",
    ),
    "defaults left out of the config": keys(
        CONFIG, n_group=None, norm_topk_prob=None, rms_norm_eps=None, attention_bias=None, topk_method=None,
        routed_scaling_factor=None, rope_interleave=None,
    ),
    "theta at top level": keys(CONFIG, rope_parameters=None, rope_theta=10000.0),
    "the builder's own keys, as the original's": keys(CONFIG, indexer_rope_traditional=True, indexer_norm_eps=1e-6),
    "the MTP layer dropped, and its keys": keys(
        CONFIG, num_nextn_predict_layers=None, index_share_for_mtp_iteration=None
    ),
    "a pruned build": keys(CONFIG, n_routed_experts=12),
}  # fmt: skip


@pytest.mark.parametrize("change", SILENT.values(), ids=SILENT)
def test_what_says_the_same_is_silent(folder, original, change):
    change(folder)
    assert compared(folder, original) == ([], {})


# -- broken, or other


def rotated(said):
    letters = "abcdefghij"
    ids = [said["model"]["vocab"][c] for c in letters]
    said["model"]["vocab"] |= dict(zip(letters, ids[1:] + ids[:1], strict=True))


def two_merges_exchanged(said):
    merges = said["model"]["merges"]
    merges[3], merges[4] = merges[4], merges[3]


def word_gone(said):
    word = next(t for t, n in said["model"]["vocab"].items() if n == 399)
    del said["model"]["vocab"][word]
    said["model"]["merges"] = [m for m in said["model"]["merges"] if "".join(m) != word]


def added(said, **changes):
    said["added_tokens"][3] |= changes


def one_more(said):
    said["added_tokens"].append(dict(said["added_tokens"][0], id=400, content="<|tool|>"))


BEGINS = {
    "type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "single": [{"SpecialToken": {"id": "<|user|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "special_tokens": {"<|user|>": {"id": "<|user|>", "ids": [2], "tokens": ["<|user|>"]}},
}  # fmt: skip
CUT = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
DIFFERENT = {
    "index_topk": (keys(CONFIG, index_topk=16), FAULT, "index_topk = 16, the original's says 64"),
    "experts a token": (keys(CONFIG, num_experts_per_tok=2), FAULT, "num_experts_per_tok"),
    "theta": (keys(CONFIG, rope_parameters={"rope_theta": 8000000, "rope_type": "default"}), FAULT, "rope_theta"),
    "positions cut": (keys(CONFIG, max_position_embeddings=128), FAULT, "max_position_embeddings"),
    "more positions": (keys(CONFIG, max_position_embeddings=None), WARNING, "max_position_embeddings = 202752"),
    "positions that are no number": (keys(CONFIG, max_position_embeddings="many"), WARNING, "expected a whole number"),
    "zai-org's key turned": (keys(CONFIG, indexer_rope_interleave=False), FAULT, "indexer_rope = half-split"),
    "zai-org's key lost": (keys(CONFIG, indexer_rope_interleave=None), FAULT, "indexer_rope = half-split"),
    "the builder's key": (keys(CONFIG, indexer_rope_traditional=False), WARNING, "CONTESTED"),
    "indexer eps": (keys(CONFIG, indexer_norm_eps=1e-5), FAULT, "indexer_norm_eps"),
    "latent eps": (keys(CONFIG, latent_norm_eps=1e-5), WARNING, "latent_norm_eps"),
    "drafts": (keys(CONFIG, index_share_for_mtp_iteration=False), WARNING, "mtp_reuses_selection"),
    "dtype": (keys(CONFIG, dtype="float16"), NOTE, "dtype"),
    "letters rotated": (edit(rotated), FAULT, "10 of 400 tokens have other ids"),
    "merges exchanged": (edit(two_merges_exchanged), FAULT, "merges .* number 3"),
    "lower case": (keys(TOKENIZER, normalizer={"type": "Lowercase"}), FAULT, "normalizer: not the original's"),
    "words begin otherwise": (
        keys(TOKENIZER, pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}),
        FAULT, "pre_tokenizer: not the original's",
    ),
    "a token before all": (keys(TOKENIZER, post_processor=BEGINS), FAULT, "post_processor: not the original's"),
    "no decoder": (keys(TOKENIZER, decoder=None), FAULT, "decoder: not the original's"),
    "a decoder in other words": (
        keys(TOKENIZER, decoder={"type": "Sequence", "decoders": [
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}]}),
        WARNING, "decoder: not written as",
    ),
    "a special token that takes blanks": (edit(lambda said: added(said, lstrip=True)), FAULT, "added_tokens"),
    "a special token that is shown": (edit(lambda said: added(said, special=False)), WARNING, "added_tokens"),
    "one token more": (edit(one_more), WARNING, "<|tool|>"),
    "prompts cut by the tokenizer": (keys(TOKENIZER, truncation=CUT), WARNING, "truncation"),
    "an end lost": (keys(GENERATION, eos_token_id=[1]), FAULT, r"eos_token_id lacks 3 \(<\|sep\|>\)"),
    "an end more": (keys(GENERATION, eos_token_id=[1, 3, 2]), WARNING, r"2 \(<\|user\|>\) besides"),
    "an end that is a word": (keys(GENERATION, eos_token_id=[1, 3, 72]), FAULT, "words of a text"),
    "an end of config.json that is a word": (keys(CONFIG, eos_token_id=[72, 1]), FAULT, "config.json: .*words of a text"),
    "an end of config.json lost": (keys(CONFIG, eos_token_id=1), WARNING, "config.json: eos_token_id"),
    "the tokenizer's end": (keys(SETTINGS, eos_token=SPECIAL[2]), WARNING, "tokenizer_config.json: eos_token_id"),
    "padding of generation_config": (keys(GENERATION, pad_token_id=3), WARNING, "pad_token_id"),
    "padding of the tokenizer": (keys(SETTINGS, pad_token=SPECIAL[3]), WARNING, "pad_token_id"),
    "length of the tokenizer": (keys(SETTINGS, model_max_length=512), WARNING, "model_max_length = 512"),
    "spaces cleaned away": (keys(SETTINGS, clean_up_tokenization_spaces=True), WARNING, "clean_up_tokenization_spaces"),
    "no cache": (keys(CONFIG, use_cache=False), WARNING, "use_cache"),
    "a beginning added": (keys(SETTINGS, add_bos_token=True), WARNING, "add_bos_token"),
    "temperature": (keys(GENERATION, temperature=0.1), NOTE, "temperature"),
    "tokens that are never said": (keys(GENERATION, suppress_tokens=[70, 71]), WARNING, "suppress_tokens"),
    "a mended template": (text(TEMPLATE, CHAT.replace("tools", "functions")), WARNING, "line 2: expected .*tools"),
    "no template": (gone(TEMPLATE), FAULT, "chat template: the release has none"),
    "a tokenizer that cannot be read": (text(TOKENIZER, '{"model": {"vocab": {}}}'), FAULT, "tokenizer.json"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "severity", "what"), DIFFERENT.values(), ids=DIFFERENT)
def test_each_difference_is_named_once(folder, original, change, severity, what):
    change(folder)
    found, _ = compared(folder, original)
    assert len(found) == 1, found
    assert found[0].severity == severity
    assert re.search(what, found[0].what), found[0].what


def test_a_lost_word_is_named_with_its_merges(folder, original):
    edit(word_gone)(folder)
    found, _ = compared(folder, original)
    assert [f.severity for f in found] == [FAULT, FAULT]
    assert any("1 tokens of the original's are gone" in f.what for f in found)


def test_a_thousand_tokens_are_one_line(folder, original):
    edit(lambda said: said["model"].update(vocab={t: (n + 1) % 400 for t, n in said["model"]["vocab"].items()}))(folder)
    edit(lambda said: [token.update(id=token["id"] + 1) for token in said["added_tokens"]])(folder)
    found, _ = compared(folder, original)
    assert sum("have other ids" in f.what for f in found) == 1
    assert all(len(f.what) < 400 for f in found)


# -- what cannot be compared is said


NOT_COMPARED = {
    "an original without a tokenizer": (gone(TOKENIZER, SETTINGS, TEMPLATE), False, ("tokenizer", "template")),
    "an original whose tokenizer cannot be read": (text(TOKENIZER, '{"model": {}}'), False, ("tokenizer",)),
    "an original whose defaults cannot be read": (text(GENERATION, "{"), False, ("generation_config",)),
    "a release of weights alone": (gone(TOKENIZER, SETTINGS, TEMPLATE), True, ("tokenizer", "template")),
    "a release without settings": (gone(SETTINGS), True, ("tokenizer_config",)),
}


@pytest.mark.parametrize(("change", "is_release", "words"), NOT_COMPARED.values(), ids=NOT_COMPARED)
def test_what_is_not_compared_is_said(folder, original, change, is_release, words):
    change(folder)
    pair = (folder, original) if is_release else (original, folder)
    found, open_ = compared(*pair)
    assert not any(f.severity == FAULT for f in found), found
    assert len(open_) == len(words)
    for word in words:
        assert any(word in what for what in open_), open_


def test_no_end_to_compare_with_is_said(folder, original):
    for file in (CONFIG, GENERATION):
        keys(file, eos_token_id=None)(folder)
    keys(SETTINGS, eos_token=None)(folder)
    found, open_ = compared(original, folder)
    assert not any(f.severity == FAULT for f in found)
    assert any("ends of a generation" in what for what in open_)


# -- templates


def test_templates_are_alike_by_what_they_do():
    assert template.is_same("a{{ b }}", "a{{b}}")
    assert template.is_same("{% if a %}\nb\n{% endif %}", "{% if a %}\n{# why #}b\n{% endif %}\n")
    assert template.is_same("{{ broken", "{{ broken")
    for other in ("a{{ c }}", "b{{ b }}", "{{ broken"):
        assert not template.is_same("a{{ b }}", other)
    assert template.difference("a\nb\nc", "a\nx\nc").startswith("1 lines of 3 are gone, 1 are new; the first, line 2")


# -- code that comes with a release


def test_code_that_comes_with_a_release_is_named(folder):
    def told():
        findings = Findings()
        foreign_code.judge(release_of(folder), findings)
        return findings.merged()

    assert told() == []
    assert foreign_code.not_verified(release_of(folder)) == ""
    keys(CONFIG, model_file="model.py")(folder)
    (first,) = told()
    assert first.severity == WARNING
    assert "model_file = model.py (no such file)" in first.what
    (folder / "model.py").write_text("raise SystemExit('run')")
    assert [f.severity for f in told()] == [WARNING, NOTE]
    assert "(the file is there)" in told()[0].what
    keys(CONFIG, model_file="../../etc/passwd", auto_map={"AutoModel": "m.M"})(folder)
    keys(SETTINGS, auto_map={"AutoTokenizer": ["t.T", None]})(folder)
    assert [f.severity for f in told()] == [WARNING, WARNING, WARNING, NOTE]
    said = foreign_code.not_verified(release_of(folder))
    assert "is there" not in said
    assert said.count("auto_map") == 2
    assert "model.py" in said


def test_an_adapter_is_named(folder):
    (folder / "adapter_config.json").write_text("{}")
    findings = Findings()
    foreign_code.judge(release_of(folder), findings)
    assert [f.severity for f in findings.merged()] == [WARNING]
    assert "adapter" in foreign_code.not_verified(release_of(folder))


def test_a_format_that_no_tensor_has_is_named(tmp_path):
    folder = shutil.copytree(KEPT, tmp_path / "r")
    keys(CONFIG, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})(folder)
    found = audit.audit(headers_of(str(folder)))
    assert any(f.severity == WARNING and "no tensor has scales" in f.what for f in found.findings)


def test_an_audit_names_it(tmp_path):
    folder = shutil.copytree(KEPT, tmp_path / "r")
    keys(CONFIG, model_file="model.py")(folder)
    found = audit.audit(headers_of(str(folder)))
    assert any(f.severity == WARNING and "model_file" in f.what for f in found.findings)
    assert not found.verdict.startswith(FAULT)


# -- what a release is run on


def test_without_a_prompt_the_kept_texts_are_run_by_the_tokenizer():
    found = prompts.of_kept_texts([KEPT], 100, 262, 0)
    assert found.is_text
    assert found.tokens.shape == (1, 100)
    again, other = (prompts.of_kept_texts([KEPT], 100, 262, seed) for seed in (0, 1))
    assert (again.tokens == found.tokens).all()
    assert (other.tokens != found.tokens).any()
    assert "token 100" in str(other)
    last = prompts.of_kept_texts([KEPT], 100, 262, 10**9)
    assert last.tokens.shape == (1, 100)


@pytest.mark.parametrize(
    ("change", "length", "vocabulary", "why"),
    [
        (gone(TOKENIZER), 50, 400, "no tokenizer.json"),
        (text(TOKENIZER, "{}"), 50, 400, "no tokenizer"),
        (lambda folder: None, 10**6, 400, "expected 1000000"),
        (lambda folder: None, 50, 30, "beyond the vocabulary of 30"),
    ],
)
def test_where_they_cannot_be_had_tokens_are_random(folder, change, length, vocabulary, why):
    change(folder)
    found = prompts.of_kept_texts([folder], length, vocabulary, 7)
    assert not found.is_text
    assert why in found.why_random
    assert found.tokens.shape == (1, length)
    assert "random tokens, seed 7" in str(found)
    assert (found.tokens == prompts.of_kept_texts([folder], length, vocabulary, 7).tokens).all()


def test_an_originals_tokenizer_serves_weights_alone(folder, original):
    gone(TOKENIZER)(folder)
    assert prompts.of_kept_texts([folder, original], 50, 400, 0).is_text


def test_a_tokenizer_that_cuts_is_not_obeyed(folder, original):
    keys(TOKENIZER, truncation=CUT)(folder)
    found, whole = (prompts.of_kept_texts([f], 50, 400, 0) for f in (folder, original))
    assert (found.tokens == whole.tokens).all()


def test_a_perplexity_worse_than_a_guess_is_said_to_be():
    sound = cost.Perplexity(7.0, 6.5, 262, "of a text")
    assert "WARNING" not in str(sound)
    assert "release 7, original 6.5 (1.0769 times), of a text" in str(sound)
    assert "WARNING: worse than a guess among all 262 tokens" in str(cost.Perplexity(300.0, 6.5, 262, "of a text"))
    assert "so is the original" in str(cost.Perplexity(300.0, 301.0, 262, "of a text"))
    assert "original" not in str(cost.Perplexity(300.0, None, 262, "of a text"))
