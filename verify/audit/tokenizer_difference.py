"""Two releases' tokenizers: tokens by their ids, merges, and what is done before and after them.

Ids and merges are held against each other whole. Of the other sections, which may say the same in other words, the two are
tried: texts that they encode otherwise are a FAULT, none is a warning.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from glm_dsa.errors import printable

from ..core.findings import FAULT, WARNING, Findings
from ..engines.headers import Release
from ..engines.layout_evidence import kept_texts
from ..engines.tokenizer import tokenizer_of
from .chat import SHOWN, TOKENIZER

SECTIONS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
TRIED = (  # what tokenizers are apart in: spaces, digits, contractions, case, accents in two forms, scripts, emoji, controls
    "a  b   c\n\n\n\td  ", " It's what they'LL do: 3.14159 of 1234567890 (100%)!",
    "na\u00efve e\u0301t\u00e9 \ufb01 \u017f \u212b \u0130", "\u4e2d\u6587\uff0c\u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4",
    "\u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0e44\u0e17\u0e22 \u0627\u0644\u0639",
    "\U0001f642 \U0001f469\u200d\U0001f469\u200d\U0001f467 \u00a0\u200b\ufeff x\r\ny", "",
)  # fmt: skip


def judge(release: Release, original: Release, findings: Findings) -> str:
    """Why they could not be compared; empty where they were."""
    found = []
    for side, who in ((original, "the original"), (release, "the release")):
        try:
            tokenizer = tokenizer_of([side.folder]) if side.folder is not None else None
        except ValueError as error:
            if side is release:
                findings.say(FAULT, f"{TOKENIZER}: the original's can be read, this cannot: {error}")
            return f"{who}'s {TOKENIZER} cannot be read"
        if tokenizer is None:
            return f"{who} has no {TOKENIZER}"
        found.append(tokenizer)
    theirs, mine = found
    Tokenizers(mine, theirs, findings).judge()
    return ""


@dataclass
class Tokenizers:
    """mine, theirs: as the library reads them; what they say is compared as it writes them, however the files spell it."""

    mine: Any
    theirs: Any
    findings: Findings

    def judge(self) -> None:
        own, due = (json.loads(t.to_str()) for t in (self.mine, self.theirs))
        self._tokens()
        self._merges(own["model"], due["model"])
        mine, theirs = _sections(own), _sections(due)
        common = mine["added_tokens"].keys() & theirs["added_tokens"].keys()  # the others are told already
        for said in (mine, theirs):
            said["added_tokens"] = {t: said["added_tokens"][t] for t in common}
        changed = [name for name in mine if mine[name] != theirs[name]]
        if changed:
            self._tried(changed)

    def _tokens(self) -> None:
        own, due = (t.get_vocab(with_added_tokens=True) for t in (self.mine, self.theirs))
        moved = sorted((n, t) for t, n in due.items() if own.get(t, n) != n)
        gone = sorted((n, t) for t, n in due.items() if t not in own)
        new = sorted((n, t) for t, n in own.items() if t not in due)
        if moved:
            shown = _listed(f"{_short(t)} is {own[t]}, there {n}" for n, t in moved)
            self._say(FAULT, f"{len(moved):,} of {len(due):,} tokens have other ids than the original's: {shown}")
        if gone:
            self._say(
                FAULT,
                f"{len(gone):,} tokens of the original's are gone: {_listed(f'{_short(t)} {n}' for n, t in gone)}",
            )
        if new:
            self._say(
                WARNING, f"{len(new):,} tokens that the original's lacks: {_listed(f'{_short(t)} {n}' for n, t in new)}"
            )

    def _merges(self, own: Mapping[str, Any], due: Mapping[str, Any]) -> None:
        mine, theirs = own.get("merges") or [], due.get("merges") or []
        if mine == theirs:
            return
        at = next(
            (i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs))
        )
        expected, got = (_short(" ".join(m[at])) if at < len(m) else "none" for m in (theirs, mine))
        self._say(
            FAULT,
            f"merges are not the original's ({len(mine):,}, there {len(theirs):,}): the first, number {at}: expected {expected}, "
            f"got {got}",
        )

    def _tried(self, changed: list[str]) -> None:
        """Pieces and not ids: tokens that were renumbered are told already."""
        names = ", ".join(changed)
        texts = [
            *kept_texts().values(),
            *TRIED,
            *(f"a {t.content}b" for t in self.theirs.get_added_tokens_decoder().values()),
        ]
        for text in texts:
            own, due = (t.encode(text).tokens for t in (self.mine, self.theirs))
            if own != due:
                at = next(
                    (i for i, (a, b) in enumerate(zip(own, due, strict=False)) if a != b), min(len(own), len(due))
                )
                expected, got = (
                    " ".join(_short(t) for t in tokens[at : at + SHOWN]) or "none" for tokens in (due, own)
                )
                self._say(
                    FAULT,
                    f"{names}: not the original's: of {_short(text)} token {at} on is {got}, expected {expected}",
                )
                return
        for text in texts:
            own, due = (t.decode(t.encode(text).ids, skip_special_tokens=False) for t in (self.mine, self.theirs))
            if own != due:
                self._say(FAULT, f"{names}: not the original's: {_short(due)} is decoded as {_short(own)}")
                return
        self._say(WARNING, f"{names}: not written as the original's; {len(texts)} texts are encoded and decoded alike")

    def _say(self, severity: str, what: str) -> None:
        self.findings.say(severity, f"{TOKENIZER}: {what}")


def _sections(said: Mapping[str, Any]) -> dict[str, Any]:
    """All but ids and merges."""
    model = {k: v for k, v in said["model"].items() if k != "merges" and (k != "vocab" or isinstance(v, list))}
    added = {t["content"]: {k: v for k, v in t.items() if k != "id"} for t in said["added_tokens"]}
    return {name: said.get(name) for name in SECTIONS} | {"added_tokens": added, "model": model}


def _listed(parts: Iterator[str]) -> str:
    found = list(parts)
    return ", ".join(found[:SHOWN]) + (", ..." if found[SHOWN:] else "")


def _short(text: str) -> str:
    text = printable(text)
    return repr(text if len(text) <= 40 else f"{text[:36]}...")
