"""Shared by the tests."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch comes in: workers that use all cores each wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import logging
import pkgutil
import sys

import mlx_lm.models.cache
import pytest

import glm_dsa.mlx_lm
from verify.gate import options


@pytest.fixture(autouse=True)
def nobody_listens():
    """What a command of an earlier test, or of a fixture, made of this package's log is undone."""
    log = logging.getLogger("glm_dsa")
    log.handlers[:], log.propagate = [], True
    log.setLevel(logging.NOTSET)


class Given(dict):
    """In the place of pytest's config, where its options alone are asked for: those that are given, and the defaults."""

    def addoption(self, name, default=None, action=None, **_):
        self.setdefault(name, False if action == "store_true" else default)

    def getgroup(self, _):
        return self

    def getoption(self, name, default=None):
        return self.get(name, default)


@pytest.fixture
def given():
    """given({"--seed": 1}) -> the gate's config, as far as its options go."""

    def config(values):
        found = Given(values)
        options.add(found)
        return found

    return config


@pytest.fixture
def registered(monkeypatch):
    """register(), undone afterwards."""
    for owner, name in glm_dsa.mlx_lm.WRAPPERS:
        holder = pkgutil.resolve_name(owner)
        monkeypatch.setattr(holder, name, getattr(holder, name))
    for model_type in glm_dsa.mlx_lm.MODEL_TYPES:
        monkeypatch.delitem(sys.modules, f"mlx_lm.models.{model_type}", raising=False)
        monkeypatch.setitem(sys.modules, f"mlx_lm.models.{model_type}", None)
        monkeypatch.setattr(mlx_lm.models, model_type, None, raising=False)
    monkeypatch.setattr(mlx_lm.models.cache, "LayerCache", None, raising=False)
    glm_dsa.mlx_lm.register()


@pytest.fixture(scope="module", autouse=True)
def unregistered():
    """For modules whose commands register: what that put in mlx-lm's place is taken back behind them."""
    kept = {(o, n): getattr(pkgutil.resolve_name(o), n) for o, n in glm_dsa.mlx_lm.WRAPPERS}
    modules = {t: sys.modules.get(f"mlx_lm.models.{t}") for t in glm_dsa.mlx_lm.MODEL_TYPES}
    yield
    for (owner, name), original in kept.items():
        setattr(pkgutil.resolve_name(owner), name, original)
    for name, module in modules.items():
        if module is None:
            sys.modules.pop(f"mlx_lm.models.{name}", None)
        else:
            sys.modules[f"mlx_lm.models.{name}"] = module
