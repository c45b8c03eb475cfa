"""What llama.cpp and ik_llama.cpp would store: the tensors of a GGUF, the exact size of each type, and recipes of regular
expressions (`--custom-q` of ik_llama.cpp, `--tensor-type` of llama.cpp).

    # attention
    blk\\..*\\.attn_.*=q8_0
    blk\\..*\\.ffn_(gate|up)_exps\\.weight=iq4_k, output\\.weight=iq6_k

Rules are separated by commas or lines; each is searched for in the name, and the first that is found decides. Recipes of
Thireus' GGUF Tool Suite are read too: a rule may stand in quotes, and end in `=locked`. Norms, biases and the router are
stored in float32 and no rule is asked about them. Where a row is no multiple of a type's block, another
type takes its place, as in ik_llama.cpp's llama-quantize (change_type_if_necessary). What no rule names is of one `base`
type here; llama-quantize has mixtures of its own for it, which are not planned.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import NamedTuple

from .. import weights
from ..config import ModelArgs
from ..errors import RecipeError
from .components import Component, counted

LARGEST, LONGEST = 1 << 20, 4096  # bytes of a file of rules, and signs of a pattern
PATIENCE = 0.4  # seconds of computing that one pattern may take for all names; a sound one takes some milliseconds
WAIT = 30  # seconds for all patterns, whatever else the machine does
MIXTURE = re.compile(r"(.+)_(?:XXS|XS|S|M|L|XL)", re.IGNORECASE)  # what a file is called by: Q4_K_M, IQ3_M
# One item of a line: up to a comma that is not in quotes.
ITEM = re.compile(r"""(?:'[^']*'|"[^"]*"|[^,])+""")


