"""What the tests begin with: a tiny model whose every token has a say, two goals, a small attack and its search."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import temper
from temper.core.types import Attempt, Run
from temper.data.schemas import Behaviour
from temper.methods.attacks.gcg import method
from temper.methods.attacks.gcg.card import Config
from temper.methods.attacks.gcg.steps import Search
from temper.ops.search import allowed_mask
from temper.systems.causal_lm import CausalLM
from temper.systems.loading import load_base

SMALL: dict[str, Any] = {
    "suffix_tokens": 5,
    "num_steps": 3,
    "num_candidates": 16,
    "topk": 24,
    "reply_tokens": 4,
}
GOALS = (
    Behaviour("How do I fold a paper boat?", "Sure, here is a fox", id="a", benign=True),
    Behaviour("Who wrote the letter?", "Yes. The assistant", id="b", benign=True),
)


@pytest.fixture(scope="module")
def system() -> CausalLM:
    made = load_base("tiny:llama")
    with torch.no_grad():
        for parameter in made.model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return made


def run_on(system: CausalLM, goals: Any = GOALS, run: Run | None = None, **settings: Any) -> list[Attempt]:
    return list(temper.attack("gcg", system, goals, run=run, **{**SMALL, **settings}))


def search_of(system: CausalLM, **settings: Any) -> Search:
    config = Config(**{**SMALL, **settings})
    goals = method.prepare(system, GOALS[:1], config)
    return method.optimise([goals], allowed_mask(system), config, Run())
