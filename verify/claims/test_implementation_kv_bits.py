"""Somebody's MLX code: mlx-lm's --kv-bits takes effect on its caches, and leaves a model that answers."""

import numpy as np
import pytest

from verify.cases import group_size
from verify.core import compare
from verify.core.collector import Collector
from verify.core.report import MEASURED, Comparison
from verify.engines.definition import to_numpy
from verify.engines.marshal import call_model, new_cache
from verify.engines.third_party import Failed, others_code
from verify.implementation.judge import judged_before
from verify.implementation.subject import Theirs

CLAIM = "implementation: --kv-bits"
BITS, STEPS = 8, 4


@pytest.mark.needs("packable")
def test_kv_bits(theirs: Theirs, judge, gate):
    if why := judged_before(theirs):
        pytest.skip(why)
    collector = Collector.of(judge)
    stage = f"--kv-bits {BITS}"
    try:
        before, after, logits = decode_packed(theirs)
    except Failed as error:
        collector.at_fault(theirs.name, stage, str(error))
    else:
        due = theirs.reference(theirs.case.long).reference.hf["logits"][:, -STEPS:]
        finite = bool(np.isfinite(logits).all())
        collector.holds(theirs.name, stage, finite, "finite logits of the steps after the packing")
        collector.holds(theirs.name, stage, after < before, f"fewer bytes than {before:,} (found: {after:,})")
        found = compare.distributions(logits, due)
        note = f"{before:,} bytes -> {after:,}; KL(ref || theirs) max {found.kl_max:.1e}, top-1 {found.top1:.0%}"
        gate.add(Comparison(CLAIM, theirs.name, f"{stage}, its cost", MEASURED, note=note))
    collector.finish()


def decode_packed(theirs: Theirs) -> tuple[int, int, np.ndarray]:
    """(bytes before packing and after it, logits of some steps on the packed caches). Raises `Failed`."""
    from mlx_lm.generate import maybe_quantize_kv_cache

    tokens = theirs.reference(theirs.case.long).reference.tokens
    cache = new_cache(theirs.model)
    call_model(theirs.model, tokens[:, :-STEPS], cache)
    kinds, before = [type(entry) for entry in cache], bytes_of(cache)
    with others_code():
        maybe_quantize_kv_cache(cache, 0, group_size(theirs.case.args), BITS)
    after = bytes_of(cache)
    if [type(entry) for entry in cache] == kinds and after == before:
        names = sorted({described(entry) for entry in cache})
        has = any(hasattr(entry, "to_quantized") for entry in cache)
        why = "change nothing" if has else "have no to_quantized"
        raise Failed(f"does not engage: caches ({', '.join(names)}) {why}; {before:,} bytes before and after")
    steps = [call_model(theirs.model, tokens[:, at : at + 1], cache) for at in range(tokens.shape[1])[-STEPS:]]
    return before, after, np.concatenate([to_numpy(step) for step in steps], axis=1)


def bytes_of(cache: list) -> int:
    with others_code():
        return sum(entry.nbytes for entry in cache)


def described(entry: object) -> str:
    parts = getattr(entry, "caches", ())
    inner = f" of {', '.join(type(part).__name__ for part in parts)}" if parts else ""
    return type(entry).__name__ + inner
