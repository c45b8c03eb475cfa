"""Small files of a release beside its original's: what ends a generation, the tokenizer, the chat template, defaults.

A FAULT is what breaks: a text that becomes other tokens, an end that is lost. What merely differs is a warning (a mended
template is the commonest change of all), other sampling a note. Files are read as they mean, not as they are written: who
saves a tokenizer again orders keys and merges in a way of their own. No code of a template is run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from glm_dsa.config_reader import GENERATION as SAMPLING
from glm_dsa.errors import printable

from ..core.findings import FAULT, NOTE, WARNING, Findings
from ..engines.headers import Release
from . import chat, template, tokenizer_difference
from .chat import BOS, EOS, PAD, SHOWN, TOKENIZER, TOKENIZER_CONFIG

BOOKKEEPING = ("transformers_version", "use_cache", "_from_model_config")  # of generation_config.json
SUPPRESSED = (
    "bad_words_ids", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "max_length",
    "max_new_tokens", "stop_strings",
)  # fmt: skip
# of tokenizer_config.json, each with what HF takes where it is absent
SETTINGS = {
    "add_bos_token": False, "add_eos_token": False, "add_prefix_space": False, "split_special_tokens": False,
    "do_lower_case": False, "remove_space": False, "padding_side": None, "truncation_side": None,
    "clean_up_tokenization_spaces": False, "unk_token": None,
}  # fmt: skip
UNBOUNDED = 1e15  # model_max_length, where nothing is cut


def judge(release: Release, original: Release, findings: Findings) -> dict[str, str]:
    """What could not be compared: {what: why}."""
    mine, theirs = _Side(release), _Side(original)
    open_: dict[str, str] = {}
    if why := tokenizer_difference.judge(release, original, findings):
        open_["the tokenizer, beside the original's"] = why
    elif mine.settings is None or theirs.settings is None:
        who = "release" if mine.settings is None else "original"
        open_[f"{TOKENIZER_CONFIG}, beside the original's"] = f"the {who} has none that can be read"
    for unread in theirs.unread:
        open_[f"{unread.partition(':')[0]}, beside the original's"] = f"the original's cannot be read: {unread}"
    _ends(mine, theirs, findings, open_)
    for key in (PAD, BOS):
        _special(key, mine, theirs, findings)
    _settings(mine.settings, theirs.settings, findings)
    for key, own in mine.limits.items():
        if mine.by_text and theirs.by_text and own != theirs.limits[key]:
            findings.say(
                WARNING,
                f"{TOKENIZER}: {key} = {_short(own)}, the original's says {_short(theirs.limits[key])}: HF's loader overrules "
                "it, other engines do not",
            )
    _templates(mine, theirs, findings, open_)
    _sampling(mine, theirs, findings)
    return open_


class _Side:
    """What a release's small files say. unread: of files that are there and cannot be read (the release's own are named by
    the audit)."""

    def __init__(self, release: Release) -> None:
        found = Findings()
        files = chat.Files(release, found)
        self.release = release
        self.generation = files.json(chat.GENERATION) or {}
        self.settings = files.json(TOKENIZER_CONFIG)
        self.by_text: dict[str, int] = {}
        tokenizer = files.json(TOKENIZER, chat.LARGEST_TOKENIZER) or {}
        try:
            self.by_text = dict(chat.numbered(tokenizer))
        except (TypeError, KeyError, ValueError, AttributeError):  # the audit names it
            tokenizer = {}
        self.added = {token["content"] for token in tokenizer.get("added_tokens") or []}
        self.limits = {key: tokenizer.get(key) for key in ("truncation", "padding")}
        in_file, inner = chat.templates_of(files, self.settings or {})
        self.templates = in_file or inner
        sources = {chat.GENERATION: self.generation, "config.json": release.config}
        self.ids = {key: chat.ids_named(sources, key, found) for key in (EOS, PAD, BOS)}
        for key, named in self.ids.items():
            said = None if self.settings is None else self.settings.get(key)
            word = said.get("content") if isinstance(said, Mapping) else said
            if isinstance(word, str) and word in self.by_text:
                named[TOKENIZER_CONFIG] = [self.by_text[word]]
        self.unread = [f.what for f in found.merged()]

    def is_special(self, token: int) -> bool:
        return not self.by_text or any(self.by_text.get(text) == token for text in self.added)

    def word(self, token: int) -> str:
        text = next((t for t, n in self.by_text.items() if n == token), None)
        return f"{token}" if text is None else f"{token} ({printable(text)[:30]})"

    def listed(self, ids: set[int]) -> str:
        return ", ".join(self.word(n) for n in sorted(ids)[:SHOWN]) + (", ..." if len(ids) > SHOWN else "")


def _ends(mine: _Side, theirs: _Side, findings: Findings, open_: dict[str, str]) -> None:
    """Engines go by generation_config.json, else config.json, else the tokenizer."""
    own, due = mine.ids[EOS], theirs.ids[EOS]
    if not own or not due:
        if own or due:
            open_["ends of a generation, beside the original's"] = f"the {'release' if due else 'original'} names none"
        return
    (file, ids), (their_file, their_ids) = (next(iter(named.items())) for named in (own, due))
    if lost := set(their_ids) - set(ids):
        findings.say(
            FAULT,
            f"{file}: eos_token_id lacks {theirs.listed(lost)}, at which the original's {their_file} ends a generation: it "
            "talks on",
        )
    every = {n for numbers in due.values() for n in numbers}
    for other, numbers in own.items():  # one engine or another ends at those of any
        if words := {n for n in numbers if n not in every and not mine.is_special(n)}:
            findings.say(
                FAULT, f"{other}: eos_token_id has {mine.listed(words)}: words of a text, at which the original goes on"
            )
        elif other != file and set(numbers) != set(due.get(other, numbers)):
            findings.say(
                WARNING,
                f"{other}: eos_token_id = {mine.listed(set(numbers))}, the original's says {theirs.listed(set(due[other]))}",
            )
    if new := {n for n in set(ids) - set(their_ids) if mine.is_special(n)}:
        findings.say(WARNING, f"{file}: eos_token_id has {mine.listed(new)} besides the original's")


def _special(key: str, mine: _Side, theirs: _Side, findings: Findings) -> None:
    for file, ids in mine.ids[key].items():
        due = theirs.ids[key].get(file, ids)
        if set(ids) != set(due):
            findings.say(
                WARNING, f"{file}: {key}_id = {mine.listed(set(ids))}, the original's says {theirs.listed(set(due))}"
            )


def _settings(mine: Mapping[str, Any] | None, theirs: Mapping[str, Any] | None, findings: Findings) -> None:
    if mine is None or theirs is None:
        return
    for key, default in SETTINGS.items():
        values = [s[key] if s.get(key) is not None else default for s in (mine, theirs)]
        own, due = (v.get("content") if isinstance(v, Mapping) else v for v in values)
        if own != due and not (default is None and None in (own, due)):
            findings.say(WARNING, f"{TOKENIZER_CONFIG}: {key} = {_short(own)}, the original's says {_short(due)}")
    lengths = [s.get("model_max_length") for s in (mine, theirs)]
    own, due = (n if isinstance(n, (int, float)) and n < UNBOUNDED else UNBOUNDED for n in lengths)
    if own < due:
        said = "none" if due == UNBOUNDED else f"{due:g}"
        findings.say(
            WARNING,
            f"{TOKENIZER_CONFIG}: model_max_length = {own:g}, the original's says {said}: some engines cut prompts there",
        )


def _templates(mine: _Side, theirs: _Side, findings: Findings, open_: dict[str, str]) -> None:
    """By name, where there are several; a single one is the default."""
    own, due = (
        {where.partition(", ")[2] or "default": (where, text) for where, text in side.templates.items()}
        for side in (mine, theirs)
    )
    if not due:
        if own:
            open_["the chat template, beside the original's"] = "the original has none"
        return
    if not own and not mine.by_text and mine.settings is None:  # weights alone, for another program's tokenizer
        open_["the chat template, beside the original's"] = "the release has neither a tokenizer nor a template"
        return
    for name, (their_file, text) in due.items():
        if name not in own:
            findings.say(
                WARNING if own else FAULT,
                f"chat template{'' if name == 'default' else f' {printable(name)}'}: the release has none, the original's "
                f"{their_file} has: a chat is not formatted as the model was trained",
            )
        elif not template.is_same(own[name][1], text):
            findings.say(WARNING, f"{own[name][0]}: another chat template: {template.difference(own[name][1], text)}")


def _sampling(mine: _Side, theirs: _Side, findings: Findings) -> None:
    """Where both say something. Older files have it in config.json."""
    own, due = (
        {k: v for k, v in side.release.config.items() if k in SAMPLING and v is not None}
        | {k: v for k, v in side.generation.items() if not k.endswith("token_id") or k in SUPPRESSED}
        for side in (mine, theirs)
    )
    for severity, keys in (
        (WARNING, SUPPRESSED),
        (NOTE, sorted((own.keys() | due.keys()) - set(SUPPRESSED) - set(BOOKKEEPING))),
    ):
        others = [k for k in keys if own.get(k) != due.get(k) and not k.startswith("output_")]
        if others:
            shown = ", ".join(f"{k} = {_short(own.get(k))} (there {_short(due.get(k))})" for k in others[:SHOWN])
            more = f" and {len(others) - SHOWN} more" if others[SHOWN:] else ""
            findings.say(severity, f"{chat.GENERATION}: other defaults than the original's: {shown}{more}")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
