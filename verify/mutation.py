"""The mutation test of the definition: each operator, constant and comparison changed in turn, each condition turned round,
each call that stands alone and each assignment to a part left out; the gate must notice.

A pytest plugin (`make mutate`). A mutant is one node of one function's syntax tree; the tests that run that function are
repeated until one fails: first those that noticed earlier mutants of it, then the quickest, two of each kind. Survivors are
what nobody would notice: a check is missing, or the change is equivalent.
"""

from __future__ import annotations

import argparse
import ast
import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

from . import seeding
from .judging import Court, functions, modules

OPERATORS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
ROOT = Path(__file__).parents[1]
LEFT_OUT = ("errors", "version", "sharding")  # words; and what takes several processes, tried in tests/test_mlx_lm.py
READERS = ("checkpoint", "config", "keys", "trace", "weights")
BEGUN = "begun"
PATIENCE = 60  # seconds for one test; a mutant that hangs is noticed too


@dataclass(frozen=True)
class Mutant:
    """`where` is "module.Class.method", or "module.CONSTANT"; number: the how manieth change of it."""

    where: str
    number: int
    line: int
    change: str

    @property
    def name(self) -> str:
        return f"{self.where}#{self.number}"


def mutants() -> Iterator[Mutant]:
    """The model's own files first; what reads and checks checkpoints after them."""
    every = {where: f for where, f in functions().items() if where.split(".")[0] not in LEFT_OUT}
    for is_reader in (False, True):
        for where, function in every.items():
            if (where.split(".")[0] in READERS) != is_reader:
                continue
            first = function.__code__.co_firstlineno
            for number, (line, change, _) in enumerate(changes(seeding.source_of(function))):
                yield Mutant(where, number, first + line - 1, change)
    for name, module in modules().items():
        for constant, value in vars(module).items():
            if constant.isupper() and isinstance(value, int) and f"\n{constant} = " in seeding.text_of(module):
                yield Mutant(f"{name}.{constant}", 0, 0, f"{value} -> {value + 1}")


def changes(source: str) -> Iterator[tuple[int, str, ast.Module]]:
    """(line, change in words, the changed tree), one for each node that can be changed."""
    count = sum(1 for _ in _nodes(ast.parse(source)))
    for number in range(count):
        tree = ast.parse(source)
        holder, field, index, node = next(item for i, item in enumerate(_nodes(tree)) if i == number)
        new = _changed(node)
        if index is None:
            setattr(holder, field, new)
        else:
            getattr(holder, field)[index] = new
        before, after = (ast.unparse(ast.fix_missing_locations(n)) for n in (node, new))
        yield node.lineno, f"{before} -> {after or 'nothing'}", tree


def _nodes(tree: ast.Module) -> Iterator[tuple[ast.AST, str, int | None, Any]]:
    """(holder, field, index, node) of what can be changed, outside decorators, annotations, defaults and docstrings."""
    function: Any = tree.body[0]
    queue: list[ast.AST] = list(function.body)
    roots = [(function, "body", i, node) for i, node in enumerate(function.body)]
    for holder, field, index, node in [*roots, *(found for root in queue for found in _inside(root))]:
        if _changed(node) is not None:
            yield holder, field, index, node


def _inside(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, Any]]:
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list") or isinstance(node, (ast.JoinedStr, ast.Raise)):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST):
                yield node, field, index, child
                yield from _inside(child)


def _changed(node: Any) -> Any:
    """Another node for it, or None where there is nothing to change."""
    match node:
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            return ast.copy_location(ast.BinOp(left, OPERATORS[type(op)](), right), node)
        case ast.BoolOp(op, values):
            return ast.copy_location(ast.BoolOp(OPERATORS[type(op)](), values), node)
        case ast.Compare(left, [op], comparators):
            return ast.copy_location(ast.Compare(left, [OPERATORS[type(op)]()], comparators), node)
        case ast.UnaryOp(ast.USub() | ast.Not(), operand):
            return operand
        case ast.Constant(bool() as value):
            return ast.copy_location(ast.Constant(not value), node)
        case ast.Constant(int() | float() as value):
            return ast.copy_location(ast.Constant(value + 1 if isinstance(value, int) else 2 * value), node)
        case ast.If(test, body, orelse):
            return ast.copy_location(ast.If(ast.UnaryOp(ast.Not(), test), body, orelse), node)
        case ast.IfExp(test, body, orelse):
            return ast.copy_location(ast.IfExp(ast.UnaryOp(ast.Not(), test), body, orelse), node)
        case ast.Expr(ast.Call()) | ast.AugAssign() | ast.Assign([ast.Attribute() | ast.Subscript()]):
            return ast.copy_location(ast.Pass(), node)
    return None


