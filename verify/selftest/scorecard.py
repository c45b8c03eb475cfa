"""What was caught, by this gate and by the rules of others: one row for each fault, as text, Markdown or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from glm_dsa.text import table

from .. import faults
from . import changed, keys
from . import record as records
from .baselines import CAUGHT, FOUR, HALF, MISSED, NOT_ASKED, PUBLISHED_TOPK, RULES, SETTINGS, TEXT
from .judging import is_named

AGAIN = "run `python -m verify judge --changed --keep`"


def undeclared(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Of faults as they were met: those that were not met where they are declared to be."""
    lines = []
    for fault in (faults.CATALOGUE[name] for name in found if name in faults.CATALOGUE):
        row = found[fault.name]
        is_met = bool(row.get("claim"))
        if (is_met and is_named(fault, row["claim"], row["stage"]) and fault.stage) or (not is_met and not fault.stage):
            continue
        seen = f"met first at {row['stage']} [{row['claim']}]" if is_met else "not caught"
        due = f"{fault.stage} [{fault.claim}]" if fault.stage else "seen at no stage"
        lines.append(f"{fault.name}: {seen}; declared: {'equivalent, ' if fault.equivalent else ''}{due}")
    return lines


class Judged:
    """The record of one `python -m verify judge`: {"full": .., "faults": .., "rules": .., "random": .., "versions": ..}."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = record
        self.found, self.rules, self.random = record["faults"], record["rules"], record["random"]
        self.real = [f for f in faults.CATALOGUE.values() if not f.equivalent and f.name in self.found]
        self.equivalent = [f for f in faults.CATALOGUE.values() if f.equivalent and f.name in self.found]

    @classmethod
    def read(cls, path: Path = records.KEPT) -> Judged:
        """Raises ValueError, in one line, where there is no such record."""
        judged = cls(records.read(path))
        try:
            judged.text()
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise records.no_record(path, error) from None
        return judged

    def keep(self) -> None:
        """Makes this the record that the repository keeps."""
        records.KEPT.write_text(records.as_lines(self.record), encoding="utf-8")

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
        lines = undeclared(self.found)
        stale = [name for name in changed.stale_rows(self.found) if name in self.found]
        lines += [f"{name}: judged when its edits, modules or claim were others; {AGAIN}" for name in stale]
        if self.random["false_alarms"]:
            lines.append(f"false alarms: {'; '.join(self.random['false_alarms'])}")
        return lines

    def caption(self) -> str:
        """How far the record is of the code as it is."""
        since = sum("since" in row for row in self.found.values())
        parts = [f"full run at {self.record['full']}"]
        parts += [f"{since} rows judged since"] if since else []
        parts += ["core changed since"] if self.record["full"] != keys.core() else []
        return "; ".join(parts)

    def unfit(self) -> list[str]:
        """What keeps a release from being made: whatever is a problem, and a core that no full run has judged."""
        full, core = self.record["full"], keys.core()
        is_other = f"expected a full run at core {core}, got {full}; make full renews it"
        return [*self.problems(), *([is_other] if full != core else [])]

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
        return [
            *self.problems(),
            line,
            f"the strongest other rule catches {count}: {rule}, at {setting}",
            self.caption(),
        ]

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
        legend = [f"- {line}" for line in (self.caption(), *self.legend())]
        return "\n".join([*_markdown(head, rows), "", *_markdown(signs, parts), "", *legend])


def _markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
