"""Errors that a user can mend: one printable line, naming what is wrong and where, what was expected and what to do."""

from __future__ import annotations

LONGEST = 2000


class GlmDsaError(ValueError):
    """Base of the errors below. Texts come from files of unknown origin: what is not printable is escaped."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class ConfigError(GlmDsaError):
    """A config that cannot be a GLM-5.x (or 4.7-Flash) model: names the key, its value and what is allowed."""


class CheckpointError(GlmDsaError):
    """A checkpoint that cannot be read: names file and tensor."""


class FormatError(CheckpointError):
    """A checkpoint in a format of another tool: names the format, the tool, by what it is known, and what can be done."""


class WeightsError(GlmDsaError):
    """Tensors that do not make this model: names them."""


class RecipeError(GlmDsaError):
    """A recipe that cannot be followed: names the file and the rule."""


class InputError(GlmDsaError):
    """Tokens or embeddings that this model cannot be run on: names what was expected and what came."""


class CacheError(GlmDsaError):
    """A cache that cannot do what it was asked to; it is unchanged."""


def printable(text: str) -> str:
    """One line that a terminal cannot be steered by: control characters and lone surrogates escaped, length bounded."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:LONGEST])
    return line + (" ..." if len(text) > LONGEST else "")
