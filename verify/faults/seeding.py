"""Faults by their names: seeded, listed, described."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches

from .catalogue import CATALOGUE
from .edits import edited
from .fault import Fault


@contextmanager
def seeded(*names: str) -> Iterator[None]:
    """The definition with these faults, each once, until the block ends; build models inside it. Raises LookupError on
    unknown names."""
    with edited(edit for name in dict.fromkeys(names) for edit in named(name).edits):
        yield


def named(name: str) -> Fault:
    if name not in CATALOGUE:
        near = ", ".join(get_close_matches(name, CATALOGUE, cutoff=0.75))
        raise LookupError(f"no fault is named {name!r}{near and f' ({near}?)'}; `python -m verify faults` lists them")
    return CATALOGUE[name]


def chosen(names: str | None) -> list[str]:
    """Of a list separated by commas, or all. Raises LookupError on unknown names."""
    return list(CATALOGUE) if names is None else [named(name.strip()).name for name in names.split(",")]


def listed() -> str:
    """A line for each fault."""
    width = max(map(len, CATALOGUE))
    return "\n".join(f"{f.name.ljust(width)}  {f.component}: {f.what}" for f in CATALOGUE.values())


def described(name: str) -> str:
    """All that the catalogue says of one."""
    f = named(name)
    seen = f"{f.stage}, in the claim {f.claim!r}" if f.stage else "nowhere"
    lines = [f"{f.name}  ({f.component})", f.what, f"shows: {f.shows}", f"met first at: {seen}", f"origin: {f.origin}"]
    lines += [f"equivalent: {f.equivalent}"] if f.equivalent else []
    lines += [f"declared otherwise at first: {f.corrected}"] if f.corrected else []
    return "\n".join([*lines, *(f"  {edit}" for edit in f.edits)])
