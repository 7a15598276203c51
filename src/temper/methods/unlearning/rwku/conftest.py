"""What the tests begin with: a tiny model, people, and probes made of them."""

from __future__ import annotations

from typing import Any

import pytest

from temper.core.types import Run
from temper.data.loading import load_data
from temper.data.schemas import Data
from temper.methods.unlearning.rwku.card import Config
from temper.methods.unlearning.rwku.method import make
from temper.systems.loading import load_base

FAST = Config(reply_tokens=3, reason_tokens=3, fluency_tokens=4)


@pytest.fixture(scope="module")
def system() -> Any:
    return load_base("tiny:llama")


@pytest.fixture(scope="module")
def people() -> Data:
    parts = ("forget", "retain", "holdout", "world_facts")
    return load_data("builtin:people", dict.fromkeys(parts, "Dialogue"), limit=8)


@pytest.fixture(scope="module")
def probes(people: Data) -> Data:
    return make(None, people, Config(num_facts=2, num_utility=3), Run())
