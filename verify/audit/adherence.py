"""Whether a build follows a recipe: every tensor kept as it says, in bits, group size, mode, dtype, and dtype of scales."""

from __future__ import annotations

from glm_dsa import weights
from glm_dsa.planning.formats import Format
from glm_dsa.planning.recipe import Recipe

from ..core.findings import FAULT, Findings
from .tensors import Tensors


def judge(tensors: Tensors, recipe: Recipe, findings: Findings) -> None:
    """Raises `RecipeError` where the recipe is not for this model."""
    where = f"recipe {recipe.source}:"
    if weights.is_hf_layout(tensors.found):
        findings.say(FAULT, f"{where} these are the original's tensors; expected an MLX build (convert)")
        return
    for name, (due, rule) in recipe.decided(tensors.args, tensors.with_mtp).items():
        kept = tensors.kept.get(name)
        if kept is None:
            findings.tensor(
                FAULT, f"{where} {{tensors}}: not there under this name, under which convert writes it", name
            )
        elif not _is_as_due(kept, due):
            detail = f"{_told(kept, due)}, expected {_told(due, kept)}: {rule or 'no rule names it'}"
            findings.tensor(FAULT, f"{where} {{tensors}}: {{detail}}", name, detail, apart=True)


def _is_as_due(kept: Format | str, due: Format) -> bool:
    if isinstance(kept, str) or not (kept.is_packed and due.is_packed and kept.mode != "affine"):
        return kept == due
    return kept.packing() == due.packing()  # scales of one byte, whatever the recipe's dtype


def _told(one: Format | str, other: Format | str) -> str:
    """A format; with the dtype of its scales, where that alone tells it from the other."""
    if isinstance(one, Format) and str(one) == str(other):
        return f"{one} with scales and biases in {one.dtype or 'different dtypes'}"
    return str(one)
