"""config.json of a release beside its original's, as the files stand: what the one computes and the other does not.

A key that is absent says its default. A convention that the builder's own key turned is contested, not wrong; one that was
lost, or edited, is. Keys that converters add or drop (formats, versions, dtypes, architectures, bookkeeping) decide nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from glm_dsa import ModelArgs
from glm_dsa.config_reader import is_number

from ..core.findings import FAULT, NOTE, WARNING, Findings
from ..engines import pruning
from ..engines.headers import Release

POSITIONS, LONGEST = "max_position_embeddings", 202752  # HF's default
DTYPES = ("dtype", "torch_dtype")
CONTESTED = ("latent_norm_eps",)  # of which implementations use two
OF_MTP = ("num_nextn_predict_layers", "mtp_reuses_selection", "mtp_zero_first_embedding")
ROPE = "indexer_rope"
OWN_KEY = "indexer_rope_traditional"  # the builders': there, half-split is a choice
# what glm_dsa.rope takes where a key of YaRN's is absent
YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "truncate": True,
    "mscale": None,
    "mscale_all_dim": None,
    "attention_factor": None,
}


def judge(release: Release, original: Release, findings: Findings) -> None:
    """Raises ConfigError where one is no model's."""
    args, theirs = release.args(), original.args()
    elsewhere = ("conventions", ROPE, *CONTESTED, *OF_MTP, *(pruning.KEYS if pruning.is_pruned(args, theirs) else ()))
    for key in (f.name for f in fields(ModelArgs) if f.name not in elsewhere):
        _hold(FAULT, key, _value(args, key), _value(theirs, key), findings)
    for key in CONTESTED:
        _hold(WARNING, key, getattr(args, key), getattr(theirs, key), findings, "contested: engines differ")
    _mtp(args, theirs, findings)
    _indexer_rope(args, theirs, findings)
    _positions(release.config, original.config, findings)
    mine, other = (
        next((c[k] for k in DTYPES if c.get(k) is not None), None) for c in (release.config, original.config)
    )
    if mine is not None and other is not None:
        _hold(NOTE, "dtype", mine, other, findings, "the tensors decide")
    mine, other = (c.get("use_cache") is not False for c in (release.config, original.config))
    _hold(WARNING, "use_cache", mine, other, findings, "HF decodes by it, with a cache or without")
    mine, other = (c.get("layer_types") for c in (release.config, original.config))
    if mine is not None and other is not None:
        _hold(WARNING, "layer_types", mine, other, findings, "HF's caches go by it")


def _hold(severity: str, key: str, mine: Any, theirs: Any, findings: Findings, why: str = "") -> None:
    if mine != theirs:
        what = f"config.json: {key} = {_short(mine)}, the original's says {_short(theirs)}"
        findings.say(severity, f"{what} ({why})" if why else what)


def _value(args: ModelArgs, key: str) -> Any:
    value = getattr(args, key)
    return YARN | value if key == "rope_scaling" and value and value["rope_type"] == "yarn" else value


def _mtp(args: ModelArgs, theirs: ModelArgs, findings: Findings) -> None:
    """Where both draft. A layer that was dropped is told elsewhere, and its keys may go with it."""
    if args.num_nextn_predict_layers > theirs.num_nextn_predict_layers:
        _hold(WARNING, OF_MTP[0], args.num_nextn_predict_layers, theirs.num_nextn_predict_layers, findings)
    if args.num_nextn_predict_layers and theirs.num_nextn_predict_layers:
        for key in OF_MTP[1:]:
            _hold(WARNING, key, getattr(args, key), getattr(theirs, key), findings, "drafts alone depend on it")


def _indexer_rope(args: ModelArgs, theirs: ModelArgs, findings: Findings) -> None:
    if args.indexer_rope == theirs.indexer_rope:
        return
    mine, other = (next(c.source for c in a.conventions if c.name == ROPE) for a in (args, theirs))
    is_chosen = OWN_KEY in mine
    why = (
        f"{mine}; CONTESTED: the builder's own key says otherwise than the original's {other}. "
        "verify/claims/test_release_layout.py asks the weights"
        if is_chosen
        else f"{mine}, there {other}: nothing was said of a build of its own; write the original's key"
    )
    _hold(WARNING if is_chosen else FAULT, ROPE, args.indexer_rope, theirs.indexer_rope, findings, why)


def _positions(mine: Mapping[str, Any], theirs: Mapping[str, Any], findings: Findings) -> None:
    """The definition runs at any position; engines end a conversation there."""
    most, due = (LONGEST if (said := c.get(POSITIONS)) is None else said for c in (mine, theirs))
    if not is_number(most):
        findings.say(WARNING, f"config.json: {POSITIONS} = {_short(most)}: expected a whole number")
    elif is_number(due) and most != due:
        cut = most < due
        _hold(FAULT if cut else WARNING, POSITIONS, most, due, findings, "engines cut contexts there" if cut else "")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