# Changes that no output can show, by what they are a change of: {(function, change): why}; judged by hand.
EQUIVALENT: dict[tuple[str, str], str] = {}


def reason(record: Mapping[str, Any]) -> str:
    """Why nobody can notice a mutant; empty where somebody should."""
    return EQUIVALENT.get((record["mutant"].split("#")[0], record["change"]), "")


@contextmanager
def applied(mutant: Mutant) -> Iterator[None]:
    function = functions().get(mutant.where)
    with _constant(mutant) if function is None else _code(mutant, function):
        yield


def _code(mutant: Mutant, function: FunctionType) -> AbstractContextManager[None]:
    *_, tree = next(c for i, c in enumerate(changes(seeding.source_of(function))) if i == mutant.number)
    return seeding.swapped({function: seeding.compiled(tree, function)})


@contextmanager
def _constant(mutant: Mutant) -> Iterator[None]:
    home, name = mutant.where.split(".")
    own = getattr(modules()[home], name)
    holders = [module for module in modules().values() if getattr(module, name, None) is own]
    for module in holders:
        setattr(module, name, own + 1)
    try:
        yield
    finally:
        for module in holders:
            setattr(module, name, own)


class Mutation(Court):
    """Tries the mutants whose number is `share[0]` modulo `share[1]`; goes on where an earlier run of the same file ended."""

    def __init__(self, config: pytest.Config, out: Path, only: str, share: tuple[int, int], every: bool) -> None:
        super().__init__(config)
        self.out, self.only, self.share, self.every = out, only, share, every
        self.noticed: Counter[tuple[str, pytest.Item]] = Counter()  # by function ("" for any) and test

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.reached = self.as_it_is(session.items)
        self.say(f"{len(self.reached)} tests, {sum(self.seconds.values()):.0f} s")
        done = self.done()
        chosen = [
            m for i, m in enumerate(mutants()) if i % self.share[1] == self.share[0] and m.where.startswith(self.only)
        ]
        with self.out.open("a", encoding="utf-8") as stream:
            for mutant in chosen:
                if mutant.name in done:
                    continue
                record = {"mutant": mutant.name, "line": mutant.line, "change": mutant.change}
                # A mutant that takes the process with it is found begun and not ended.
                for outcome in (BEGUN, None):
                    outcome = outcome or self.fate(mutant)
                    stream.write(json.dumps({**record, "fate": outcome}) + "\n")
                    stream.flush()
        self.fresh_report()
        return True

    def done(self) -> set[str]:
        """What has an end. What was begun twice and never ended is noticed: the process ends with it."""
        records = (
            [json.loads(line) for line in self.out.read_text(encoding="utf-8").splitlines()]
            if self.out.exists()
            else []
        )
        ended = {record["mutant"] for record in records if record["fate"] != BEGUN}
        begun = Counter(record["mutant"] for record in records if record["fate"] == BEGUN)
        fatal = {r["mutant"]: r for r in records if r["mutant"] not in ended and begun[r["mutant"]] > 1}
        with self.out.open("a", encoding="utf-8") as stream:
            stream.writelines(
                json.dumps({**r, "fate": "noticed: the process ends with it"}) + "\n" for r in fatal.values()
            )
        return ended | set(fatal)

    def fate(self, mutant: Mutant) -> str:
        """The test that noticed, or "survived" and how many did not."""
        self.fresh_report()
        self.forget_models()
        affected = self.affected(mutant.where)
        affected.sort(key=lambda item: (-self.noticed[mutant.where, item], -self.noticed["", item], self.seconds[item]))
        try:
            with applied(mutant), alarm():
                for item in affected:
                    signal.alarm(PATIENCE + int(20 * self.seconds[item]))  # slow is not hung, on a busy machine
                    if any(report.failed for report in self.run(item)):
                        self.noticed.update([(mutant.where, item), ("", item)])
                        return f"noticed by {item.nodeid}"
        except LookupError as error:
            return f"cannot be made: {error}"
        except TimeoutError:
            return "noticed: it hangs"
        return f"survived {len(affected)} tests"

    def affected(self, where: str) -> list[pytest.Item]:
        """Of the tests that run a function, the two quickest of each kind: parametrized ones seldom differ here."""
        is_constant = where not in functions()
        kinds: dict[Any, list[pytest.Item]] = {}
        for item in sorted(self.reached, key=self.seconds.__getitem__):
            if is_constant or where in self.reached[item]:
                kinds.setdefault(item.function, []).append(item)  # type: ignore[attr-defined]
        return [item for kind in kinds.values() for item in (kind if self.every else kind[:2])]


