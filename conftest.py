"""Shared by the gate and the tests: one thread, and property tests that are repeatable."""

import contextlib
import warnings

import hypothesis

with warnings.catch_warnings():  # a library's own deprecations at import are not ours to fail on
    warnings.simplefilter("ignore")
    with contextlib.suppress(
        Exception, SystemExit
    ):  # verify/gate/plugin.py says so; tests that need neither run all the same
        import torch
        import transformers  # noqa: F401

        torch.set_num_threads(1)  # on tiny tensors two wait for each other more than they work

hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)  # fmt: skip
hypothesis.settings.load_profile("repeatable")
