from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fakes import own_folder, write_pipeline


@pytest.fixture
def methods(tmp_path, monkeypatch):
    return own_folder(tmp_path, monkeypatch)


@pytest.fixture
def pipeline(methods, tmp_path):
    return str(write_pipeline(tmp_path / "chain.yaml"))
