"""What the tests begin with: facts, a tiny model, pairs, and settings of few steps."""

import pytest

from temper.core.types import Message, Run
from temper.data.schemas import Data, Preference
from temper.methods.hardening.tar.card import Config
from temper.methods.hardening.tar.method import make
from temper.ops.batching import Example
from temper.systems.loading import load_base

SMALL = {
    "mapping_steps": 0, "num_steps": 2, "inner_steps": 2, "inner_every": 1, "lr": 1e-2, "adversary_lrs": (1e-2,),
    "batch_rows": 3, "adversary_rows": 2, "warmup_steps": 0,
}  # fmt: skip
PAIRS = [
    Preference(
        (Message("user", f"Tell me about the {word}."),),
        "Sorry, I can't.",
        f"Sure, the {word} is here.",
        id=word,
    )
    for word in ("fox", "boat", "mill", "stream")
]
MEASURE = {"attack_steps": 2, "look_every": 1, "attack_lrs": (1e-3,), "attack_rows": 2, "attack_rank": 2}


@pytest.fixture(scope="module")
def data():
    return make(None, Data({}), Config(num_facts=6), Run(seed=1))


@pytest.fixture
def system():
    return load_base("tiny:llama")


def example(*ids):
    return Example(list(ids), [False] + [True] * (len(ids) - 1))


def size(row):
    return len(row.ids)
