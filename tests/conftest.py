"""Shared by the tests."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch comes in: workers that use all cores each wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import logging
import pkgutil
import sys
from pathlib import Path

import mlx_lm.models.cache
import pytest

import glm_dsa.mlx_lm
from tests.gatekeeper import close
from verify.gate import options


def pytest_addoption(parser):
    parser.addoption("--changed", metavar="FILE", help="of slow tests, only those whose subject is among these paths, one a line")


def pytest_collection_modifyitems(config, items):
    """Without --changed (or with a line "*" in it: it cannot be told) slow tests run as others do."""
    if config.getoption("--changed") is None:
        return
    paths = Path(config.getoption("--changed")).read_text().splitlines()
    left_out = [item for item in items if is_left_out(item, paths)]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


def is_left_out(item, paths):
    """Of a slow test: whether neither its file nor one of its subjects, which are the beginnings of paths, changed."""
    mark = item.get_closest_marker("slow")
    own = item.path.relative_to(item.config.rootpath).as_posix()
    subjects = (*(mark.args if mark else ()), own)
    return mark is not None and "*" not in paths and not any(path.startswith(subjects) for path in paths)


@pytest.fixture(autouse=True)
def nobody_listens():
    """What a command of an earlier test, or of a fixture, made of this package's log is undone."""
    log = logging.getLogger("glm_dsa")
    log.handlers[:], log.propagate = [], True
    log.setLevel(logging.NOTSET)


@pytest.fixture(scope="session", autouse=True)
def gatekeeper():
    yield
    close()


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
