"""What two sides must have in common, what is asked of them, and on what they run."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase

import mlx.core as mx

from glm_dsa import ModelArgs
from glm_dsa.errors import printable
from glm_dsa.storage import Stored, read_bytes
from reference.stored import read_tensors

from ..core import stages
from ..engines import pruning
from ..engines.headers import SHAPES
from ..engines.spec import Side


@dataclass(frozen=True)
class Wanted:
    """What is reported: layers, and stages by pattern (`self_attn.indexer.*`). None: all."""

    layers: frozenset[int] | None = None
    stages: str | None = None

    def __call__(self, stage: str) -> bool:
        layer = stages.layer_of(stage)
        in_layers = self.layers is None or layer is None or layer in self.layers
        return in_layers and (self.stages is None or fnmatchcase(stages.kind(stage), self.stages)
                              or fnmatchcase(stage, self.stages))  # fmt: skip


class on_device:
    """mlx's default device, for a while. Raises ValueError where it is not there."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        self.before = mx.default_device()
        if self.name == "gpu":
            try:
                mx.eval(mx.zeros(1, stream=mx.gpu))
            except (RuntimeError, ValueError) as error:
                raise ValueError(f"device=gpu: mlx finds none here ({str(error).splitlines()[0]})") from None
        mx.set_default_device(mx.gpu if self.name == "gpu" else mx.cpu)

    def __exit__(self, *error: object) -> None:
        mx.set_default_device(self.before)


def same_weights(one: Side, other: Side) -> bool:
    """The same folder, or every tensor of the same name, dtype, shape and content: of large ones their ends."""
    if one.same_weights(other):
        return True
    a, b = one.release.tensors, other.release.tensors
    if a.keys() != b.keys() or any((a[n].dtype, a[n].shape) != (b[n].dtype, b[n].shape) for n in a):
        return False
    most = None if one.is_small and other.is_small else 1 << 16
    return all(_ends(a[name], most) == _ends(b[name], most) for name in a)


def _ends(stored: Stored, most: int | None) -> bytes:
    """Of a large model's tensors the first and last bytes."""
    most = min(stored.nbytes, stored.nbytes if most is None else most)
    return read_bytes(stored, 0, most) + read_bytes(stored, stored.nbytes - most, stored.nbytes)


def config_differences(mine: ModelArgs, theirs: ModelArgs) -> list[str]:
    """Where two configs say otherwise: what the one computes and the other does not. What goes with pruning is no difference."""
    left_out = ("conventions", "num_nextn_predict_layers", *(pruning.KEYS if pruning.is_pruned(mine, theirs) else ()))
    names = [f.name for f in fields(ModelArgs) if f.name not in left_out]
    return [
        f"{name} = {str(getattr(mine, name))[:60]}, the reference's is {str(getattr(theirs, name))[:60]}"
        for name in names
        if getattr(mine, name) != getattr(theirs, name)
    ]


def check_shapes(candidate: Side, reference: Side) -> None:
    for key in SHAPES:
        mine, theirs = getattr(candidate.args, key), getattr(reference.args, key)
        is_pruned = key == "n_routed_experts" and pruning.is_pruned(candidate.args, reference.args)
        if mine != theirs and not is_pruned:
            hint = "put the pruned build first" if key == "n_routed_experts" else "expected two of one model"
            raise ValueError(
                f"{printable(candidate.text)} and {printable(reference.text)}: {key} = {printable(str(mine))[:60]} and "
                f"{printable(str(theirs))[:60]}; {hint}"
            )


def numbered(candidate: Side, reference: Side) -> Side:
    """The candidate, whose experts are matched with the reference's by their routers' rows. Raises ValueError where none is."""
    if candidate.same_weights(reference):
        return candidate
    layers = range(reference.args.num_hidden_layers + 1)  # the MTP layer too
    mine, theirs = (read_tensors(side.folder) for side in (candidate, reference))
    found = pruning.numberings(mine, theirs, layers)
    return replace(candidate, numberings=found) if found else candidate