@contextmanager
def alarm() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise TimeoutError(f"over {PATIENCE} s")

    before = signal.signal(signal.SIGALRM, ring)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("glm-dsa mutation")
    group.addoption(
        "--mutation-out", metavar="FILE", help="where to note each mutant's fate; an earlier run goes on there"
    )
    group.addoption("--mutate", metavar="WHERE", default="", help="what begins so, e.g. indexer.Indexer.score")
    group.addoption("--mutation-every", action="store_true", help="ask every test that runs what is changed")
    group.addoption("--mutation-share", metavar="I/N", default="0/1", help="every N-th mutant, from the I-th on")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    part, of = map(int, config.getoption("--mutation-share").split("/"))
    out, only = Path(config.getoption("--mutation-out")), config.getoption("--mutate")
    config.pluginmanager.register(Mutation(config, out, only, (part, of), config.getoption("--mutation-every")))


# What takes part: the gate on one case of each family, and the tests of the definition's own files.
OTHERS = "trained or behaviour or glm-5.2-half-split or glm-5.1- or grouped-half-split or (glm-4.7 and not mtp)"
TESTS = (
    "verify/",
    *(f"tests/test_{part}.py" for part in ("cache", "checkpoint", "config", "model", "trace", "compare")),
)
PROCESSES = 2


def run(out: Path, only: str, share: str, every: bool) -> None:
    """One share of the mutants. A process that a mutant took with it is followed by another, which goes on after it."""
    command = [sys.executable, "-m", "pytest", *TESTS, "-q", "-p", "no:cacheprovider", "-p", "verify.mutation"]
    command += ["--mutation-out", str(out), "--mutate", only, "--mutation-share", share]
    command += ["-k", f"not ({OTHERS})"]
    command += ["--mutation-every"] if every else []
    before = -1
    while before < (before := len(noted([out]))):
        if subprocess.run(command, cwd=ROOT).returncode == 0:  # noqa: S603
            return
    print(f"share {share}: ended before its time; its own lines say why", file=sys.stderr)


def noted(files: list[Path]) -> dict[str, dict[str, Any]]:
    """The last that was noted of each mutant."""
    texts = [file.read_text(encoding="utf-8") for file in files if file.exists()]
    return {record["mutant"]: record for text in texts for record in map(json.loads, text.splitlines())}


def score(fates: Mapping[str, dict[str, Any]]) -> str:
    """How many mutants were noticed, and which were not."""
    tried = [f for f in fates.values() if not f["fate"].startswith(("cannot", BEGUN))]
    survivors = [f for f in tried if f["fate"].startswith("survived")]
    alike = [f for f in survivors if reason(f)]
    counted = len(tried) - len(alike)
    noticed = len(tried) - len(survivors)
    lines = [f"{len(tried)} mutants, {len(alike)} of them equivalent; of the others {noticed} of {counted} noticed "
             f"({noticed / max(counted, 1):.1%})"]  # fmt: skip
    lines += [f"  {f['mutant']} (line {f['line']}): {f['change']}" for f in survivors if not reason(f)]
    return "\n".join([*lines, "equivalent", *(f"  {f['mutant']}: {f['change']}: {reason(f)}" for f in alike)])


def main() -> None:
    """`python -m verify.mutation`: all mutants, in two processes; goes on where an earlier run in that folder ended."""
    parser = argparse.ArgumentParser(prog="python -m verify.mutation", description=main.__doc__)
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=Path("mutation"), help="where each mutant's fate is noted"
    )
    parser.add_argument("--only", metavar="WHERE", default="", help="what begins so, e.g. indexer.Indexer.score")
    parser.add_argument("--every", action="store_true", help="ask every test, not the two quickest of each kind")
    parser.add_argument("--score", action="store_true", help="run nothing: the score of what was noted")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    files = [asked.out / f"{i}.jsonl" for i in range(PROCESSES)]
    if not asked.score:
        with ThreadPoolExecutor(PROCESSES) as pool:
            list(pool.map(lambda i: run(files[i], asked.only, f"{i}/{PROCESSES}", asked.every), range(PROCESSES)))
    print(score(noted(files)))


if __name__ == "__main__":
    main()
