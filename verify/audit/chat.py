"""Tokenizer and chat, from the small files beside the weights: ids that end a generation, tokens without a row in the
embedding, the chat template.

Plain JSON, and templates parsed: nothing is run, and no tokenizer is built. A FAULT is what breaks: a token that
the embedding has no row for, ends of which no two files agree, a template that no engine can compile. What merely differs is
a warning, as is a tokenizer that is not there; another file that is not there is a note.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from glm_dsa.config_reader import read_json
from glm_dsa.errors import ConfigError, printable

from ..core.findings import FAULT, NOTE, WARNING, Findings
from ..engines.headers import Release, small_file
from . import template

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
GENERATION, TEMPLATE, OLD_TEMPLATE = "generation_config.json", "chat_template.jinja", "chat_template.json"
LARGEST_TOKENIZER = 64 << 20  # bytes; GLM-5.2's has 20 MB
SHOWN = 6  # ids or tokens in a message
EOS, PAD, BOS = "eos_token", "pad_token", "bos_token"


def judge(release: Release, vocabulary: int, findings: Findings) -> None:
    """vocabulary: rows of the embedding."""
    files = Files(release, findings)
    tokens = _Tokens(files, vocabulary, findings)
    config, generation, tokenizer = dict(release.config), files.json(GENERATION), files.json(TOKENIZER_CONFIG)
    if TOKENIZER in files.absent:  # weights alone are published too
        findings.say(
            WARNING, f"{TOKENIZER}: not there, and mlx-lm does not load a build without one; copy the original's"
        )
    if others := [name for name in files.absent if name != TOKENIZER]:
        findings.say(NOTE, f"not there: {', '.join(others)}; what they would say of tokens and chat was not looked at")
    sources = {"config.json": config, GENERATION: generation or {}}
    ids = {key: ids_named(sources, key, findings) for key in (EOS, PAD, BOS)}
    _beyond(ids, vocabulary, findings)
    if tokenizer is not None:
        tokens.check_added(tokenizer)
        for key, named in ids.items():
            if (found := tokens.id_of(tokenizer, key)) is not None:
                named[TOKENIZER_CONFIG] = [found]
    _ends(ids[EOS], tokenizer, findings)
    _pads(ids[PAD], findings)
    if tokenizer is not None or tokens.by_text:
        _chat(files, tokenizer or {}, findings)


class Files:
    """Small files of a release. What cannot be read is a finding, once, and then as if it were not there."""

    def __init__(self, release: Release, findings: Findings) -> None:
        self.release, self.findings = release, findings
        self.absent: list[str] = []

    def json(self, name: str, most: int = 1 << 20, wanted: bool = True) -> dict[str, Any] | None:
        file = small_file(self.release, name)
        if file is None:
            if wanted:
                self.absent.append(name)
            return None
        try:
            return read_json(file, most)
        except ConfigError as error:
            severity = WARNING if name == GENERATION else FAULT  # mlx-lm passes by a broken generation_config.json
            self.findings.say(severity, str(error).replace(f"{file}: ", f"{name}: ").split("; a checkpoint folder")[0])
            return None

    def text(self, name: str, most: int) -> str | None:
        file = small_file(self.release, name)
        if file is None:
            return None
        try:
            if not file.is_file() or file.stat().st_size > most:
                raise ValueError(f"expected a file of at most {most:,} bytes")
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:  # no UTF-8 is a ValueError
            self.findings.say(FAULT, f"{name}: cannot be read: {error}")
            return None


class _Tokens:
    """What tokenizer.json, and tokenizer_config.json's added_tokens_decoder, number. by_text: {token: id}."""

    def __init__(self, files: Files, vocabulary: int, findings: Findings) -> None:
        self.vocabulary, self.findings = vocabulary, findings
        self.by_text: dict[str, int] = {}
        parsed = files.json(TOKENIZER, LARGEST_TOKENIZER)
        if parsed is None:
            return
        try:
            self.by_text = dict(numbered(parsed))
        except (TypeError, KeyError, ValueError, AttributeError):
            findings.say(
                FAULT, f"{TOKENIZER}: its model.vocab or added_tokens do not number tokens; no tokenizer can be made"
            )
            return
        self._check_rows(TOKENIZER, self.by_text)

    def _check_rows(self, file: str, by_text: Mapping[str, int]) -> None:
        vocabulary = self.vocabulary
        beyond = sorted((number, text) for text, number in by_text.items() if not 0 <= number < vocabulary)
        if beyond:
            shown = ", ".join(f"{_short(text)} {number}" for number, text in beyond[:SHOWN])
            self.findings.say(
                FAULT,
                f"{file}: {len(beyond):,} tokens beyond the embedding's {vocabulary:,} rows ({shown}"
                f"{', ...' if len(beyond) > SHOWN else ''}): config.json's vocab_size, or the tokenizer, is another model's",
            )

    def check_added(self, config: Mapping[str, Any]) -> None:
        """What tokenizer_config.json adds, or numbers otherwise: HF's loader takes both files."""
        said = config.get("added_tokens_decoder")
        added: dict[str, int] = {}
        for number, entry in said.items() if isinstance(said, Mapping) else ():
            text = entry.get("content") if isinstance(entry, Mapping) else None
            if isinstance(text, str) and number.isascii() and number.isdecimal() and len(number) < 19:
                added[text] = int(number)
        self._check_rows(TOKENIZER_CONFIG, {t: n for t, n in added.items() if t not in self.by_text})
        if other := [t for t, n in added.items() if self.by_text.get(t, n) != n]:
            first = other[0]
            self.findings.say(
                WARNING,
                f"{TOKENIZER_CONFIG}: added_tokens_decoder numbers {len(other)} tokens otherwise than {TOKENIZER}: "
                f"{_short(first)} is {added[first]}, there {self.by_text[first]}",
            )
        for text, number in added.items():
            self.by_text.setdefault(text, number)

    def id_of(self, config: Mapping[str, Any], key: str) -> int | None:
        """Of the token that tokenizer_config.json names. One that has no number is given the next by HF's loader."""
        named = config.get(key)
        text = named.get("content") if isinstance(named, Mapping) else named
        if not isinstance(text, str) or not self.by_text:
            return None
        if text in self.by_text:
            return self.by_text[text]
        following = max(self.by_text.values()) + 1
        no_row = following >= self.vocabulary
        self.findings.say(
            FAULT if no_row else WARNING,
            f"{TOKENIZER_CONFIG}: {key} is {_short(text)}, which {TOKENIZER} does not have; loading adds it as {following}"
            + (f", and the embedding has {self.vocabulary:,} rows" if no_row else ", a row that was never trained"),
        )
        return None


