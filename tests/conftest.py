"""Shared by the tests."""

import pkgutil
import sys

import mlx_lm.models.cache
import pytest

import glm_dsa.mlx_lm


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
