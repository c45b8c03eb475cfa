"""The checkpoints that the gate runs on, each written by HF itself, and what the oracles say of them."""

from .case import (
    HALF_SPLIT_CLAIMS,
    TOPK,
    Case,
    Reference,
    Spec,
    check_vocabulary,
    default_specs,
    group_size,
    spec_of,
    trained_specs,
)

__all__ = [
    "HALF_SPLIT_CLAIMS",
    "TOPK",
    "Case",
    "Reference",
    "Spec",
    "check_vocabulary",
    "default_specs",
    "group_size",
    "spec_of",
    "trained_specs",
]
