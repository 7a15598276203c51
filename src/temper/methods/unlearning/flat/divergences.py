"""The f-divergences as one table of pure functions of probabilities, and the loss they make.

P_e and P_f are mean token probabilities, in [0, 1]. Here v is such a probability and u = g(v).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from temper.ops.logprobs import Scored

__all__ = ["DIVERGENCES", "DivergencePair", "flat_loss", "mean_probabilities"]

Function = Callable[[Tensor], Tensor]
LOG_2 = math.log(2)


class DivergencePair(NamedTuple):
    """An activation g, the convex conjugate h of its divergence, and h(g(v)) in closed form."""

    activation: Function
    conjugate: Function
    composed: Function


def _series(v: Tensor) -> Tensor:
    return v + v**2 / 4 + v**3 / 16


DIVERGENCES: dict[str, DivergencePair] = {
    "tv": DivergencePair(lambda v: v.tanh() / 2, lambda u: u, lambda v: v.tanh() / 2),
    "kl": DivergencePair(lambda v: v, lambda u: (u - 1).exp(), lambda v: (v - 1).exp()),
    "js": DivergencePair(
        lambda v: LOG_2 - F.softplus(-v), lambda u: -(2 - u.exp()).log(), lambda v: v + F.softplus(-v) - LOG_2
    ),
    "pearson": DivergencePair(lambda v: v, lambda u: u**2 / 4 + u, lambda v: v**2 / 4 + v),
    # Departure 1: e^-v in these three.
    "reverse-kl": DivergencePair(lambda v: -(-v).exp(), lambda u: -1 - (-u).log(), lambda v: v - 1),
    "hellinger": DivergencePair(lambda v: 1 - (-v).exp(), lambda u: u / (1 - u), lambda v: v.exp() - 1),
    "neyman": DivergencePair(
        lambda v: 1 - (-v).exp(), lambda u: 2 - 2 * (1 - u).sqrt(), lambda v: 2 - 2 * (-v / 2).exp()
    ),
    "jeffrey": DivergencePair(lambda v: v, _series, _series),
}


def flat_loss(template_B: Tensor, forget_B: Tensor, divergence: str) -> Tensor:
    """-g(P_e) + h(g(P_f)) of each row, (B,), from mean token probabilities.

    They must lie in [0, 1]: log-probabilities leave the domains of g and h, without a sign of it in the loss.
    """
    for values in (template_B, forget_B):
        inside = (values >= 0) & (values <= 1 + 1e-5)
        assert bool(inside.all()), "P is a mean of probabilities, not of log-probabilities"
    pair = DIVERGENCES[divergence]
    return pair.composed(forget_B) - pair.activation(template_B)


def mean_probabilities(scored: Scored) -> Tensor:
    """Mean probability of each row's scored tokens, (B,), with gradient (Departure 3: over the row's own tokens)."""
    zeros = scored.logp_S.new_zeros(scored.num_rows)
    total_B = zeros.index_add(0, scored.row_S, scored.logp_S.exp())
    return total_B / torch.bincount(scored.row_S, minlength=scored.num_rows)
