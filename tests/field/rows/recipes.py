"""Recipes: what ik_llama.cpp's and llama.cpp's users keep in files, our own TOML, and plans of what does not fit."""

from glm_dsa.planning.formats import Format

from ..asking import followed, loaded, planned, ruled
from ..makers import config_alone, sized, sized_build, tiny
from ..row import REFUSED, UNREADABLE, Row

SLOW = r"(a+)+(b+)+(a|b|ab)*(.*)*\.weightx" + "=q8_0"
BYTES = Format("bfloat16", 3, 64)

ROWS = [
    Row(
        "Thireus's lines, in quotes", "a shell's quotes round each rule", "D14, Thireus/GGUF-Tool-Suite", config_alone("glm-5.2"),
        ruled("'^output\\.weight$=q8_0'\n'^token_embd\\.weight$=q8_0'\n"), says=("q8_0",),
    ),
    Row(
        "Thireus's lines, locked", "a third part says that no tool may change the type", "D14, Thireus/GGUF-Tool-Suite",
        config_alone("glm-5.2"), ruled("^blk\\.[0-9]+\\.attn_norm\\.weight$=f32=locked\n^output\\.weight$=q6_K=locked\n"),
        says=("q6_K",),
    ),
    Row(
        "ubergarm's lines", "comments, blank lines, several rules a line", "ikawrakow/ik_llama.cpp#1168", config_alone("glm-5.2"),
        ruled("# attention\nblk\\..*\\.attn_.*=q8_0\n\nblk\\..*\\.ffn_(gate|up)_exps\\.weight=iq4_k,token_embd\\.weight=iq6_k\n"),
        says=("iq4_k",),
    ),
    Row(
        "type that nobody knows", "q9_0, a slip", "D14", config_alone("glm-5.2"), ruled("output\\.weight=q9_0"), code=UNREADABLE,
        says=("q9_0",),
    ),
    Row(
        "expression that never ends", "a quantifier of a quantifier of a quantifier", "D14", config_alone("glm-5.2"),
        ruled(SLOW, 8.0), code=(0, UNREADABLE),
    ),
    Row(
        "expression that is none", "a bracket that is not closed", "D14", config_alone("glm-5.2"), ruled("blk\\.(.*=q8_0"),
        code=UNREADABLE, says=("regular expression",),
    ),
    Row(
        "long expression that is quick", "twenty layers by name: long, and no trouble", "ikawrakow/ik_llama.cpp#1168",
        config_alone("glm-5.2"), ruled("blk\\.(" + "|".join(map(str, range(3, 23))) + ")\\.ffn_.*_exps\\.weight=iq2_kl"),
        says=("iq2_kl",),
    ),
    Row(
        "our own recipe", "experts in 3 bit, attention in 8", "D20", tiny(),
        followed('[[rule]]\ncomponent = "experts"\nbits = 3\n[[rule]]\ncomponent = "attention"\nbits = 8\n'),
        says=("3 bit",),
    ),
    Row(
        "our own recipe, a component that is none", "expert for experts", "D20", tiny(),
        followed('[[rule]]\ncomponent = "expert"\nbits = 3\n'), code=UNREADABLE, says=("'expert'",),
    ),
    Row(
        "1.5 TB on this machine", "loaded where it cannot fit: refused before anything is read",
        "raullenchai/Rapid-MLX#915", sized("glm-5.2"), loaded, code=UNREADABLE, says=("memory|GB|GiB",),
    ),
    Row(
        "330 GB on this machine", "the same of a packed build", "raullenchai/Rapid-MLX#915",
        sized_build("glm-5.2", lambda name: BYTES, num_nextn_predict_layers=0), loaded, code=UNREADABLE,
        says=("memory|GB|GiB",),
    ),
    Row(
        "330 GB, planned", "asked before, it is a table", "raullenchai/Rapid-MLX#915",
        sized_build("glm-5.2", lambda name: BYTES, num_nextn_predict_layers=0), planned("--context", "32k"),
        says=("experts", "512 GB"),
    ),
    Row(
        "plan of nothing", "a folder without config.json", "antirez/ds4#496",
        lambda bench, folder: folder.mkdir() or folder, planned(), code=UNREADABLE, says=("config.json",),
    ),
]  # fmt: skip
assert REFUSED
