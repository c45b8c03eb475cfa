"""What was caught, by this gate and by the rules of others: one row for each fault, as text, Markdown or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from glm_dsa.text import table

from .. import FOLDER, faults
from .baselines import CAUGHT, FOUR, HALF, MISSED, NOT_ASKED, PUBLISHED_TOPK, RULES, SETTINGS, TEXT
from .judging import is_named

KEPT = FOLDER / "judged.json"


class Judged:
    """The record of one `python -m verify judge`: {"faults": .., "rules": .., "random": .., "versions": ..}."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = record
        self.found, self.rules, self.random = record["faults"]["faults"], record["rules"], record["random"]
        self.real = [f for f in faults.CATALOGUE.values() if not f.equivalent and f.name in self.found]
        self.equivalent = [f for f in faults.CATALOGUE.values() if f.equivalent and f.name in self.found]

    @classmethod
    def read(cls, path: Path = KEPT) -> Judged:
        """Raises ValueError, in one line, where there is no such record."""
        try:
            judged = cls(json.loads(path.read_text(encoding="utf-8")))
            judged.text()
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror or error}; python -m verify judge --keep writes it") from None
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: no record of a judge ({type(error).__name__}: {error}); check it out again"
            ) from None
        return judged

    def keep(self) -> None:
        """Makes this the record that the repository keeps."""
        KEPT.write_text(self.json())

    def json(self) -> str:
        return json.dumps(self.record, indent=1) + "\n"

    # -- cells

    def gate(self, fault: faults.Fault) -> str:
        found = self.found[fault.name]
        if not found.get("claim"):
            return "cannot show" if fault.equivalent and not fault.stage else "missed"
        return "caught and named" if self.is_named(fault) else "caught"

    def is_named(self, fault: faults.Fault) -> bool:
        found = self.found[fault.name]
        return bool(found.get("claim")) and is_named(fault, found["claim"], found["stage"])

    def catches(self, fault: faults.Fault, rule: str, setting: str) -> bool:
        return self.cell(fault, rule)[SETTINGS.index(setting)] == CAUGHT

    def cell(self, fault: faults.Fault, rule: str) -> str:
        """One sign for each of the three prompts: + caught, . missed."""
        return self.rules["faults"][fault.name][rule]

    # -- sums

    def caught(self) -> int:
        return sum(bool(self.found[f.name].get("claim")) for f in self.real)

    def named(self) -> int:
        return sum(map(self.is_named, self.real))

    def caught_by(self, rule: str, setting: str) -> int:
        return sum(self.catches(fault, rule, setting) for fault in self.real)

    def asked(self, rule: str) -> int:
        """Faults in what a rule's runs do use: not a prefill and 20 tokens' MTP, packed caches, batches, FP8."""
        return sum(NOT_ASKED not in self.cell(fault, rule) for fault in self.real)

    def alarms(self, rule: str) -> int:
        """Sound runs that a rule rejects, at any prompt."""
        return sum(CAUGHT in run[rule] for run in self.rules["clean"])

    def strongest(self) -> tuple[str, str, int]:
        """(rule, prompt, faults caught) of the best among others."""
        each = ((rule.name, setting, self.caught_by(rule.name, setting)) for rule in RULES for setting in SETTINGS)
        return max(each, key=lambda one: one[2])

    def problems(self) -> list[str]:
        """What keeps this gate from being content with itself."""
        lines = []
        for fault in self.real:
            found = self.found[fault.name]
            if not self.is_named(fault):
                seen = f"met first at {found['stage']} [{found['claim']}]" if found.get("claim") else "not caught"
                lines.append(f"{fault.name}: {seen}; declared: {fault.stage} [{fault.claim}]")
        for fault in self.equivalent:
            found = self.found[fault.name]
            if bool(found.get("claim")) != bool(fault.stage) or (fault.stage and not self.is_named(fault)):
                lines.append(
                    f"{fault.name}: equivalent, declared to be seen at {fault.stage or 'no stage'}; found: {found}"
                )
        others = [f.name for f in (*self.real, *self.equivalent) if self.found[f.name].get("edits") != faults.digest(f)]
        lines += [f"{name}: judged when it changed something else" for name in others]
        if self.random["false_alarms"]:
            lines.append(f"false alarms: {'; '.join(self.random['false_alarms'])}")
        return lines

    # -- pictures

    def rows(self, chosen: Iterable[faults.Fault]) -> list[list[str]]:
        return [
            [f.name, self.found[f.name].get("stage", "-"), self.gate(f), *(self.cell(f, rule.name) for rule in RULES)]
            for f in chosen
        ]

    def sums(self) -> list[list[str]]:
        count = len(self.real)
        others = ["/".join(str(self.caught_by(rule.name, setting)) for setting in SETTINGS) for rule in RULES]
        runs = len(self.rules["clean"])
        return [
            [f"caught, of {count}", "", str(self.caught()), *others],
            [f"asked, of {count}", "", str(count), *(str(self.asked(rule.name)) for rule in RULES)],
            [f"named, of {count}", "", str(self.named()), *["-"] * len(RULES)],
            [
                f"false alarms, {runs} sound runs",
                "",
                str(len(self.random["false_alarms"])),
                *(str(self.alarms(r.name)) for r in RULES),
            ],
        ]

    def text(self) -> str:
        head = ["fault", "met first at", "this gate", *(f"({i})" for i in range(1, len(RULES) + 1))]
        rows = [*self.rows(self.real), *self.rows(self.equivalent), *self.sums()]
        lines = table([head, *rows], ruled=True)
        at = 2 + len(self.real)
        lines[at:at] = ["", "equivalent: no output can change"] if self.equivalent else []
        lines.insert(len(lines) - 4, "")
        return "\n".join([*lines, "", *self.legend(), "", *self.verdict()])

    def legend(self) -> list[str]:
        lines = [f"({i}) {rule.name}; usual prompt: {rule.usual} tokens" for i, rule in enumerate(RULES, 1)]
        prompts = f"at the usual prompt (index_topk {PUBLISHED_TOPK}), {HALF}, {FOUR}; free-running, float32"
        return [
            *lines,
            f"{CAUGHT!r} caught, {MISSED!r} missed: {prompts}",
            f"{NOT_ASKED!r} not asked: a prefill and {TEXT} tokens use nothing of what the fault changes",
        ]

    def verdict(self) -> list[str]:
        rule, setting, count = self.strongest()
        line = (
            f"this gate catches {self.caught()} of {len(self.real)} faults and names {self.named()} where they were declared; "
            f"{len(self.random['false_alarms'])} false alarms over {self.random['cases']} random checkpoints"
        )
        return [*self.problems(), line, f"the strongest other rule catches {count}: {rule}, at {setting}"]

    def markdown(self) -> str:
        """The sums over all faults, and a row for each that was seen in the field, or that this gate once passed."""
        head = ["rule", "asked", "usual prompt", HALF, FOUR, "named", "false alarms"]
        mine, all_of_them = str(self.caught()), str(len(self.real))
        rows = [
            ["**this gate**", all_of_them, mine, mine, mine, str(self.named()), str(len(self.random["false_alarms"]))]
        ]
        for rule in RULES:
            counts = [str(self.caught_by(rule.name, setting)) for setting in SETTINGS]
            rows.append([rule.name, str(self.asked(rule.name)), *counts, "-", str(self.alarms(rule.name))])
        field = [f for f in self.real if f.origin != faults.OWN or f.name in faults.ONCE_PASSED]
        signs = ["fault", "shows", "met first at", *(f"({i})" for i in range(1, len(RULES) + 1))]
        parts = [
            [
                f"`{f.name}`" + (" (once passed)" if f.name in faults.ONCE_PASSED else ""),
                f.shows,
                f"`{self.found[f.name].get('stage', 'missed')}`",
                *(f"`{self.cell(f, r.name)}`" for r in RULES),
            ]
            for f in field
        ]
        return "\n".join(
            [*_markdown(head, rows), "", *_markdown(signs, parts), "", *(f"- {line}" for line in self.legend())]
        )


def _markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