class Type(NamedTuple):
    """Values in a block, bytes of a block, and bytes that each row has besides."""

    block: int
    nbytes: int
    row: int = 0

    def of(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor whose rows are its last axis."""
        return prod(shape[:-1]) * (self.row + shape[-1] // self.block * self.nbytes)

    def fits(self, width: int) -> bool:
        return width % self.block == 0


# ggml's (gguf-py, GGML_QUANT_SIZES; a test holds this table to it) ..
TYPES = {
    "f64": Type(1, 8), "f32": Type(1, 4), "f16": Type(1, 2), "bf16": Type(1, 2),
    "i8": Type(1, 1), "i16": Type(1, 2), "i32": Type(1, 4), "i64": Type(1, 8),
    "q4_0": Type(32, 18), "q4_1": Type(32, 20), "q5_0": Type(32, 22), "q5_1": Type(32, 24),
    "q8_0": Type(32, 34), "q8_1": Type(32, 40),
    "q2_K": Type(256, 84), "q3_K": Type(256, 110), "q4_K": Type(256, 144), "q5_K": Type(256, 176),
    "q6_K": Type(256, 210), "q8_K": Type(256, 292),
    "iq1_s": Type(256, 50), "iq1_m": Type(256, 56), "iq2_xxs": Type(256, 66), "iq2_xs": Type(256, 74),
    "iq2_s": Type(256, 82), "iq3_xxs": Type(256, 98), "iq3_s": Type(256, 110), "iq4_nl": Type(32, 18),
    "iq4_xs": Type(256, 136), "tq1_0": Type(256, 54), "tq2_0": Type(256, 66), "mxfp4": Type(32, 17), "nvfp4": Type(64, 36),
    "q1_0": Type(128, 18),
}  # fmt: skip
# .. and ik_llama.cpp's own (ggml-common.h, the block structs; ggml.c, row_meta_size), as of August 2026
IK_TYPES = {
    "q6_0": Type(32, 26), "iq2_k": Type(256, 76), "iq3_k": Type(256, 110), "iq4_k": Type(256, 144),
    "iq5_k": Type(256, 176), "iq6_k": Type(256, 212), "iq2_ks": Type(256, 70, 2), "iq2_kl": Type(256, 86, 2),
    "iq3_ks": Type(256, 102, 2), "iq4_ks": Type(256, 136, 4), "iq4_kss": Type(256, 128, 4),
    "iq5_ks": Type(256, 168, 4), "iq1_kt": Type(256, 56, 4), "iq2_kt": Type(256, 68, 4),
    "iq3_kt": Type(256, 100, 4), "iq4_kt": Type(256, 128, 4),
}  # fmt: skip
# Its types of interleaved rows ("repacked") take the bytes of the plain ones, but for two with blocks of their own.
REPACKED = {f"{name}_r4": (TYPES | IK_TYPES)[name] for name in (
    "q2_K", "q3_K", "q4_K", "q5_K", "q6_K", "q5_0", "q6_0", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_nl",
    "iq2_k", "iq3_k", "iq4_k", "iq5_k", "iq4_ks", "iq5_ks",
)} | {f"{name}_r8": TYPES[name] for name in ("q4_0", "q8_0", "iq4_xs")} | {
    "bf16_r16": TYPES["bf16"], "iq1_s_r4": Type(32, 6, 2), "iq1_m_r4": Type(32, 7, 2),
}  # fmt: skip
ALL = TYPES | IK_TYPES | REPACKED
INTEGERS = ("i8", "i16", "i32", "i64")
# Of types with blocks of 256, what takes their place in rows that are no multiple of it.
INSTEAD = {
    "iq4_nl": (
        "iq1_s", "iq1_m", "iq1_kt", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_k", "iq2_ks", "iq2_kl", "iq2_kt", "iq3_xxs", "iq3_s",
        "iq3_k", "iq3_ks", "iq3_kt", "iq4_xs", "iq4_ks", "iq4_kss", "iq4_kt", "q2_K", "q3_K",
    ),
    "q5_0": ("q4_K", "iq4_k", "iq5_ks"),
    "q6_0": ("q5_K", "iq5_k"),
    "q8_0": ("q6_K", "iq6_k"),
}  # fmt: skip

# The end of a tensor's name here, and what it is called there (gguf-py, constants.py).
GLOBAL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
IN_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.embed_q": "attn_k_b",
    "self_attn.unembed_out": "attn_v_b",
    "self_attn.o_proj": "attn_output",
    "self_attn.indexer.wq_b": "indexer.attn_q_b",
    "self_attn.indexer.wk": "indexer.attn_k",
    "self_attn.indexer.k_norm": "indexer.k_norm",
    "self_attn.indexer.weights_proj": "indexer.proj",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.switch_mlp.gate_proj": "ffn_gate_exps",
    "mlp.switch_mlp.up_proj": "ffn_up_exps",
    "mlp.switch_mlp.down_proj": "ffn_down_exps",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "eh_proj": "nextn.eh_proj",
    "enorm": "nextn.enorm",
    "hnorm": "nextn.hnorm",
    "shared_head.norm": "nextn.shared_head_norm",
    "shared_head.head": "nextn.shared_head_head",
    "embed_tokens": "nextn.embed_tokens",
}


def inventory(args: ModelArgs) -> Iterator[weights.TensorSpec]:
    """Every tensor of the model's GGUF; shapes have the rows last, as everywhere here (GGUF counts them first)."""
    for spec in weights.module_inventory(args):
        yield spec._replace(name=name_of(spec.name))


def name_of(name: str) -> str:
    """model.layers.3.self_attn.embed_q.weight -> blk.3.attn_k_b.weight."""
    layer = weights.LAYER.fullmatch(name)
    within = name if layer is None else layer[2]
    known = GLOBAL if layer is None else IN_LAYER
    if within in known:
        theirs = known[within]
    else:
        path, _, suffix = within.rpartition(".")
        theirs = f"{known[path]}.{suffix}"
    return theirs if layer is None else f"blk.{layer[1]}.{theirs}"


@dataclass(frozen=True)
class Rules:
    """(pattern, type) in order, and the type of what none of them names."""

    rules: tuple[tuple[str, str], ...]
    base: str
    source: str = ""
    found: Mapping[str, int | None] = field(
        default_factory=dict, compare=False
    )  # the place that decides, of names tried

    def tried(self, names: list[str]) -> Rules:
        """The same, and what they decide for these names. Raises `RecipeError`, naming the pattern, where one takes forever.

        `re` backtracks, and how far cannot be read off a pattern. So a process of its own does the matching, which the
        system ends when one pattern has computed too long: no signal, no thread of the caller's is touched.
        """
        if not self.rules:
            return self
        text = json.dumps([PATIENCE, [pattern for pattern, _ in self.rules], names])
        command, source = [sys.executable, "-I", "-S", "-c", TRIAL], self.source or "--custom-q"
        try:
            done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=WAIT, check=False)  # noqa: S603 - Python itself, on data
            lines, end, why = done.stdout.splitlines(), done.returncode, done.stderr.strip().rpartition("\n")[2]
        except subprocess.TimeoutExpired as error:
            lines, end, why = bytes(error.stdout or b"").decode().splitlines(), -signal.SIGPROF, ""
        if end == 0:
            return replace(self, found=dict(zip(names, json.loads(lines[-1]), strict=True)))
        which = repr(self.rules[int(lines[-1])][0]) if lines else "no rule"
        if end == -signal.SIGPROF:
            why = "takes forever on this model's names (its repeats backtrack); write it with fewer * and +, none in another"
        raise RecipeError(f"{source}: {which}: {why or f'matching ended with {end}'}")

    def type_of(self, name: str) -> tuple[str, int | None]:
        """(type, the place of the rule that decides)."""
        if name in self.found:
            place = self.found[name]
        else:
            place = next((i for i, (pattern, _) in enumerate(self.rules) if re.search(pattern, name)), None)
        return (self.base, None) if place is None else (self.rules[place][1], place)

    def told(self) -> str:
        return f"{self.source or 'custom-q'}, {self.base} for the rest" if self.rules else self.base


