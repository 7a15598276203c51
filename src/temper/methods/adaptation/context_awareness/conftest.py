"""What the tests begin with: tiny models, conversations and rows, and what a model attends to and says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from temper.core.types import Message
from temper.data.schemas import Data, Dialogue
from temper.ops.hooks import attention_weights
from temper.systems.causal_lm import CausalLM
from temper.systems.loading import load_base

NONE = Data({}, "none")


def load(name: str, **options: Any) -> CausalLM:
    system = load_base(name, **options)
    assert isinstance(system, CausalLM)
    return system


TALKS = (
    [Message("user", "Where does the river begin?")],
    [Message("system", "Be brief."), Message("user", "Tell me about the mill.\nAnd the fox.")],
    [
        Message("user", "One?"),
        Message("assistant", "Two, of course, as the letter says."),
        Message("user", "Three?"),
    ],
)
RECORDS = [
    Dialogue((Message("user", "Two lines\n\nof text."), Message("assistant", "I see two lines.")), id="a"),
    Dialogue((*TALKS[2], Message("assistant", "Yes, three of them.")), id="b"),
    Dialogue(
        (Message("system", "Be brief."), Message("user", "Hello there"), Message("assistant", "Hi.")), id="c"
    ),
]


@pytest.fixture(scope="module")
def tiny() -> CausalLM:
    return load("tiny:llama")


@pytest.fixture(params=["tiny:llama", "tiny:gpt2", "tiny:gemma2"])
def system(request: pytest.FixtureRequest) -> CausalLM:
    return load(request.param)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """No test leaves the shared tiny system with a hook."""
    yield
    for module in load("tiny:llama").model.modules():
        assert not module._forward_pre_hooks


def weights(system: CausalLM, ids: list[int], layer: int = 0) -> torch.Tensor:
    with torch.no_grad(), attention_weights(system.model, [layer]) as kept:
        system.model(input_ids=torch.tensor([ids]), use_cache=False)
    return kept[layer][0][0]


def logits(system: CausalLM, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return system.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
