"""Code, and adapters, that come with a release: named, never read or run. Whoever runs them runs what was not judged here.

Python files are looked for in a folder alone, beside the weights; of a repository on the hub, the keys tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glm_dsa.config_reader import read_json
from glm_dsa.errors import ConfigError, printable

from ..core.findings import NOTE, WARNING, Findings
from ..engines.headers import CONFIG, Release, small_file

SHOWN = 4  # files in a line
RUN_BY = {
    "model_file": "mlx-lm runs it in the place of its own definition where trust_remote_code is given, and refuses the release "
    "where it is not",
    "auto_map": "HF runs it where trust_remote_code is given",
    "custom_pipelines": "HF's pipelines run it where trust_remote_code is given",
    "trust_remote_code": "it asks for code of its own to be run",
}
ADAPTER = "adapter_config.json"
WHAT = "the code that comes with it"  # in a report, under not verified


def judge(release: Release, findings: Findings) -> None:
    for what in keys(release):
        findings.say(WARNING, f"{what}; what is judged here is glm_dsa's definition, not that code")
    if found := files(release):
        findings.say(NOTE, f"{found} beside the weights: not looked at; nothing here runs them")


def not_verified(release: Release) -> str:
    """Why a verdict does not speak of it; empty where there is none."""
    return printable("; ".join([*keys(release), *([found] if (found := files(release)) else [])]))


def keys(release: Release) -> list[str]:
    adapter = [f"{ADAPTER}: HF's from_pretrained puts that adapter on, where peft is installed"]
    return (adapter if small_file(release, ADAPTER) is not None else []) + [
        f"{file}: {key} = {_short(said[key])}{_is_there(release, said[key]) if key == 'model_file' else ''}: {who}"
        for file, said in _configs(release)
        for key, who in RUN_BY.items()
        if said.get(key)
    ]


def files(release: Release) -> str:
    """Python files, in a few words."""
    found = sorted(f.name for f in release.folder.glob("*.py")) if release.folder is not None else []
    return ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if found[SHOWN:] else "")


def _configs(release: Release) -> Iterator[tuple[str, dict[str, Any]]]:
    yield CONFIG, dict(release.config)
    if (file := small_file(release, "tokenizer_config.json")) is not None:
        try:
            yield "tokenizer_config.json", read_json(file)
        except ConfigError:  # which verify.audit.chat tells of
            return


def _is_there(release: Release, name: Any) -> str:
    if release.folder is None or not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        return ""
    return " (the file is there)" if small_file(release, name) is not None else " (no such file)"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