# What a rule has found is not asked of later ones. SIGPROF, of CPU time, ends a process by itself.
TRIAL = """
import json, re, signal, sys, warnings
warnings.simplefilter("ignore")
patience, patterns, names = json.load(sys.stdin)
left, found = list(range(len(names))), [None] * len(names)
for place, pattern in enumerate(patterns):
    print(place, flush=True)
    signal.setitimer(signal.ITIMER_PROF, patience)
    search = re.compile(pattern).search
    for i in [i for i in left if search(names[i])]:
        found[i] = place
    left = [i for i in left if found[i] is None]
signal.setitimer(signal.ITIMER_PROF, 0)
print(json.dumps(found))
"""


def rules_of(said: str | None, base: str = "bf16") -> Rules:
    """A file of rules, or the rules themselves. Raises `RecipeError`."""
    if said is None:
        return Rules((), known(base, "--gguf"))
    if not said.strip():
        raise RecipeError("--custom-q: empty; expected a file of rules, or PATTERN=TYPE,...")
    source, text = "--custom-q", said
    if "=" not in said or ("\n" not in said and os.path.isfile(said)):
        source = said
        try:
            if Path(said).stat().st_size > LARGEST:
                raise RecipeError(f"{said}: more than {LARGEST:,} bytes; expected a file of rules")
            text = Path(said).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "no text in UTF-8"
            raise RecipeError(f"--custom-q {said}: {why}; expected a file of rules, or PATTERN=TYPE,...") from None
    rules = []
    lines = (re.split(r"(?:^|\s)#", line)[0] for line in text.splitlines())  # up to a comment
    for item in (unquoted(part, source) for line in lines for part in ITEM.findall(line)):
        if not item:
            continue
        rule = re.sub(r"\s*=\s*locked$", "", item)  # not to be chosen otherwise: nothing is chosen here
        pattern, equals, kind = (part.strip() for part in rule.rpartition("="))
        pattern = unquoted(pattern, source)
        if not equals or not pattern:
            raise RecipeError(f"{source}: {item!r}: expected PATTERN=TYPE")
        if len(pattern) > LONGEST:
            raise RecipeError(
                f"{source}: a pattern of {len(pattern):,} signs; {LONGEST:,} at most, so part it into several"
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what a later Python may read otherwise
                re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise RecipeError(f"{source}: {pattern!r}: no regular expression: {error}") from None
        rules.append((pattern, known(kind, f"{source}: {pattern!r}")))
    if not rules:
        raise RecipeError(f"{source}: no rules; expected PATTERN=TYPE, one a line")
    return Rules(tuple(rules), known(base, "--gguf"), source)


def unquoted(text: str, source: str) -> str:
    """Without the quotes around it. Raises `RecipeError` where one is not closed."""
    text = text.strip()
    ends = {text[:1], text[-1:]} & {"'", '"'}
    if not ends:
        return text
    if len(text) > 1 and text[0] == text[-1]:
        return text[1:-1].strip()
    if text[0] in ends and text.count(text[0]) > 1:  # 'PATTERN'=TYPE
        return text
    raise RecipeError(f"{source}: {text!r}: expected 'PATTERN=TYPE', got a quote that is not closed")


def known(kind: str, where: str) -> str:
    """A type as ggml writes it, whatever its letters' case. Raises `RecipeError`."""
    found = next((name for name in ALL if name.lower() == kind.lower()), None)
    if found in INTEGERS:
        raise RecipeError(f"{where}: {found} keeps whole numbers; expected a type of weights")
    mixture = MIXTURE.fullmatch(kind)
    if found is None and mixture is not None:
        head = mixture[1].lower()
        like = [name for name in TYPES if name.lower() == head or name.lower().startswith(f"{head}_")]
        if like:
            raise RecipeError(
                f"{where}: {kind} is a mixture of types, which llama-quantize chooses; expected one type, {like[0]} say, or rules "
                "that name each tensor's"
            )
    if found is None:
        raise RecipeError(
            f"{where}: unknown type {kind!r}; known are {', '.join(TYPES | IK_TYPES)}, and repacked {', '.join(REPACKED)}"
        )
    return found


def stored_as(spec: weights.TensorSpec, rules: Rules) -> tuple[str, int | None, str]:
    """(type, place of the rule that decided, the type that was asked for) of a tensor of `inventory`. Raises `RecipeError`."""
    if not spec.is_packable:
        return "f32", None, "f32"
    asked, place = rules.type_of(spec.name)
    kind = asked
    if not ALL[kind].fits(spec.shape[-1]):
        plain = re.sub(r"_r\d+$", "", kind)
        kind = next((other for other, kinds in INSTEAD.items() if plain in kinds), kind)
    if not ALL[kind].fits(spec.shape[-1]):
        rule = "--gguf" if place is None else repr(rules.rules[place][0])
        raise RecipeError(
            f"{rule}: {spec.name} has rows of {spec.shape[-1]}, which blocks of {ALL[kind].block} ({kind}) do not divide"
        )
    return kind, place, asked


def planned(args: ModelArgs, rules: Rules, with_mtp: bool = True) -> tuple[dict[str, Component], list[str]]:
    """By component, and what is worth saying of the rules. Raises `RecipeError`."""
    used: Counter[int] = Counter()
    replaced: dict[tuple[str, str], list[str]] = {}
    rest, rows = 0, []
    specs = [spec for spec in inventory(args) if with_mtp or spec.component != "mtp"]
    rules = rules.tried([spec.name for spec in specs])
    for spec in specs:
        kind, place, asked = stored_as(spec, rules)
        if not spec.is_packable and rules.type_of(spec.name)[0] == kind:
            place = rules.type_of(spec.name)[
                1
            ]  # a rule that says what holds anyway, as Thireus' recipes do, is followed
        if place is not None:
            used[place] += 1
        elif spec.is_packable:
            rest += 1
        if kind != asked:
            replaced.setdefault((asked, kind), []).append(spec.name)
        rows.append((spec, ALL[kind].of(spec.shape), kind))
    notes = [f"{pattern!r} decides for no tensor" for i, (pattern, _) in enumerate(rules.rules) if not used[i]]
    notes += [
        f"{len(names)} tensors of rows that no block of {asked} divides are {kind} instead ({names[0]}, ...)"
        for (asked, kind), names in replaced.items()
    ]
    if rules.rules and rest:
        notes.append(f"no rule names {rest} tensors: {rules.base} is planned for them (--gguf TYPE for another)")
    return counted(rows), notes
