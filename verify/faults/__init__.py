"""The catalogue of faults: mistakes that were shipped, or that could be, each a small change to our running definition."""

from .catalogue import CATALOGUE, ONCE_PASSED, OWN, PARTS, Fault, chosen, described, digest, listed, named, seeded

__all__ = [
    "CATALOGUE",
    "ONCE_PASSED",
    "OWN",
    "PARTS",
    "Fault",
    "chosen",
    "described",
    "digest",
    "listed",
    "named",
    "seeded",
]
