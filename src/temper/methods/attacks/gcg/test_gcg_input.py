"""Bad input, and the estimate of the work."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import temper
from temper.core.errors import ConfigError, DataError, ModelError, NeedsError, NumericsError
from temper.core.types import Message, Run
from temper.data.loading import load_data
from temper.data.schemas import Behaviour
from temper.methods.attacks.gcg import method, outcomes
from temper.methods.attacks.gcg.card import Config
from temper.methods.attacks.gcg.conftest import GOALS, run_on, search_of
from temper.ops.search_losses import Scores
from temper.systems.causal_lm import CausalLM


@pytest.mark.parametrize("target", [None, "", "  "])
def test_a_goal_without_a_target_is_an_error_before_anything_runs(
    system: CausalLM, target: str | None
) -> None:
    with pytest.raises(DataError, match=r"no target.*goal 1 \(b\)"):
        run_on(system, [GOALS[0], Behaviour("Say it.", target, id="b")])


def test_a_target_longer_than_the_context(system: CausalLM) -> None:
    with pytest.raises(DataError, match="context holds 512"):
        run_on(system, [Behaviour("Say it.", "fox " * 600, id="b")])


def test_a_slot_that_stands_twice(system: CausalLM) -> None:
    with pytest.raises(DataError, match="once"):
        run_on(system, [Behaviour("{optim_str} {optim_str}", "Sure", id="b")])


def test_goals_with_one_prompt_keep_apart(system: CausalLM) -> None:
    twice = [GOALS[0], Behaviour(GOALS[0].prompt, "Yes", id="z", benign=True)]
    assert [a.goal for a in run_on(system, twice, search="none")] == [
        f"{GOALS[0].prompt} [{i}]" for i in ("a", "z")
    ]


def test_a_system_that_rewrites_by_content_is_found_out(system: CausalLM) -> None:
    def shout(messages: tuple[Message, ...]) -> tuple[Message, ...]:
        return tuple(Message(m.role, m.content + "." * ("fox" in m.content)) for m in messages)

    with pytest.raises(ModelError, match="rewrites the finished prompt"):
        run_on(system.with_(rewrites=(shout,)), GOALS[:1], init=" a small fox", num_steps=0)


def test_a_loss_that_is_not_that_of_the_string_is_an_error(system: CausalLM) -> None:
    outcomes.check_loss(2.0, [1.0, 3.0005], system, Run())
    with pytest.raises(NumericsError, match="its string gives"):
        outcomes.check_loss(2.0, [2.1], system, Run())
    with pytest.raises(NumericsError):
        outcomes.check_loss(float("nan"), [2.1], system, Run())


def test_a_loss_of_nan_stops_the_search(system: CausalLM) -> None:
    search = search_of(system)
    with pytest.raises(NumericsError, match="nan"):
        search.take(torch.tensor([[1, 2]]), Scores(torch.tensor([math.nan]), torch.tensor([False])))


@pytest.mark.parametrize(
    "settings",
    [
        {"topk": 0},
        {"num_steps": -1},
        {"mellowmax_alpha": 0.0},
        {"check_every": 0},
        {"positions": "odd"},
        {"draft": "gradient", "search": "random"},
    ],
)
def test_bad_settings(system: CausalLM, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        run_on(system, **settings)


def test_an_endpoint_is_refused() -> None:
    with pytest.raises(NeedsError, match="endpoint"):
        temper.attack("gcg", "openai:gpt-x", GOALS)


def test_the_estimate_grows_with_the_work() -> None:
    data = load_data("builtin:behaviours:neutral", {"goals": "Behaviour"}, limit=2)
    facts = {"parameters": 1e8, "flops_per_s": 1e11, "device": "cpu"}
    one, two = (method.estimate(facts, data, Config(num_steps=n))["tokens"] for n in (100, 200))
    assert 1.9 < two / one < 2.1
    assert one > 100 * 512 * 20
    assert method.estimate(facts, data, Config(search="none"))["tokens"] < 1000
    assert method.estimate(facts, None, Config())["tokens"] == 0
