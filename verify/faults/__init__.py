"""The catalogue of faults: mistakes that were shipped, or that could be, each a small change to our running definition.

    with faults.seeded("indexer-no-relu"): ...        pytest verify/ --fault indexer-no-relu
"""

from .catalogue import CATALOGUE, ONCE_PASSED, PARTS
from .fault import OWN, Fault
from .seeding import chosen, described, listed, named, seeded

__all__ = [
    "CATALOGUE",
    "ONCE_PASSED",
    "OWN",
    "PARTS",
    "Fault",
    "chosen",
    "described",
    "listed",
    "named",
    "seeded",
]
