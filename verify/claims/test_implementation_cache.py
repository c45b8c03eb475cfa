"""Somebody's MLX code: logits of the whole prompt at once, in chunks, token by token, and after a rewind, are HF's."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from verify.core import compare
from verify.core.collector import Collector
from verify.core.report import MEASURED, Comparison
from verify.core.stages import kind_of
from verify.engines.definition import to_numpy
from verify.engines.marshal import call_model, describe, new_cache
from verify.engines.third_party import Failed
from verify.implementation.comparison import Watch
from verify.implementation.judge import judged_before
from verify.implementation.subject import Theirs, add_name

CLAIM = "implementation: logits and caches"

CUTS = {"chunks": [1, 12, 7, 31, 1, 28], "prefill, then token by token": [61] + [1] * 19}


@pytest.fixture
def collector(theirs: Theirs, judge, gate):
    """Faults that were found in modules are mended here (HF's output stands in), so that others are seen behind them."""
    if why := judged_before(theirs):
        pytest.skip(why)
    if theirs.mended:
        kinds = sorted({kind_of(path) for path in theirs.mended})
        add_name(gate.not_verified, f"{CLAIM}: with its own {', '.join(kinds)}, HF's stood in for it", theirs.name)
    collector = Collector.of(judge)
    yield collector
    collector.finish()


def judge_run(theirs: Theirs, collector: Collector, stage: str, run: Callable[[Watch], list]) -> None:
    """run(watch) -> logits, in parts; against HF's of the whole prompt, uncached.

    Where its choices are seen, a tie goes on as in HF. Where they are not, what may lie behind one is left out.
    """
    reference = theirs.reference(theirs.case.long)
    watch = Watch(theirs, reference, collector, local=False)
    due, bound = reference.reference.hf["logits"], reference.reference.bound("logits", local=False)
    try:
        parts = run(watch)
    except Failed as error:
        collector.at_fault(theirs.name, stage, str(error))
        return
    wrong = [part for part in parts if not isinstance(part, mx.array) or part.ndim != 3]
    if wrong:
        collector.at_fault(theirs.name, stage, f"the model gives {describe(wrong[0])}; expected logits [B, S, V]")
        return
    logits = np.concatenate([to_numpy(part) for part in parts], axis=1)
    if not watch.sees_choices and logits.shape == due.shape:
        sure = reference.reference.untied[0]
        if 2 * sure.sum() < len(sure):
            pytest.skip(
                f"{stage}: {sure.sum()} of {len(sure)} rows lie before a possible tie, and its choices are not seen"
            )
        logits, due = logits[:, sure], due[:, sure]
    fault = collector.check(lambda: collector.values(theirs.name, stage, logits, due, bound))
    if fault:
        collector.record(fault)


def in_cuts(watch: Watch, tokens: np.ndarray, cuts: list[int], cache) -> list:
    ends = np.cumsum(cuts)
    assert ends[-1] == tokens.shape[1], "the cuts must cover the prompt"
    return [watch.forward(tokens[:, end - cut : end], cache) for end, cut in zip(ends, cuts, strict=True)]


def test_logits(theirs: Theirs, collector, gate):
    """From tokens on, uncached; and, untouched, what distributions it ends with."""
    reference = theirs.reference(theirs.case.long).reference
    judge_run(theirs, collector, "logits", lambda watch: [watch.forward(reference.tokens)])
    found = compare.distributions(to_numpy(call_model(theirs.model, reference.tokens)), reference.hf["logits"])
    note = f"KL(ref || theirs) in nats: mean {found.kl_mean:.1e}, max {found.kl_max:.1e}; top-1 {found.top1:.1%}"
    gate.add(Comparison(CLAIM, theirs.name, "distributions, unmended", MEASURED, note=note))


@pytest.mark.parametrize("cuts", CUTS)
def test_cuts(theirs: Theirs, collector, cuts):
    tokens = theirs.reference(theirs.case.long).reference.tokens
    judge_run(
        theirs, collector, f"logits ({cuts})",
        lambda watch: in_cuts(watch, tokens, theirs.case.scaled(CUTS[cuts]), new_cache(theirs.model)),
    )  # fmt: skip


def test_rewind(theirs: Theirs, collector):
    """What was trimmed leaves no trace."""
    from mlx_lm.models.cache import can_trim_prompt_cache

    tokens = theirs.reference(theirs.case.long).reference.tokens
    kept = theirs.case.long * 5 // 8
    if not can_trim_prompt_cache(new_cache(theirs.model)):
        pytest.skip("its caches say that they cannot be rewound")

    def run(watch: Watch) -> list:
        cache = new_cache(theirs.model)
        parts = in_cuts(watch, tokens[:, :kept], [kept], cache)
        for cut in (6, 1, 6):
            call_model(theirs.model, theirs.case.tokens(cut), cache)
        trimmed = [entry.trim(13) for entry in cache]
        if trimmed != [13] * len(cache):
            raise Failed(f"trim(13) answers {trimmed}")
        return [*parts, *in_cuts(watch, tokens[:, kept:], [1, theirs.case.long - kept - 1], cache)]

    judge_run(theirs, collector, "logits (rewind)", run)


def test_one_cache_for_each_layer(theirs: Theirs, collector):
    """What mlx-lm's generation and speculative decoding count on."""
    layers, entries = getattr(theirs.model, "layers", None), new_cache(theirs.model)
    if layers is None or len(layers) != len(entries) or len(layers) != theirs.case.args.num_hidden_layers:
        found = f"{len(entries)} caches, {'no `layers`' if layers is None else f'{len(layers)} layers'}"
        collector.at_fault(
            theirs.name, "caches", f"{found}: expected one for each of {theirs.case.args.num_hidden_layers}"
        )
    else:
        collector.holds(theirs.name, "caches", True, "one cache for each decoder layer")
