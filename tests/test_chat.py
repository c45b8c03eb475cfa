"""Tokenizer and chat, from small files: what breaks is a FAULT, what differs a warning, and sound builds pass."""

import json
import shutil

import jinja2
import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from glm_dsa.storage import Stored
from reference import checkpoints
from verify.audit import audit, chat, template
from verify.core.findings import FAULT, NOTE, WARNING, Findings
from verify.engines import headers as release

FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
ROWS = 320
EOS, PAD, SEP = 1, 0, 5  # of the small tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "hf"
    folder.mkdir()
    checkpoints.write_tokenizer(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, SEP], "pad_token_id": PAD}))
    return folder


@pytest.fixture
def folder(source, tmp_path):
    return shutil.copytree(source, tmp_path / "f")


CONFIG = {"eos_token_id": [EOS, SEP], "pad_token_id": PAD}


def told(folder, config=CONFIG, rows=ROWS):
    findings = Findings()
    chat.judge(release.Release(str(folder), folder, config, {}), rows, findings)
    return findings.merged()


def edit(folder, name, change):
    value = json.loads((folder / name).read_text())
    change(value)
    (folder / name).write_text(json.dumps(value))


def set_tokenizer(**said):
    return lambda folder: edit(folder, "tokenizer_config.json", lambda c: c.update(said))


def set_generation(**said):
    return lambda folder: edit(folder, "generation_config.json", lambda c: c.update(said))


def set_token(text, number):
    def change(tokenizer):
        tokenizer["added_tokens"].append({"id": number, "content": text, "special": True})

    return lambda folder: edit(folder, "tokenizer.json", change)


def set_template(text):
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


def in_tokenizer(value):
    def change(folder):
        (folder / "chat_template.jinja").unlink()
        set_tokenizer(chat_template=value)(folder)

    return change


def without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def nothing(folder):
    pass


