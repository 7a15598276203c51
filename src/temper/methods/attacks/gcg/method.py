"""Greedy coordinate gradient as an attack: goals in, attempts out. The step is in `steps.py`."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from temper import judges
from temper.core.errors import DataError
from temper.core.types import Attempt, Json, Run
from temper.data.schemas import Behaviour, Data
from temper.judges.base import Judge
from temper.methods.attacks.gcg import outcomes as results
from temper.methods.attacks.gcg.card import Config
from temper.methods.attacks.gcg.outcomes import Goal, Outcome
from temper.methods.attacks.gcg.probe import first_layers, num_layers_of, open_draft
from temper.methods.attacks.gcg.spending import Spending, estimate, require_paid
from temper.methods.attacks.gcg.steps import GRADIENT, Draft, Member, Search
from temper.ops.search import allowed_mask, require_same_vocabulary
from temper.ops.search_losses import SlotLoss, SlotScorer
from temper.ops.search_prompt import initial_ids, slot_prompt
from temper.systems.causal_lm import CausalLM

__all__ = ["attack", "estimate", "open_search", "optimise", "prepare", "universal"]

logger = logging.getLogger(__name__)


def attack(system: CausalLM, data: Data, config: Config, run: Run) -> Iterator[Attempt]:
    """Attempts as goals finish; with `universal` all at the end, held-out goals after those searched on.

    Goals are checked before the first. Raises DataError for a goal without a target.
    """
    goals = prepare(system, data["goals"], config)
    held_out = prepare(system, data.get("held_out"), config)
    judge = judges.load(config.judge, run=run)
    if config.universal:
        return universal([system], goals, config, run, held_out=held_out, judge=judge)
    if held_out:
        logger.warning("held_out goals are used by universal: true alone")
    return _each(system, goals, config, run, judge)


def prepare(system: CausalLM, records: Sequence[Any], config: Config) -> list[Goal]:
    """The goals with their slots. Raises DataError for a missing target, a bad slot, or too long a prompt."""
    prompts = [record.prompt for record in records]
    goals = []
    for number, record in enumerate(records):
        if not isinstance(record, Behaviour) or not (record.target or "").strip():
            raise DataError(
                "A goal has no target",
                where=f"goal {number} ({record.id})",
                cure="Give each a `target`: how the wanted reply begins, e.g. 'Sure, here is a riddle'.",
            )
        is_alone = prompts.count(record.prompt) == 1
        name = record.prompt if is_alone else f"{record.prompt} [{record.id or number}]"
        prompt = slot_prompt(system, record.prompt, str(record.target), opening=_opening(system, config))
        goals.append(Goal(name, record, prompt))
    return goals


def _opening(system: CausalLM, config: Config) -> list[int] | None:
    if config.target_prefix == "auto":
        return None
    return [system.chat.require_token(config.target_prefix)] if config.target_prefix else []


def _each(
    system: CausalLM, goals: Sequence[Goal], config: Config, run: Run, judge: Judge
) -> Iterator[Attempt]:
    """One search a goal."""
    allowed_V = allowed_mask(system, ascii_only=not config.allow_non_ascii)
    curves: dict[str, list[float]] = {}
    require_paid([Spending([[goal]], config, run) for goal in goals])
    for number, goal in enumerate(run.ticker(goals, total=len(goals), label="goals")):
        started = time.perf_counter()
        run.budget.share(len(goals) - number)
        spending = Spending([[goal]], config, run)
        if config.search != "none":
            curves[goal.name] = optimise([[goal]], allowed_V, config, run, spending).curve
        yield from _attempts(system, spending, started, judge)
        results.write_figures(run, curves)


def universal(
    systems: Sequence[CausalLM],
    goals: Sequence[Goal],
    config: Config,
    run: Run,
    *,
    held_out: Sequence[Goal] = (),
    judge: Judge | None = None,
) -> Iterator[Attempt]:
    """One string for all goals on all systems, which share a tokenizer; replies come from the first (Alg. 2).

    `goals` and `held_out` are prepared on the first system. Raises ConfigError for another vocabulary.
    """
    require_same_vocabulary(systems)
    judge = judge or judges.load(config.judge, run=run)
    by_model = [prepare(system, [goal.record for goal in goals], config) for system in systems[1:]]
    return _universal(systems, [list(goals), *by_model], list(held_out), config, run, judge)


def _universal(
    systems: Sequence[CausalLM],
    by_model: list[list[Goal]],
    held_out: list[Goal],
    config: Config,
    run: Run,
    judge: Judge,
) -> Iterator[Attempt]:
    started = time.perf_counter()
    spending = Spending(by_model, config, run, held_out)
    require_paid([spending])
    if config.search != "none":
        masks = [allowed_mask(system, ascii_only=not config.allow_non_ascii) for system in systems]
        size = min(map(len, masks))
        allowed_V = torch.stack([mask[:size] for mask in masks]).all(0)
        search = optimise(by_model, allowed_V, config, run, spending)
        results.write_figures(run, {"all goals": search.curve})
    yield from _attempts(systems[0], spending, started, judge)


def optimise(
    by_model: Sequence[Sequence[Goal]],
    allowed_V: Tensor,
    config: Config,
    run: Run,
    spending: Spending | None = None,
) -> Search:
    """The finished search over goals, `by_model[m][p]` being goal p on model m."""
    spending = spending or Spending(by_model, config, run)
    search = open_search(by_model, allowed_V, config, run, _generator(run.seed, by_model[0]))
    spending.follow(search)
    grows = config.universal and config.progressive
    for step in run.ticker(range(config.num_steps), total=config.num_steps, label="gcg"):
        if config.early_stop and search.best.is_hit and not grows:
            break
        if not spending.allows_step():
            break
        search.step()
        spending.book(1)
        if (step + 1) % config.check_every == 0 and _checked(search, by_model, spending, grows):
            break
    return search


def open_search(
    by_model: Sequence[Sequence[Goal]],
    allowed_V: Tensor,
    config: Config,
    run: Run,
    generator: torch.Generator,
) -> Search:
    """The search before its first step; progressive ones begin with the first goal on the first model."""
    loss = SlotLoss(
        kind=config.loss,
        alpha=config.mellowmax_alpha,
        target_weight=config.target_weight,
        control_weight=config.control_weight,
    )
    members = [
        Member(SlotScorer(goal.prompt, loss, run, reuse_prefix=config.keep_prefix), model, number)
        for model, goals in enumerate(by_model)
        for number, goal in enumerate(goals)
    ]
    start = initial_ids([member.scorer.prompt for member in members], config.suffix_tokens, config.init)
    search = Search(members, start, allowed_V, config, generator)
    if config.draft:
        search.draft = _draft(search, config, run)
    search.begin(members[:1] if config.universal and config.progressive else members)
    return search


def _generator(seed: int, goals: Sequence[Goal]) -> torch.Generator:
    """Draws that depend on the seed and the goals alone, not on what was searched before."""
    text = repr((seed, [(goal.record.prompt, goal.record.target) for goal in goals]))
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))


def _checked(search: Search, by_model: Sequence[Sequence[Goal]], spending: Spending, grows: bool) -> bool:
    """Look at replies: add a goal, then a model, when all that count succeed; True when the search should stop.

    It also should where the budget does not pay for the look.
    """
    members, config = search.all_members, search.config
    may_stop = config.stop_loss > 0 and search.best.loss < config.stop_loss
    if not (may_stop or (grows and len(search.members) < len(members))):
        return False
    if not spending.allows_replies():
        return True
    ids = search.best.ids if may_stop else search.current
    if not all(_says(by_model[m.model][m.goal], m.goal, ids, spending) for m in search.members):
        return False
    if not grows or len(search.members) == len(members):
        return may_stop
    # Goals join first, on the models that count; then the next model with all goals.
    models = {member.model for member in search.members}
    num_goals = len({member.goal for member in search.members})
    more_goals = num_goals < len(by_model[0])
    search.begin(
        [
            member
            for member in members
            if member.model < len(models) + (not more_goals) and member.goal < num_goals + more_goals
        ]
    )
    spending.book()
    return False


def _says(goal: Goal, number: int, ids: Sequence[int], spending: Spending) -> bool:
    """Whether the reply to the slot succeeds: no refusal prefix, or for a benign goal the target."""
    config, typed = spending.config, results.filled(goal, results.text_of(goal, ids))
    (reply,) = results.replies_to(goal.prompt.system, [typed], config, spending.run)
    spending.book_reply(number, results.num_tokens(reply))
    outcome = Outcome(typed, 0.0, 0.0, reply.text)
    (verdicts,) = results.judge_replies([goal], [outcome], judges.load(results.STRING_RULE))
    return results.succeeded(goal, verdicts, config) is True


def _draft(search: Search, config: Config, run: Run) -> Draft:
    """What ranks candidates: the mean draft loss of the members that count, or the step's gradient."""
    if config.draft == GRADIENT:
        return search.foreseen
    system = search.all_members[0].scorer.prompt.system
    num_layers = num_layers_of(config.draft, system)
    opened = system if num_layers else open_draft(config.draft, system, run)
    search.drafts = [
        Member(SlotScorer(dataclasses.replace(m.scorer.prompt, system=opened), m.scorer.loss, run), 0, m.goal)
        for m in search.all_members
        if m.model == 0
    ]

    def view() -> AbstractContextManager[None]:
        return first_layers(system.model, num_layers) if num_layers else nullcontext()

    def draft(ids_KN: Tensor, current: Sequence[int]) -> Tensor:
        with view():
            counted = {member.goal for member in search.members}
            found = [m.scorer.losses(ids_KN, current).loss_K for m in search.drafts if m.goal in counted]
            return torch.stack(found).mean(0)

    return draft


