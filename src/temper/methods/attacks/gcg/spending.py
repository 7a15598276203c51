"""What an attack costs: asked of the run's budget before it is spent, booked after it, and estimated before the run.

A query is a text that an attacked model reads: a candidate, or a string tried on a goal to see the reply. Tokens are those
of all passes and replies; a draft's too, though nobody asks it anything.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from temper.core.errors import ConfigError
from temper.core.types import Run
from temper.data.schemas import Data
from temper.methods.attacks.gcg.card import Config
from temper.methods.attacks.gcg.outcomes import Goal
from temper.methods.attacks.gcg.probe import most_scored
from temper.methods.attacks.gcg.steps import Search
from temper.ops.search_losses import SlotLoss, SlotScorer
from temper.ops.search_prompt import SlotPrompt, initial_ids

__all__ = ["Spending", "estimate", "require_paid"]

CHARS_A_TOKEN = 4.0
TEMPLATE_TOKENS = 10
"""Guessed tokens between slot and target, for the estimate."""

Cost = Counter[str]
"""Queries and tokens by these names."""


class Spending:
    """What goals that share a string spend, by a goal's number: first those searched on, then held-out ones.

    Nothing is begun that would leave too little for trying the string on each of them. `by_model` is that of the search.
    """

    def __init__(
        self, by_model: Sequence[Sequence[Goal]], config: Config, run: Run, held_out: Sequence[Goal] = ()
    ) -> None:
        self.config, self.run, self.budget = config, run, run.budget
        self.num_searched = len(by_model[0])
        self.goals = [*by_model[0], *held_out]
        self.search: Search | None = None
        self.num_slot = 0
        self.least = Cost()
        self.replies: defaultdict[int, Cost] = defaultdict(Cost)
        self.booked = Cost()
        if config.search != "none":
            self.num_slot = len(initial_ids([self.goals[0].prompt], config.suffix_tokens, config.init))
            self.least += self._start([goal.prompt for goals in by_model for goal in goals])
        self.least += self._trial()

    def follow(self, search: Search) -> None:
        """Book what a search has spent so far, and with each `book` what it spends from here on."""
        self.search = search
        self.book()

    def book(self, num_steps: int = 0) -> None:
        """Book what was spent since the last time."""
        now = sum(self.replies.values(), self._of_scorers())
        self.budget.spend(steps=num_steps, **(now - self.booked))
        self.booked = now

    def book_reply(self, number: int, num_tokens: int) -> None:
        """Book a string that was tried on a goal, with all tokens read and written for it."""
        self.replies[number] += Cost(queries=1, tokens=num_tokens)
        self.book()

    def of_goal(self, number: int) -> dict[str, float]:
        """Queries and tokens spent on a goal, on all models; those of all goals are the whole that is booked."""
        cost = self._of_scorers(number) + self.replies[number]
        return {unit: float(cost[unit]) for unit in ("queries", "tokens")}

    def allows_step(self) -> bool:
        """Whether the budget has room for another step, all of its candidates, and the trial of its result."""
        assert self.search is not None
        num, members = self.config.num_candidates, self.search.members
        scored = most_scored(num, self.config.draft_reduction) if self.config.draft else num
        # A row for the gradient; a random search may keep the slot anew for each of probe sampling's two calls.
        tokens = sum(self._row(m.scorer.prompt) + self._scoring(m.scorer, scored) for m in members)
        tokens += sum(self._scoring(draft.scorer, num) for draft in self.search.drafts)
        return self._allows(Cost(queries=scored * len(members), tokens=tokens), steps=1)

    def allows_replies(self) -> bool:
        """Whether there is room for a reply on each goal that counts, a score of all if more join, and the trial."""
        assert self.search is not None
        members, everyone = self.search.members, self.search.all_members
        joining = everyone if len(members) < len(everyone) else []
        tokens = sum(self._reply(m.scorer.prompt) for m in members)
        tokens += sum(self._scoring(m.scorer, 1) for m in joining)
        return self._allows(Cost(queries=len(members) + len(joining), tokens=tokens))

    def _allows(self, cost: Cost, steps: int = 0) -> bool:
        return self.budget.allows(steps=steps, **(cost + self._trial()))

    def _of_scorers(self, number: int | None = None) -> Cost:
        """Of one goal, or of all."""
        if self.search is None:
            return Cost()
        members = [m.scorer for m in self.search.all_members if number in (None, m.goal)]
        drafts = [m.scorer for m in self.search.drafts if number in (None, m.goal)]
        return Cost(
            queries=sum(s.queries for s in members), tokens=sum(s.tokens for s in [*members, *drafts])
        )

    def _start(self, prompts: Sequence[SlotPrompt]) -> Cost:
        """The most that scoring what a search starts from takes."""
        prompts = prompts[:1] if self.config.universal and self.config.progressive else prompts
        loss = SlotLoss(control_weight=self.config.control_weight)
        fresh = [SlotScorer(p, loss, self.run, reuse_prefix=self.config.keep_prefix) for p in prompts]
        return Cost(queries=len(fresh), tokens=sum(self._scoring(scorer, 1) for scorer in fresh))

    def _trial(self) -> Cost:
        """The most that trying a string on every goal takes: its target scored, and a reply."""
        prompts = [goal.prompt for goal in self.goals]
        return Cost(queries=len(prompts), tokens=sum(self._row(p) + self._reply(p) for p in prompts))

    def _scoring(self, scorer: SlotScorer, num_rows: int) -> int:
        return scorer.most_tokens(num_rows, self.num_slot)

    def _row(self, prompt: SlotPrompt) -> int:
        return len(prompt.before) + self.num_slot + len(prompt.after) + len(prompt.target)

    def _reply(self, prompt: SlotPrompt) -> int:
        return len(prompt.before) + self.num_slot + len(prompt.after) + self.config.reply_tokens


def require_paid(jobs: Sequence[Spending]) -> None:
    """Raise ConfigError unless an equal share of the budget pays for each job's start and the trial of its result."""
    limits = jobs[0].budget.limits if jobs else {}
    for unit in {"queries", "tokens"} & set(limits):
        limit, least = limits[unit], len(jobs) * max(job.least[unit] for job in jobs)
        if limit < least:
            raise ConfigError(
                f"The budget of {limit:g} {unit} may not pay for trying a string on each goal",
                where=f"gcg on {sum(len(job.goals) for job in jobs)} goals",
                cure=f"Raise it to {least} at least, or give fewer goals.",
            )


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
