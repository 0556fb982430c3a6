"""Fixtures of pipelines."""

from __future__ import annotations

import pytest

from sign_fast.integrations.diffusers import pipeline as pipeline_module
from tests.integrations.diffusers.students import Captured, fresh


@pytest.fixture
def captured(monkeypatch):
    """A pipeline that takes the way of CUDA, and what it captured."""
    pipe = fresh("sd15")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline_module, "LatentEngine", Captured)
        engine = pipe.engine
    return pipe, lambda: {k: v for k, v in engine.graphs.statistics().items() if k in ("captures", "replays", "graphs")}
