"""Greedy coordinate gradient: whole attacks on tiny random models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from temper.core.errors import ModelError
from temper.core.types import Message, Run
from temper.methods.attacks.gcg import method
from temper.methods.attacks.gcg.card import Config
from temper.methods.attacks.gcg.conftest import GOALS, run_on
from temper.ops.hooks import is_hooked
from temper.systems.causal_lm import CausalLM


def test_the_returned_string_gives_the_reported_loss(system: CausalLM) -> None:
    """Typed into the chat as text and scored by a whole forward pass over full logits."""
    for attempt, goal in zip(run_on(system), GOALS, strict=True):
        assert attempt.input == goal.prompt + attempt.detail["suffix"]
        prompt = system.chat.prompt([Message("user", attempt.input)]).ids
        reply = system.chat.dialogue([Message("user", attempt.input), Message("assistant", str(goal.target))])
        target = reply.ids[len(prompt) : reply.spans[-1].end - 1]
        with torch.no_grad():
            logits = system.model(input_ids=torch.tensor([[*prompt, *target]])).logits[0].float()
        logp = logits[len(prompt) - 1 : -1].log_softmax(-1)[torch.arange(len(target)), torch.tensor(target)]
        assert attempt.detail["best_loss"] == pytest.approx(-logp.mean().item(), abs=1e-4)
        assert attempt.detail["best_loss"] == pytest.approx(min(attempt.detail["loss_curve"]), abs=1e-4)
        assert attempt.detail["target_prob"] == pytest.approx(math.exp(logp.sum().item()), rel=1e-3)
        assert len(attempt.detail["loss_curve"]) == 4
        assert attempt.cost["queries"] > 3


def test_the_search_lowers_the_loss_and_the_gradient_beats_random(system: CausalLM) -> None:
    longer = {"num_steps": 8, "refill": True, "topk": 16}
    ours, random = run_on(system, **longer), run_on(system, search="random", **longer)
    assert all(a.detail["best_loss"] < a.detail["start_loss"] for a in ours)
    assert [a.cost["queries"] for a in ours] == [a.cost["queries"] for a in random] == [1 + 8 * 16 + 1] * 2
    assert sum(a.detail["best_loss"] for a in ours) < sum(a.detail["best_loss"] for a in random)


def test_no_suffix_is_the_prompt_alone(system: CausalLM) -> None:
    (attempt,) = run_on(system, GOALS[:1], search="none")
    assert (attempt.input, attempt.cost["queries"], attempt.detail["suffix"]) == (GOALS[0].prompt, 1.0, "")


def test_equal_seeds_give_equal_attempts_whatever_came_before(system: CausalLM) -> None:
    both, second = run_on(system), run_on(system, GOALS[1:])
    assert both[1].detail["suffix_ids"] == second[0].detail["suffix_ids"]
    assert both[1].detail["loss_curve"] == pytest.approx(second[0].detail["loss_curve"], abs=1e-5)
    other = run_on(system, GOALS[1:], run=Run(seed=1))
    assert other[0].detail["suffix_ids"] != second[0].detail["suffix_ids"]


def test_the_model_is_left_as_it_was(system: CausalLM) -> None:
    before = {name: tensor.clone() for name, tensor in system.model.state_dict().items()}
    run_on(system, GOALS[:1], draft="layers:1")
    assert all(torch.equal(tensor, before[name]) for name, tensor in system.model.state_dict().items())
    assert all(p.grad is None for p in system.model.parameters())
    assert not is_hooked(system.model)


def test_kept_keys_change_nothing(system: CausalLM) -> None:
    fast, slow = run_on(system, GOALS[:1]), run_on(system, GOALS[:1], keep_prefix=False)
    assert fast[0].detail["suffix_ids"] == slow[0].detail["suffix_ids"]
    assert fast[0].cost["tokens"] < slow[0].cost["tokens"]


def test_figures_and_rows(system: CausalLM, tmp_path: Path) -> None:
    from temper.report.figures import curve_figures
    from temper.run.attack_rows import attack_rows

    attempts = run_on(system, run=Run(folder=tmp_path))
    (figure,) = curve_figures(json.loads((tmp_path / "figures.json").read_text())["curves"])
    assert "Loss" in figure.title
    rows = list(attack_rows(attempts))
    losses = [row for row in rows if row.metric == "best_loss"]
    assert [row.item for row in losses] == [goal.prompt for goal in GOALS], "claims pair on goals"
    assert {"target_prob", "match", "judge_success", "queries", "attack_success_rate"} <= {
        r.metric for r in rows
    }


class Opens:
    """A step rule that lets every answer open with id 501, as a gate of refusal tokens does."""

    name = "opens"

    def start(self, prompt_ids: list[int]) -> dict[str, Any]:
        return {}

    def __call__(
        self, logits_BV: torch.Tensor, position_B: list[int], states: list[dict[str, Any]]
    ) -> torch.Tensor:
        first = torch.tensor([position == 0 for position in position_B])[:, None]
        forced = torch.full_like(logits_BV, -torch.inf)
        forced[:, 501] = 0.0
        return torch.where(first, forced, logits_BV)

    def reply_prefix_ids(self) -> list[int]:
        return [501]


def test_an_attack_on_refusal_tokens_aims_at_the_token_that_opens_an_answer(system: CausalLM) -> None:
    guarded = system.with_(step_rules=(Opens(),))
    (goal,) = method.prepare(guarded, GOALS[:1], Config())
    (plain,) = method.prepare(guarded, GOALS[:1], Config(target_prefix=""))
    assert goal.prompt.target == [501, *plain.prompt.target]
    (named,) = method.prepare(guarded, GOALS[:1], Config(target_prefix="<|endoftext|>"))
    assert named.prompt.target[0] == 0
    (attempt,) = run_on(guarded, GOALS[:1])
    assert attempt.detail["target_logp"] == pytest.approx(
        -attempt.detail["best_loss"] * len(goal.prompt.target), rel=1e-5
    )
    with pytest.raises(ModelError, match="splits the control token"):
        run_on(guarded, GOALS[:1], target_prefix="[nothing]")