GOOD = "{% for m in messages %}{% generation %}{{ m['content'] | trim }}{% endgeneration %}{% endfor %}"
LOOPS = "{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}{% continue %}{% endfor %}"
BAD = "{% for m in messages %}{{ m['content'] }"
SOUND = {
    "as it is written": (nothing, CONFIG),
    "config has one end of those in the list": (nothing, {"eos_token_id": EOS}),
    "config says nothing": (nothing, {}),
    "generation_config says nothing": (set_generation(eos_token_id=None, pad_token_id=None), CONFIG),
    "tokenizer_config names its tokens as objects": (set_tokenizer(eos_token={"content": "<|endoftext|>"}), CONFIG),
    "the template in tokenizer_config": (in_tokenizer(GOOD), CONFIG),
    "a list of templates": (
        in_tokenizer([{"name": "default", "template": GOOD}, {"name": "tool", "template": LOOPS}]),
        CONFIG,
    ),
    "loop controls and generation tags": (set_template(GOOD + LOOPS), CONFIG),
    "tokens added by tokenizer_config": (
        set_tokenizer(added_tokens_decoder={"300": {"content": "<|x|>"}, "0": {"content": "<|pad|>"}, "y": 1}),
        CONFIG,
    ),
    "a token in the last row": (set_token("<|last|>", ROWS - 1), CONFIG),
    "a constant that would take all memory": (set_template("{{ 'a' * 10 ** 10 }}{{ [0] * 10 ** 10 }}"), CONFIG),
}
CASES = {  # name: (change, config, severity, what is named)
    "no two files agree": (set_generation(eos_token_id=[SEP]), {"eos_token_id": 7}, FAULT, ("config.json 7", "5")),
    "nobody names an end": (
        lambda f: (set_tokenizer(eos_token=None)(f), set_generation(eos_token_id=None)(f)), {}, FAULT, ("eos_token",)
    ),
    "an end beyond the embedding": (nothing, {"eos_token_id": [EOS, 154820]}, FAULT, ("config.json", "154820")),
    "padding beyond the embedding": (set_generation(pad_token_id=ROWS), CONFIG, FAULT, ("generation_config", str(ROWS))),
    "a token beyond the embedding": (set_token("<|more|>", ROWS), CONFIG, FAULT, ("<|more|>", str(ROWS))),
    "a token before the embedding": (set_token("<|less|>", -1), CONFIG, FAULT, ("<|less|>",)),
    "a template that does not compile": (set_template(BAD), CONFIG, FAULT, ("chat_template.jinja", "line 1")),
    "a filter that nobody has": (set_template("{{ messages | tojsn }}"), CONFIG, FAULT, ("tojsn",)),
    "a tag that nobody has": (set_template("{% generate %}"), CONFIG, FAULT, ("generate",)),
    "one of a list": (in_tokenizer([{"name": "x", "template": BAD}]), CONFIG, FAULT, ("tokenizer_config.json, x",)),
    "an endless template": (set_template("a" * (template.LARGEST + 1)), CONFIG, FAULT, ("chat_template.jinja",)),
    "nested without end": (set_template("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"), CONFIG, FAULT, ("nested",)),
    "a template that is no text": (lambda f: (f / "chat_template.jinja").write_bytes(b"\xff\xfe"), CONFIG, FAULT, ("utf-8",)),
    "a tokenizer that is no JSON": (lambda f: (f / "tokenizer.json").write_text("{"), CONFIG, FAULT, ("tokenizer.json",)),
    "a tokenizer without tokens": (lambda f: (f / "tokenizer.json").write_text("{}"), CONFIG, FAULT, ("model.vocab",)),
    "a tokenizer_config that is no JSON": (
        lambda f: (f / "tokenizer_config.json").write_text("[]"), CONFIG, FAULT, ("tokenizer_config.json",)
    ),
    "a generation_config that is no JSON": (
        lambda f: (f / "generation_config.json").write_text("x"), CONFIG, WARNING, ("generation_config.json",)
    ),
    "an added token beyond the embedding": (
        set_tokenizer(added_tokens_decoder={"320": {"content": "<|x|>"}}), CONFIG, FAULT, ("tokenizer_config", "<|x|>", "320")
    ),
    "an added token of another number": (
        set_tokenizer(added_tokens_decoder={"300": {"content": "<|pad|>"}}), CONFIG, WARNING, ("<|pad|>", "300")
    ),
    "an end left out": (set_generation(eos_token_id=[EOS]), CONFIG, WARNING, ("generation_config.json", "5")),
    "the tokenizer's end left out": (set_generation(eos_token_id=[SEP]), {"eos_token_id": SEP}, WARNING, ("tokenizer_config",)),
    "padding that differs": (set_generation(pad_token_id=EOS), CONFIG, WARNING, ("config.json 0", "generation_config.json 1")),
    "padding of no token": (set_generation(pad_token_id=-1), {"eos_token_id": EOS}, WARNING, ("-1",)),
    "an end that is no number": (set_generation(eos_token_id=["<|end|>"]), CONFIG, WARNING, ("<|end|>",)),
    "a special token without a number": (set_tokenizer(pad_token={"content": "<|nil|>"}), CONFIG, WARNING, ("<|nil|>", "262")),
    "no template": (without("chat_template.jinja"), CONFIG, WARNING, ("no chat template",)),
    "no tokenizer": (without("tokenizer.json"), CONFIG, WARNING, ("tokenizer.json", "mlx-lm does not load")),
    "no defaults": (without("generation_config.json"), CONFIG, NOTE, ("generation_config.json", "not looked at")),
}  # fmt: skip


@pytest.mark.parametrize("name", SOUND)
def test_what_is_sound_is_passed_in_silence(name, folder):
    change, config = SOUND[name]
    change(folder)
    assert told(folder, config) == []


@pytest.mark.parametrize("name", CASES)
def test_what_breaks_is_a_fault_and_what_differs_a_warning(name, folder):
    change, config, severity, named = CASES[name]
    assert told(folder) == []
    change(folder)
    found = told(folder, config)
    assert [f.severity for f in found if any(part in f.what for part in named)][:1] == [severity], found
    assert all(part in found[0].what for part in named), found
    assert all(f.what.isprintable() and len(f.what) < 1000 for f in found)
    if severity != FAULT:
        assert not any(f.severity == FAULT for f in found), found


def test_a_special_token_without_a_number_and_without_a_row_is_a_fault(folder):
    set_tokenizer(pad_token={"content": "<|nil|>"})(folder)
    (found,) = told(folder, rows=262)
    assert found.severity == FAULT
    assert "<|nil|>" in found.what


