"""The gate is a plugin of pytest."""

from verify.gate.plugin import *  # noqa: F403
