"""Tokenizer and chat template: small files beside the weights, and the commonest complaint about builds."""

import json

from ..asking import audited
from ..makers import config, file, json_file, trained
from ..row import SETTLED, Row

BROKEN = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endif %}"
TOOLS = (
    "{% for m in messages %}{% for k, v in m.args.items() %}<arg_key>{{ k ~ v }}{% endfor %}{{ m.content }}{% endfor %}"
)
KEPT = "interleaved"
USER = {"eos_token": "<|user|>"}
QUIET = ("FAULT", "warning")


def tokens(change):
    """tokenizer.json, changed."""

    def step(draft):
        said = json.loads(draft.files["tokenizer.json"])
        change(said)
        draft.files["tokenizer.json"] = json.dumps(said)

    return step


def more_words(said):
    said["model"]["vocab"] |= {f"word{i}": 262 + i for i in range(10)}


def special_beyond(said):
    said["added_tokens"].append(dict(said["added_tokens"][0], id=300, content="<|observation|>"))


def template_inside(draft):
    """As tokenizers before chat_template.jinja keep it."""
    text = draft.files.pop("chat_template.jinja")
    draft.files["tokenizer_config.json"] = json.dumps(
        json.loads(draft.files["tokenizer_config.json"]) | {"chat_template": text}
    )


ROWS = [
    Row(
        "tokenizer and template as kept", "nothing to complain of", "zai-org/GLM-5.2", trained(KEPT), audited(),
        never=QUIET,
    ),
    Row(
        "no stop at the end of a turn", "generation_config lists one of two ends: it talks on until its tokens are spent",
        "Blaizzy/mlx-vlm#2112", trained(KEPT, json_file("generation_config.json", eos_token_id=[1])), audited(),
        code=SETTLED, says=("eos_token_id",),
    ),
    Row(
        "config.json's ends are another model's", "eos_token_id of a base model beside a chat model's tokenizer",
        "mymusise/ChatGLM-Tuning#67", trained(KEPT, config(eos_token_id=[7])), audited(), code=SETTLED,
        says=("eos_token_id",),
    ),
    Row(
        "tokenizer's own end is in neither list", "the tokenizer ends with another token than both configs",
        "Blaizzy/mlx-vlm#309", trained(KEPT, json_file("tokenizer_config.json", **USER)), audited(),
        code=SETTLED, says=("eos",),
    ),
    Row(
        "an end beyond the vocabulary", "eos_token_id 154820 in a model of 262", "mymusise/ChatGLM-Tuning#67",
        trained(KEPT, config(eos_token_id=[154820]), json_file("generation_config.json", eos_token_id=[154820])), audited(),
        code=SETTLED, says=("154820",),
    ),
    Row(
        "padding that is an end", "pad_token_id of config and generation_config apart", "huggingface/transformers#23175",
        trained(KEPT, json_file("generation_config.json", pad_token_id=1)), audited(), code=SETTLED, says=("pad_token_id",),
    ),
    Row(
        "ends as one number", "eos_token_id 1 in both, not a list", "Blaizzy/mlx-vlm#309",
        trained(KEPT, config(eos_token_id=1), json_file("generation_config.json", eos_token_id=1)), audited(), never=QUIET,
    ),
    Row(
        "no generation_config", "many builds have none", "Blaizzy/mlx-vlm#2112",
        trained(KEPT, file("generation_config.json", None)), audited(), never=QUIET,
    ),
    Row(
        "more words than rows", "tokenizer.json of a later release", "mymusise/ChatGLM-Tuning#67",
        trained(KEPT, tokens(more_words)), audited(), code=SETTLED, says=("tokenizer", "262|vocab"),
    ),
    Row(
        "special token without a row", "<|observation|> was added, and the embedding was not resized",
        "tenstorrent/tt-inference-server#4249", trained(KEPT, tokens(special_beyond)), audited(), code=SETTLED,
        says=("observation|300",),
    ),
    Row(
        "no chat template", "lost in conversion: every chat client falls back to its own", "ml-explore/mlx-lm#340",
        trained(KEPT, file("chat_template.jinja", None)), audited(), code=SETTLED, says=("template",),
    ),
    Row(
        "chat template that does not compile", "an end without its beginning: nothing is answered",
        "lmstudio-ai/lmstudio-bug-tracker#2075", trained(KEPT, file("chat_template.jinja", BROKEN)), audited(),
        code=SETTLED, says=("chat_template",),
    ),
    Row(
        "chat template in tokenizer_config.json", "as it was before chat_template.jinja", "ml-explore/mlx-lm#340",
        trained(KEPT, template_inside), audited(), never=QUIET,
    ),
    Row(
        "chat template with tools", "GLM's loop over arguments is sound Jinja, whatever another engine lacks",
        "noonghunna/club-3090#1250", trained(KEPT, file("chat_template.jinja", TOOLS)), audited(), never=QUIET,
    ),
    Row(
        "model_file", "a definition of one's own, that mlx-lm runs in the place of its own", "P6, ml-explore/mlx-lm#1410",
        trained(KEPT, config(model_file="model.py"), file("model.py", "raise SystemExit")), audited(),
        says=("warning: .*model_file = model.py", "verdict: headers are as they should be"), never=("FAULT",),
    ),
    Row(
        "auto_map and Python files", "as published for HF's remote code", "P6",
        trained(KEPT, config(auto_map={"AutoModel": "modeling_glm.Glm"}), file("modeling_glm.py", "raise SystemExit")),
        audited(), says=("auto_map", "modeling_glm.py"), never=("FAULT",),
    ),
    Row(
        "no tokenizer at all", "weights alone, for another program's tokenizer", "antirez/ds4#496",
        trained(KEPT, file("tokenizer.json", None), file("tokenizer_config.json", None)), audited(), code=SETTLED,
        never=("FAULT",),
    ),
]  # fmt: skip