def test_a_vocabulary_larger_than_the_embedding_is_one_finding(folder):
    """GLM's own is smaller: the embedding is padded."""
    assert told(folder, rows=262) == []
    (found,) = [f for f in told(folder, rows=100) if "tokenizer.json" in f.what]
    assert found.severity == FAULT
    assert "162 tokens beyond" in found.what


def test_without_any_file_there_is_no_fault(folder):
    """Weights alone are published too."""
    without(*FILES)(folder)
    warning, note = told(folder)
    assert (warning.severity, note.severity) == (WARNING, NOTE)
    assert FILES[0] in warning.what
    assert all(name in note.what for name in FILES[1:3])


GLM = {"eos_token_id": [154820, 154827, 154829], "pad_token_id": 154820}
SPECIAL = {"<|endoftext|>": 154820, "<|user|>": 154827, "<|observation|>": 154829}


@pytest.mark.parametrize(
    "generation", [GLM, {"eos_token_id": [154820, 154827, 154829, 154828]}, {"eos_token_id": 154820}, None]
)
def test_glm_5_as_published_is_not_condemned(generation, tmp_path):
    """config's list, a list of generation_config's own, an int among lists."""
    tokenizer = {"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": t, "id": i} for t, i in SPECIAL.items()]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    said = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "chat_template": GOOD}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    found = told(tmp_path, GLM, 154880)
    assert [f.severity for f in found if f.severity == FAULT] == []
    is_short = generation == {"eos_token_id": 154820}
    assert [f.severity for f in found if f.severity == WARNING] == [WARNING] * is_short, found


TEMPLATES = [
    GOOD, LOOPS, GOOD + LOOPS, BAD, "{% generate %}", "{{ x | tojson }}", "{{ x | nope }}", "{% if x is nope %}{% endif %}",
    "{{ 1 if x is nope }}", "{% if x %}{% for y in z %}{{ y | nope }}{% endfor %}{% endif %}", "{% if x %}{{ x | no }}{% endif %}",
    "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(1) }}", "{% set ns = namespace(a=1) %}{% set ns.a = 2 %}", "{%- x %}",
    "{% endgeneration %}", "{{ raise_exception('no') }}", "{% for x in y recursive %}{{ loop(x) }}{% endfor %}",
]  # fmt: skip


@pytest.mark.parametrize("text", TEMPLATES)
def test_a_template_compiles_here_where_it_compiles_in_hf(text):
    try:
        _compile_jinja_template(text)
        compiles = True
    except jinja2.TemplateError:
        compiles = False
    assert (template.compile_error(text) == "") == compiles


def test_a_repository_s_small_files_are_asked_for_one_by_one(folder, monkeypatch):
    asked = []

    def download(repository, name, revision):
        asked.append((repository, name, revision))
        return folder / name if (folder / name).exists() else None

    monkeypatch.setattr(release, "_download", download)
    set_generation(eos_token_id=[EOS])(folder)
    findings = Findings()
    chat.judge(release.Release("owner/name", None, CONFIG, {}, "main"), ROWS, findings)
    assert [f.severity for f in findings.merged()] == [WARNING]
    assert {name for _, name, _ in asked} == set(FILES)
    assert {(owner, revision) for owner, _, revision in asked} == {("owner/name", "main")}


def test_the_audit_and_its_verdict_look_at_chat(source, tmp_path):
    """And the audit of an original, which only lends its weights, does not."""
    config = checkpoints.packable(num_hidden_layers=2, first_k_dense_replace=1)
    folder = checkpoints.write_tokenizer(checkpoints.write(tmp_path / "hf", config))
    set_template(BAD)(folder)
    headers = release.headers_of(str(folder))
    assert isinstance(next(iter(headers.tensors.values())), Stored)
    assert audit.audit(headers).verdict.startswith(FAULT)
    assert not audit.audit(headers, with_chat=False).verdict.startswith(FAULT)
    set_template(GOOD)(folder)
    assert "but for" not in audit.audit(headers).verdict
    (folder / "tokenizer.json").unlink()
    assert "headers are as they should be, but for 1 warning above; " in audit.audit(headers).verdict
    assert not audit.audit(headers).verdict.startswith(FAULT)
