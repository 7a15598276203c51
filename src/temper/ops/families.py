"""Scored rows read end to end, what a family of rows begins with read once: one pass, no padding, for models that pack.

A family is rows that agree in their first tokens. N counts rows, S scored tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from temper.ops.batching import Example
from temper.ops.packed import pack
from temper.ops.projection import LEAST_SHARED, head_of, packed_hidden, token_logprobs

__all__ = ["Family", "families", "score_families"]


class Family(NamedTuple):
    """Rows whose first `num_shared` tokens are the same and asked for nothing; `places` are theirs in the caller's order."""

    rows: list[Example]
    num_shared: int
    places: list[int]

    @property
    def num_tokens(self) -> int:
        """Tokens that are read; nothing is asked of a row's last."""
        return self.num_shared + sum(len(row.ids) - 1 - self.num_shared for row in self.rows)


def families(examples: Sequence[Example], budget: int) -> list[Family]:
    """Every row in one family: sorted by their ids, neighbours join while that saves tokens and no more than `budget` are read."""
    found: list[Family] = []
    for place in sorted(range(len(examples)), key=lambda place: examples[place].ids):
        row = examples[place]
        most = row.scored.index(True) - 1
        if found:
            rows, shared, places = found[-1]
            alike = _agreement(rows[0].ids, row.ids, min(shared, most))
            saves = alike >= LEAST_SHARED and len(rows) * alike >= (len(rows) - 1) * shared
            joined = Family([*rows, row], alike, [*places, place])
            if saves and joined.num_tokens <= budget:
                found[-1] = joined
                continue
        found.append(Family([row], most, [place]))
    return found


def _agreement(one: Sequence[int], other: Sequence[int], most: int) -> int:
    """How many first tokens are the same, `most` at most."""
    return next((n for n in range(most) if one[n] != other[n]), most)


def score_families(model: nn.Module, given: Sequence[Family]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of all scored tokens, (S,), float32, and the row in the caller's order of each.

    Equals scoring each row alone, gradients included; for a model that `can_pack` and whose `head_is_plain`.
    """
    device = next(model.parameters()).device
    lines, at, target, row_of = [], [], [], []
    for rows, shared, places in given:
        lines.append([rows[0].ids[:shared], *(row.ids[shared:-1] for row in rows)])
        at += [False] * shared
        for row, place in zip(rows, places, strict=True):
            # A token at t is predicted at t - 1.
            scored = row.scored[shared + 1 :]
            at += scored
            target += [token for token, wanted in zip(row.ids[shared + 1 :], scored, strict=True) if wanted]
            row_of += [place] * sum(scored)
    hidden_SD, num_ids = packed_hidden(model, pack(lines, device), torch.tensor([at], device=device))
    logp_S = token_logprobs(head_of(model), hidden_SD, torch.tensor(target, device=device), num_ids)
    return logp_S, torch.tensor(row_of, device=device)
