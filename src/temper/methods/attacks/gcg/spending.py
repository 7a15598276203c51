"""What a search costs: asked of the run's budget before each step, booked after it, and estimated before the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from temper.core.budget import Budget
from temper.data.schemas import Data
from temper.methods.attacks.gcg.card import Config
from temper.methods.attacks.gcg.outcomes import Goal
from temper.methods.attacks.gcg.steps import Search
from temper.ops.search_prompt import SlotPrompt

__all__ = ["Spending", "cost_of", "estimate"]

CHARS_A_TOKEN = 4.0
TEMPLATE_TOKENS = 10
"""Guessed tokens between slot and target, for the estimate."""
FRESH_ROWS = 4
"""Whole rows of a step at most: one for the gradient, two that check kept keys and values, and what precedes the slot."""


class Spending:
    """The search's queries and tokens, booked as they grow; what the check of its result costs is kept back."""

    def __init__(self, search: Search, budget: Budget) -> None:
        self.search, self.budget = search, budget
        self.queries = self.tokens = 0
        self.book(0)

    def book(self, num_steps: int) -> None:
        """Book what the scorers counted since the last time."""
        scorers = [member.scorer for member in self.search.all_members]
        queries, tokens = sum(s.queries for s in scorers), sum(s.tokens for s in scorers)
        self.budget.spend(steps=num_steps, queries=queries - self.queries, tokens=tokens - self.tokens)
        self.queries, self.tokens = queries, tokens

    def allows_step(self) -> bool:
        """Whether the budget has room for another step, all of its candidates, and the check."""
        num, num_slot = self.search.config.num_candidates, len(self.search.current)
        prompts = [member.scorer.prompt for member in self.search.members]
        goals = {m.goal: m.scorer.prompt for m in self.search.all_members if m.model == 0}.values()
        whole = [_check_tokens(prompt) + num_slot for prompt in prompts]
        ends = [size - len(prompt.before) for size, prompt in zip(whole, prompts, strict=True)]
        return self.budget.allows(
            steps=1,
            queries=num * len(prompts) + len(goals),
            tokens=num * sum(ends) + FRESH_ROWS * sum(whole) + sum(map(_check_tokens, goals)),
        )


def _check_tokens(prompt: SlotPrompt) -> int:
    return len(prompt.before) + len(prompt.after) + len(prompt.target)


def cost_of(
    search: Search | None, number: int | None, goal: Goal, wall_s: float, budget: Budget
) -> dict[str, float]:
    """Candidates scored for a goal on all models and the check of the result, which is booked; tokens run for both."""
    scorers = [member.scorer for member in search.all_members if member.goal == number] if search else []
    last = _check_tokens(goal.prompt)
    budget.spend(queries=1, tokens=last)
    return {
        "queries": float(sum(scorer.queries for scorer in scorers) + 1),
        "tokens": float(sum(scorer.tokens for scorer in scorers) + last),
        "wall_s": wall_s,
    }


def estimate(facts: Mapping[str, Any], data: Data | None, config: Config) -> dict[str, float]:
    """Tokens run by the whole attack: steps x candidates x (half the slot + template + target), for every goal."""
    goals = data.get("goals") if data is not None else ()
    total = 0.0
    for goal in goals:
        target = len(getattr(goal, "target", "") or "") / CHARS_A_TOKEN
        width = config.suffix_tokens / 2 + TEMPLATE_TOKENS + target
        steps = config.num_steps if config.search != "none" else 0
        gradient = 3 * (width + config.suffix_tokens) if config.search == "gradient" else 0
        total += steps * (config.num_candidates * width + gradient) + config.reply_tokens
    return {"tokens": total}
