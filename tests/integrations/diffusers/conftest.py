"""Fixtures of pipelines."""

from __future__ import annotations

import shutil
import warnings

import pytest

from sign_fast.integrations.diffusers import SiDPipeline
from sign_fast.integrations.diffusers import pipeline as pipeline_module
from tests.integrations.diffusers import tiny
from tests.integrations.diffusers.students import Captured, fresh


@pytest.fixture
def captured(monkeypatch):
    """A pipeline that takes the way of CUDA, and what it captured."""
    pipe = fresh("sd15")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline_module, "LatentEngine", Captured)
        engine = pipe.engine
    return pipe, lambda: {k: v for k, v in engine.graphs.statistics().items() if k in ("captures", "replays", "graphs")}


@pytest.fixture(scope="session")
def student(tmp_path_factory):
    """A student's folder of SD1.5's kind, as a distillation leaves it; leave it as it is."""
    folder = tmp_path_factory.mktemp("student") / "sd15"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        SiDPipeline.from_pretrained(tiny.folder("sd15")).save_pretrained(folder, card="# A student\n")
    return folder


@pytest.fixture
def copied(student, tmp_path):
    return shutil.copytree(student, tmp_path / "copy")
