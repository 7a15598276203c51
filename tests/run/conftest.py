from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fakes import write_methods, write_pipeline


@pytest.fixture
def methods(tmp_path, monkeypatch):
    root = write_methods(tmp_path / "methods")
    monkeypatch.setenv("TEMPER_METHODS", str(root))
    monkeypatch.setenv("TEMPER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return root


@pytest.fixture
def pipeline(methods, tmp_path):
    return str(write_pipeline(tmp_path / "chain.yaml"))
