"""The search itself: draw, filter, score, take; and the rules of what is taken. It knows nothing of goals or replies.

K candidates, N positions of the slot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from temper.core.errors import DataError, NumericsError
from temper.methods.attacks.gcg.card import Config
from temper.methods.attacks.gcg.probe import probe_sample
from temper.ops.search import (
    combine_gradients,
    distinct,
    first_order,
    gradient_choices,
    propose,
    random_choices,
)
from temper.ops.search_losses import Scores, SlotScorer
from temper.ops.search_prompt import exact_rows

__all__ = ["GRADIENT", "Best", "Member", "Search", "takes_worse"]

ROUNDS = 8
"""Times that candidates are drawn before giving up."""

GRADIENT = "gradient"
"""The draft that costs no pass: what the step's own gradient foresees for a candidate."""

Draft = Callable[[Tensor, Sequence[int]], Tensor]
"""Draft losses of candidates, given the current slot."""


class Member(NamedTuple):
    """A goal on a model, by their numbers."""

    scorer: SlotScorer
    model: int
    goal: int


class Best(NamedTuple):
    """A slot and its loss; `is_hit` where the whole target was the likeliest continuation."""

    loss: float
    ids: list[int]
    is_hit: bool = False


def takes_worse(rise: float, step: int, num_steps: int, draw: float) -> bool:
    """Whether a slot whose loss is higher by `rise` is taken: draw < exp(-rise / T), T = 1 - (step + 1) / num_steps."""
    temperature = 1 - (step + 1) / num_steps
    return rise <= 0 or (temperature > 0 and draw < math.exp(-rise / temperature))


@dataclass
class Search:
    """One slot under search; `members` are those that count now."""

    all_members: list[Member]
    current: list[int]
    allowed_V: Tensor
    config: Config
    generator: torch.Generator
    draft: Draft | None = None
    drafts: list[Member] = field(default_factory=list)
    """What a draft with passes of its own scores these goals by."""
    grad_NV: Tensor | None = None
    loss: float = math.nan
    best: Best = field(default_factory=lambda: Best(math.inf, []))
    curve: list[float] = field(default_factory=list)
    buffer: list[Best] = field(default_factory=list)
    num_steps: int = 0
    members: list[Member] = field(default_factory=list)

    def begin(self, members: Sequence[Member]) -> None:
        """Let these members count; the loss record starts anew from the current slot."""
        self.members = list(members)
        scores = self.score(torch.tensor([self.current]))
        self.loss = float(scores.loss_K[0])
        self.best = Best(self.loss, list(self.current), bool(scores.hit_K[0]))
        self.buffer = [self.best]
        self.curve.append(self.loss)

    def step(self) -> None:
        """One exchange (Alg. 1). Raises DataError where no candidate survives, NumericsError for a loss of NaN."""
        ids_KN = self.candidates()
        if self.draft is None:
            scores = self.score(ids_KN)
        else:
            draft, current = self.draft, list(self.current)
            probed = probe_sample(
                ids_KN,
                self.score,
                lambda ids: draft(ids, current),
                self.generator,
                self.config.draft_reduction,
            )
            ids_KN, scores = ids_KN[probed.rows], probed.scores
        self.take(ids_KN, scores)
        self.num_steps += 1

    def choices(self) -> Tensor:
        """Ids each position may be exchanged for, (N, C)."""
        if self.config.search == "random":
            return random_choices(len(self.current), self.allowed_V)
        grouped = groupby(sorted(self.members, key=lambda m: m.model), key=lambda m: m.model)
        grads = [[member.scorer.gradient(self.current) for member in group] for _, group in grouped]
        if self.config.draft == GRADIENT:
            self.grad_NV = torch.stack(grads[0]).sum(0)
        return gradient_choices(combine_gradients(grads), self.allowed_V, self.config.topk)

    def foreseen(self, ids_KN: Tensor, current_N: Sequence[int]) -> Tensor:
        """The draft of the gradient: the first model's goals, to first order."""
        assert self.grad_NV is not None
        return first_order(self.grad_NV, ids_KN, current_N)

    def candidates(self) -> Tensor:
        """Candidates that survive the filter, (K, N), at most num_candidates."""
        config, choices_NC = self.config, self.choices()
        seen = {tuple(self.current)}
        kept: list[Tensor] = []
        for _ in range(ROUNDS):
            drawn_KN = propose(
                torch.tensor(self.current),
                choices_NC,
                config.num_candidates,
                self.generator,
                positions=config.positions,
                num_replace=config.num_replace,
            )
            kept.append(self.filtered(drawn_KN, seen))
            num_kept = sum(map(len, kept))
            if num_kept >= config.num_candidates or (num_kept and not config.refill):
                break
        if not num_kept:
            raise DataError(
                f"No candidate of {ROUNDS * config.num_candidates} keeps its tokens when its text is encoded again",
                where=f"step {self.num_steps}",
                cure="Start from another init, allow more (topk, allow_non_ascii), or set filter: off.",
            )
        return torch.cat(kept)[: config.num_candidates]

    def filtered(self, drawn_KN: Tensor, seen: set[tuple[int, ...]]) -> Tensor:
        """Those that are new and whose text gives their ids back in every prompt, also of goals yet to join."""
        if self.config.deduplicate:
            drawn_KN = distinct(drawn_KN, seen)
        else:
            drawn_KN = drawn_KN[(drawn_KN != torch.tensor(self.current)).any(1)]
        if self.config.filter == "off" or not len(drawn_KN):
            return drawn_KN
        return drawn_KN[exact_rows([member.scorer.prompt for member in self.all_members], drawn_KN)]

    def score(self, ids_KN: Tensor) -> Scores:
        """Mean loss over the members, and whether all hit."""
        found = [member.scorer.losses(ids_KN, self.current) for member in self.members]
        loss_K = torch.stack([scores.loss_K for scores in found]).mean(0)
        return Scores(loss_K, torch.stack([scores.hit_K for scores in found]).all(0))

    def take(self, ids_KN: Tensor, scores: Scores) -> None:
        """Make the best candidate the current slot, worse or not, unless annealing or the buffer say otherwise."""
        k = int(scores.loss_K.argmin())
        loss = float(scores.loss_K[k])
        if not math.isfinite(loss):
            raise NumericsError(
                f"The least candidate loss is {loss}",
                where=f"step {self.num_steps}",
                cure="Load the model in float32.",
            )
        found = Best(loss, ids_KN[k].tolist(), bool(scores.hit_K[k]))
        hits = scores.loss_K.masked_fill(~scores.hit_K, torch.inf)
        if self.config.early_stop and not self.best.is_hit and bool(scores.hit_K.any()):
            # Departure 8: what is returned was itself seen to hit.
            k = int(hits.argmin())
            self.best = Best(float(hits[k]), ids_KN[k].tolist(), True)
        elif found.loss < self.best.loss and (
            found.is_hit or not (self.config.early_stop and self.best.is_hit)
        ):
            self.best = found
        self._move(found)
        self.curve.append(self.loss)

    def _move(self, found: Best) -> None:
        if self.config.annealing:
            draw = float(torch.rand((), generator=self.generator))
            if not takes_worse(found.loss - self.loss, self.num_steps, self.config.num_steps, draw):
                return
        if self.config.buffer_size:
            self.buffer = sorted([*self.buffer, found], key=lambda best: best.loss)[: self.config.buffer_size]
            found = self.buffer[0]
        self.current, self.loss = list(found.ids), found.loss
