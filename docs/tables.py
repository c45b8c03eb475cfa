"""Blocks that are read off the code and the kept records, in seconds."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

from glm_dsa import KvQuantization, LayerCache, Widths
from glm_dsa.cache import cache_bytes
from glm_dsa.config import MODEL_TYPES
from glm_dsa.planning import plan, recipe
from glm_dsa.text import in_gib
from tests.carried import diagnosing, kept
from verify import faults
from verify.bench import tables as bench_tables
from verify.bench.suite import Bench
from verify.commands import bench as bench_command
from verify.core import exits
from verify.gate import plugin
from verify.selftest import mutants, scorecard

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "verify" / "configs"
FAMILY, FAULT = "glm4_moe_lite", "kv-latent-eps"  # what extending.md walks through


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" if row else "|---" * len(head) + "|" for row in (head, [], *rows))


def fenced(text: str, language: str = "") -> str:
    return f"```{language}\n{text}\n```"


def code(path: str) -> str:
    return fenced((ROOT / path).read_text(encoding="utf-8").rstrip("\n"), "python")


def examples() -> list[str]:
    return sorted(file.name for file in (ROOT / "examples").glob("[!_]*.py"))


# -- of the gate


def claims() -> str:
    places = {f"test_{part}": place for place, part in enumerate(plugin.ORDER)}
    files = sorted(
        (file.stem for file in plugin.CLAIMS.glob("test_*.py")), key=lambda f: (places.get(f, len(places)), f)
    )
    modules = [importlib.import_module(f"verify.claims.{file}") for file in files]
    return table(
        ["claim", "what is held against what"],
        [[module.CLAIM, (module.__doc__ or "").splitlines()[0]] for module in modules],
    )


def judged() -> str:
    return scorecard.Judged.read().markdown()


def diagnosed() -> str:
    return diagnosing.table(kept.read()[1])


def results() -> str:
    """The sums of the kept records, in one table."""
    record = scorecard.Judged.read()
    rule, setting, most = record.strongest()
    all_of_them, drawn = len(record.real), record.random["cases"]
    rows = [
        ["faults that the gate catches", f"{record.caught()} of {all_of_them}", "`make judge`"],
        ["... at the claim and stage that were declared before", f"{record.named()} of {all_of_them}", ""],
        [f"... that the best of {len(scorecard.RULES)} published pass rules catches ({rule}, at {setting})",
         f"{most} of {record.asked(rule)} asked", ""],
        ["false alarms on sound checkpoints of random shape", f"{len(record.random['false_alarms'])} of {drawn}", "`make full`"],
    ]  # fmt: skip
    records = kept.read()[1]
    for kind in diagnosing.kinds(records):
        what, where, _, _ = kind
        if what == "alone":
            mine = diagnosing.of(records, kind)
            right = sum(r["right"] for r in mine)
            rows.append([f"faults made in {diagnosing.WHERE[where]}, alone, that `drift` names",
                         f"{right} of {len(mine)}", "`make diagnose`"])  # fmt: skip
    every = list(mutants.mutants())
    excused = [m for m in every if mutants.reason({"mutant": m.name, "change": m.change})]
    rows.append(["mutants of the definition that may survive, each with the proof that no output can show it",
                 f"{len(excused)} of {len(every):,}", "`make mutate`"])  # fmt: skip
    return table(["on trial", "result", "repeat it"], rows)


def exit_statuses() -> str:
    return table(["exit status", "what it means"], [[str(status), said] for status, said in exits.MEANINGS.items()])


def rooms() -> str:
    rows = []
    for file in sorted((ROOT / "verify").glob("*/__init__.py")):
        docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        rows.append([f"`{file.parent.name}`", " ".join(docstring.partition("\n\n")[0].split())])
    return table(["room", "holds"], rows)


# -- of the definition


def bench() -> str:
    return bench_tables.markdown(Bench.of_dict(json.loads(bench_command.KEPT.read_text(encoding="utf-8"))))


def cache() -> str:
    """Measured: one layer with an indexer and one without, filled by mlx-lm's chunks; 21 and 57 of them."""
    packings, layers = (None, KvQuantization(8), KvQuantization(4)), ((21, 128), (57, 0))

    def measured(tokens: int, index: int, quantization: KvQuantization | None) -> int:
        filled = LayerCache(Widths(512, 64, index), quantization)
        for _ in range(tokens // 1024):
            if index:
                filled.append_index_keys(mx.zeros((1, 1024, 128), mx.bfloat16))
            filled.append(mx.zeros((1, 1024, 576), mx.bfloat16))
        return filled.nbytes

    rows = []
    for tokens in (1024, 8192, 32768):
        sizes = [sum(n * measured(tokens, index, q) for n, index in layers) for q in packings]
        rows.append([f"{tokens:,}", *(f"{size / 1e6:,.1f} MB" for size in sizes)])
    token = [sum(n * sum(cache_bytes(Widths(512, 64, index), 2, q)) for n, index in layers) for q in packings]
    rows.append(["1,000,000 (predicted)", *(f"{size / 1e3:,.1f} GB" for size in token)])
    return table(["tokens", "16 bit", "int8, groups of 64", "int4, groups of 64"], rows)


def plan_of_glm_5_2() -> str:
    found = plan.plan(CONFIGS / "glm-5.2.json", recipe.load("glm-5.2-3.5bit"), kv_bits=8)
    found.source = "glm-5.2.json"
    return fenced(plan.render(found).split("\n\nconventions")[0])


def recipes() -> str:
    rows = []
    for name in recipe.kept():
        rules = recipe.load(name)
        config = max(
            (file for file in CONFIGS.glob("*.json") if name.startswith(file.stem)), key=lambda file: len(file.stem)
        )
        total = plan.plan(config, rules).main
        rows.append([f"`{name}`", rules.purpose, f"{total.bits:.3f}", in_gib(total.nbytes)])
    return table(["recipe", "for", "bits a weight", "GiB, without MTP"], rows)


# -- of the page on extending


def family() -> str:
    """Where the code knows one family from another: files, and their functions or constants."""
    rows = []
    for package in ("glm_dsa", "reference", "verify"):
        for file in sorted((ROOT / package).rglob("*.py")):
            names = list(naming(ast.parse(file.read_text(encoding="utf-8")).body))
            if names:
                rows.append([f"`{file.relative_to(ROOT)}`", ", ".join(f"`{name}`" for name in names)])
    return table(["file", "what in it names the family"], rows)


def naming(statements: list[ast.stmt]) -> Iterator[str]:
    """Functions, methods and constants with the family's name in a text that is no docstring, or its sibling's as a text."""
    for part in statements:
        if isinstance(part, ast.ClassDef):
            yield from (f"{part.name}.{name}" for name in naming(part.body))
            continue
        docstrings = {id(e.value) for e in ast.walk(part) if isinstance(e, ast.Expr)}
        texts = [n for n in ast.walk(part) if isinstance(n, ast.Constant) and id(n) not in docstrings]
        if any(FAMILY in str(text.value) or text.value in MODEL_TYPES for text in texts):
            yield part.name if isinstance(part, ast.FunctionDef) else ast.unparse(part).split()[0].rstrip(":")


def fault() -> str:
    """The fault that is walked through, as the catalogue has it."""
    chosen = faults.CATALOGUE[FAULT]
    (home,) = (part for part in faults.catalogue.PARTS if FAULT in {f.name for f in part.faults()})
    lines = inspect.getsource(home).splitlines()
    first = next(i for i, line in enumerate(lines) if f'"{chosen.name}"' in line)
    last = next(i for i in range(first + 1, len(lines)) if lines[i].lstrip().startswith("yield "))
    return fenced(textwrap.dedent("\n".join(lines[first:last])), "python")
