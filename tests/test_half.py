"""What rounding once to 16 bit may cost, and that rounding before the end costs more."""

import mlx.core as mx
import numpy as np
import pytest

from verify.claims import half

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("dtype", half.DTYPES)
def test_one_rounding_is_one_rounding(dtype):
    truth = RANDOM.standard_normal(100_000) * 10.0 ** RANDOM.uniform(-6, 4, 100_000)
    held, exact = half.rounded(truth, dtype)
    assert held.dtype == half.DTYPES[dtype]
    assert np.array_equal(half.exact(held), exact)
    assert 0.9 < half.roundings(held, truth, 2.0**-24 * np.abs(truth), dtype) <= 1


@pytest.mark.parametrize("dtype", half.DTYPES)
def test_a_rounding_before_the_end_shows_where_terms_cancel(dtype):
    terms = RANDOM.standard_normal((4096, 8))
    early = half.exact(mx.array(terms.astype(np.float32)).astype(half.DTYPES[dtype])).sum(-1)
    slack = 8 * 2.0**-24 * np.abs(terms).sum(-1)
    late, too_early = (half.rounded(values, dtype)[0] for values in (terms.sum(-1), early))
    assert half.roundings(late, terms.sum(-1), slack, dtype) <= 1
    assert half.roundings(too_early, terms.sum(-1), slack, dtype) > 50


def test_what_is_no_number_is_no_small_error():
    held = mx.array([1.0, float("nan")]).astype(mx.bfloat16)
    assert not half.roundings(held, np.ones(2), 0.0, "bfloat16") <= 1
