"""Chat templates: where they stand, and whether they compile. Parsed, never run."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from glm_dsa.errors import printable

LARGEST = 1 << 20  # bytes; GLM-5.2's has 10 kB
BRANCHES = (jinja2.nodes.If, jinja2.nodes.CondExpr)
SCOPES = (
    jinja2.nodes.For, jinja2.nodes.Macro, jinja2.nodes.CallBlock, jinja2.nodes.FilterBlock, jinja2.nodes.With,
    jinja2.nodes.Scope, jinja2.nodes.AssignBlock,
)  # fmt: skip


class _Generation(jinja2.ext.Extension):
    """HF's tags round what the assistant says: {% generation %} .. {% endgeneration %}."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's own way

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def named(said: Any, file: str) -> Iterator[tuple[str, str]]:
    """A text, or a list of named ones."""
    if isinstance(said, str):
        yield file, said
    for entry in said if isinstance(said, list) else ():
        if isinstance(entry, Mapping) and isinstance(entry.get("template"), str):
            yield f"{file}, {printable(str(entry.get('name')))[:60]}", entry["template"]


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """As HF's."""
    return jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )


def compile_error(template: str) -> str:
    """Why a chat template does not compile under HF's environment; empty where it does. Parsed, never run: jinja2's compiler
    computes constants, and 'a' * 10 ** 10 is one."""
    if len(template) > LARGEST:
        return f"{len(template):,} characters, expected at most {LARGEST:,}"
    environment = _environment()
    try:
        for node in _unknown(environment.parse(template), environment, False):
            return f"line {node.lineno}: no {type(node).__name__.lower()} is named {printable(node.name)[:60]}"
    except jinja2.TemplateSyntaxError as error:
        return printable(f"line {error.lineno}: {error.message}")[:300]
    except RecursionError:
        return "nested too deep"
    return ""


def _unknown(node: Any, environment: Any, within_if: bool) -> Iterator[Any]:
    """Filters and tests that nobody has. As in jinja2's compiler, a branch may name some, which fail when it is taken: but
    not in a loop, or another scope, within it."""
    known = {jinja2.nodes.Filter: environment.filters, jinja2.nodes.Test: environment.tests}.get(type(node))
    if known is not None and not within_if and node.name not in known:
        yield node
    within_if = isinstance(node, BRANCHES) or (within_if and not isinstance(node, SCOPES))
    for child in node.iter_child_nodes():
        yield from _unknown(child, environment, within_if)


def is_same(one: str, other: str) -> bool:
    """Whether two templates are alike but for comments, blank lines that are trimmed, and how they are written."""
    if one.split() == other.split() and one.strip() == other.strip():
        return True
    if max(len(one), len(other)) > LARGEST:
        return False
    try:
        trees = [_environment().parse("\n".join(text.splitlines()).strip()) for text in (one, other)]
        return bool(trees[0] == trees[1])
    except (jinja2.TemplateSyntaxError, RecursionError):
        return False


def difference(one: str, due: str) -> str:
    """Where two templates part, in a few words: lines that are other ones, and the first of them."""
    mine, theirs = ([line.rstrip() for line in text.strip().splitlines()] for text in (one, due))
    blocks = difflib.SequenceMatcher(None, theirs, mine, autojunk=False).get_opcodes()
    parts = [block for block in blocks if block[0] != "equal"]
    gone, new = sum(b[2] - b[1] for b in parts), sum(b[4] - b[3] for b in parts)
    if not parts:
        return "blank space at its ends"
    _, a, b, c, d = parts[0]
    expected, got = (lines[start] if end > start else "" for lines, start, end in ((theirs, a, b), (mine, c, d)))
    at = next((i for i, (x, y) in enumerate(zip(expected, got, strict=False)) if x != y), min(len(expected), len(got)))
    expected, got = (printable(text[max(at - 20, 0) :])[:60] for text in (expected, got))
    return f"{gone} lines of {len(theirs)} are gone, {new} are new; the first, line {c + 1}: expected {expected!r}, got {got!r}"