def _attempts(system: CausalLM, spending: Spending, started: float, judge: Judge) -> Iterator[Attempt]:
    """The string tried on each goal, by a fresh pass, with real replies."""
    search, config, run, goals = spending.search, spending.config, spending.run, spending.goals
    text = results.text_of(goals[0], search.best.ids) if search else ""
    found = results.outcomes(system, goals, text, config, run)
    if search:
        _check(search, found, system, config, run)
    verdicts = results.judge_replies(goals, found, judge)
    wall_s = (time.perf_counter() - started) / len(goals)
    for number, (goal, outcome, verdict) in enumerate(zip(goals, found, verdicts, strict=True)):
        is_held_out = number >= spending.num_searched
        spending.book_reply(number, outcome.tokens)
        cost = {**spending.of_goal(number), "wall_s": wall_s}
        detail: dict[str, Json] = {"suffix": text, "search": config.search}
        if len(goals) > spending.num_searched:
            detail["held_out"] = float(is_held_out)
        if search and not is_held_out:
            detail |= {"loss_curve": search.curve, "steps": search.num_steps, "start_loss": search.curve[0]}
            detail |= {"suffix_ids": search.best.ids}
        yield results.attempt_of(goal, outcome, verdict, config, judge, cost, detail)


def _check(search: Search, found: Sequence[Outcome], system: CausalLM, config: Config, run: Run) -> None:
    """The string gives the loss that was searched, wherever that loss is the plain one on this system."""
    plain = config.loss == "nll" and not config.control_weight and config.filter == "exact"
    if plain and all(member.model == 0 for member in search.members):
        fresh = [config.target_weight * found[member.goal].loss for member in search.members]
        results.check_loss(search.best.loss, fresh, system, run)
