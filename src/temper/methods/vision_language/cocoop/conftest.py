"""What the tests begin with: a tiny pair of encoders, drawn shapes, quick settings."""

from __future__ import annotations

from typing import Any

import pytest

from temper.data.schemas import Data
from temper.data.worlds import load_world
from temper.methods.vision_language.cocoop.card import Config
from temper.systems.dual_encoder import DualEncoder, load_dual_encoder
from temper.systems.wanted import Wanted


@pytest.fixture
def system() -> DualEncoder:
    return load_dual_encoder("tiny:clip", Wanted())


def quick(**changes: Any) -> Config:
    settings: dict[str, Any] = {
        "shots": 2,
        "num_epochs": 2,
        "batch_rows": 4,
        "lr": 0.1,
        "ending": "",
        "augment": False,
    }
    return Config(**(settings | changes))


def shapes(limit: int = 20, part: str = "train") -> Data:
    return Data({part: load_world(f"captions:DOM32:flat:{part}", limit)[part]})