def numbered(parsed: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Every token with its number. Raises TypeError, KeyError, ValueError or AttributeError where there is no telling."""
    vocabulary = parsed["model"]["vocab"]
    pairs = vocabulary.items() if isinstance(vocabulary, Mapping) else ((t, i) for i, (t, _) in enumerate(vocabulary))
    added = ((token["content"], token["id"]) for token in parsed.get("added_tokens") or [])
    for chain in (pairs, added):
        for text, number in chain:
            if not isinstance(text, str) or type(number) is not int:
                raise ValueError(text)
            yield text, number


def ids_named(sources: Mapping[str, Mapping[str, Any]], key: str, findings: Findings) -> dict[str, list[int]]:
    """{file: ids of a special token}: a number, a list of them, or null."""
    found: dict[str, list[int]] = {}
    for file, said in sources.items():
        value = said.get(f"{key}_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(n) is int for n in ids):
            findings.say(WARNING, f"{file}: {key}_id = {_short(repr(value))}: expected a number, or a list of numbers")
        elif ids:
            found[file] = ids
    return found


def _beyond(ids: Mapping[str, Mapping[str, list[int]]], vocabulary: int, findings: Findings) -> None:
    for key, named in ids.items():
        for file, numbers in named.items():
            wrong = [n for n in numbers if n >= vocabulary]
            if wrong:
                what = f"{file}: {key}_id {_listed(wrong)}: beyond the embedding's {vocabulary:,} rows"
                findings.say(FAULT, what)
            elif any(n < 0 for n in numbers):
                findings.say(WARNING, f"{file}: {key}_id {_listed([n for n in numbers if n < 0])}: no token has it")


def _ends(named: Mapping[str, list[int]], tokenizer: Mapping[str, Any] | None, findings: Findings) -> None:
    """Engines stop at generation_config's ids, else config's, else the tokenizer's. Lists name more ends than the tokenizer's
    one, and a file may leave ids to another; but ends that no second file knows are somebody else's."""
    told = "; ".join(f"{file} {_listed(ids)}" for file, ids in named.items())
    if not named:
        if tokenizer is not None:
            findings.say(FAULT, f"no file names an end of text (eos_token_id, {EOS}): nothing ends a generation")
        return
    sets = {file: set(ids) for file, ids in named.items()}
    every = [n for ids in sets.values() for n in ids]
    if len(sets) > 1 and len(set(every)) == len(every):
        findings.say(FAULT, f"no two files agree on eos_token_id: {told}; a generation may never end")
        return
    used = next(file for file in (GENERATION, "config.json", TOKENIZER_CONFIG) if file in sets)
    for file, ids in sets.items():
        if missing := sorted(ids - sets[used]):
            findings.say(
                WARNING,
                f"eos_token_id: {used}, which engines go by, leaves out {_listed(missing)} of {file} ({told})",
            )


def _pads(named: Mapping[str, list[int]], findings: Findings) -> None:
    if len({tuple(ids) for ids in named.values()}) > 1:
        told = "; ".join(f"{file} {_listed(ids)}" for file, ids in named.items())
        findings.say(WARNING, f"pad_token_id differs: {told}")


def _chat(files: Files, tokenizer: Mapping[str, Any], findings: Findings) -> None:
    templates, inner = templates_of(files, tokenizer)
    if not templates and not inner:
        if small_file(files.release, TEMPLATE) is None:  # one that cannot be read is told of already
            findings.say(
                WARNING, f"no chat template ({TEMPLATE}, or {TOKENIZER_CONFIG}'s chat_template): no chat is formatted"
            )
        return
    for chosen, severity in ((templates or inner, FAULT), (inner if templates else {}, WARNING)):
        for where, text in chosen.items():
            if wrong := template.compile_error(text):
                findings.say(severity, f"{where}: the chat template does not compile: {wrong}")


def templates_of(files: Files, tokenizer: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """(of a file of their own, tokenizer_config.json's), {where: text}. In force is the first that is there, as in HF:
    chat_template.jinja, .json, tokenizer_config.json."""
    templates: dict[str, str] = {}
    if (text := files.text(TEMPLATE, template.LARGEST)) is not None:
        templates[TEMPLATE] = text
    elif (old := files.json(OLD_TEMPLATE, template.LARGEST, wanted=False)) is not None:
        templates = dict(template.named(old.get("chat_template"), OLD_TEMPLATE))
    return templates, dict(template.named(tokenizer.get("chat_template"), TOKENIZER_CONFIG))


def _short(text: str) -> str:
    text = printable(text)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _listed(ids: list[int]) -> str:
    return ", ".join(str(n)[:20] for n in ids[:SHOWN]) + (", ..." if len(ids) > SHOWN else "")
