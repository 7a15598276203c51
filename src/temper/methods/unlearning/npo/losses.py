"""The family of losses as pure functions of log-probabilities, and the tables that name them.

Every function returns a sum; what it is divided by (rows or tokens) stands in its table entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from temper.methods.unlearning.npo.card import Config, loss_parts

__all__ = [
    "FORGET",
    "TERMS",
    "Answers",
    "ForgetLoss",
    "Loss",
    "Term",
    "dpo_loss",
    "ga_loss",
    "kl_divergence",
    "kto_loss",
    "nll",
    "npo_loss",
    "npo_weight",
    "parse",
    "simnpo_loss",
]


def nll(logp_B: Tensor) -> Tensor:
    """Cross-entropy of the answers: minus their log-probability."""
    return -logp_B.sum()


def ga_loss(logp_B: Tensor) -> Tensor:
    """Gradient ascent: minus the cross-entropy. No lower bound."""
    return logp_B.sum()


def npo_loss(logp_B: Tensor, ref_B: Tensor, beta: float) -> Tensor:
    """NPO (Eq. 3) from summed log-probabilities in nats."""
    return -2 / beta * F.logsigmoid(-beta * (logp_B - ref_B)).sum()


def npo_weight(logp_B: Tensor, ref_B: Tensor, beta: float) -> Tensor:
    """W_i: NPO's gradient over gradient ascent's, for each answer; 2 pi^beta / (pi^beta + pi_ref^beta)."""
    return 2 * torch.sigmoid(beta * (logp_B - ref_B))


def simnpo_loss(logp_B: Tensor, num_tokens_B: Tensor, beta: float, delta: float) -> Tensor:
    """SimNPO: the answer's own mean cross-entropy in the place of the reference."""
    return -2 / beta * F.logsigmoid(beta * (-logp_B / num_tokens_B - delta)).sum()


def dpo_loss(idk_B: Tensor, idk_ref_B: Tensor, logp_B: Tensor, ref_B: Tensor, beta: float) -> Tensor:
    """DPO with "I don't know" as the winner, scaled by 2 / beta as NPO is."""
    return -2 / beta * F.logsigmoid(beta * ((idk_B - idk_ref_B) - (logp_B - ref_B))).sum()


def kto_loss(idk_B: Tensor, idk_ref_B: Tensor, logp_B: Tensor, ref_B: Tensor, beta: float) -> Tensor:
    """KTO's value of undesired answers; the step's mean log-ratio of the "I don't know" replies is its reference point."""
    point = (idk_B - idk_ref_B).mean().detach()
    # Departure 6: 1 stands inside the mean.
    return 2 / beta * (1 - torch.sigmoid(point - beta * (logp_B - ref_B))).sum()


def kl_divergence(ref_SV: Tensor, logp_SV: Tensor) -> Tensor:
    """KL(pi_ref || pi) summed over positions, from log-probabilities."""
    return F.kl_div(logp_SV, ref_SV, reduction="sum", log_target=True)


class Answers(NamedTuple):
    """Summed log-probabilities of a step's answers, those of the reference, and the answers' lengths."""

    logp_B: Tensor
    ref_B: Tensor
    num_tokens_B: Tensor


@dataclass(frozen=True)
class ForgetLoss:
    """One entry of the table: the sum, the answers it reads, and what the sum is divided by."""

    total: Callable[[Mapping[str, Answers], Config], Tensor]
    reads: tuple[str, ...] = ("forget",)
    per: Literal["rows", "tokens"] = "rows"
    """Tokens are those of the first part it reads."""
    uses_reference: bool = False
    whole_step: bool = False
    """It compares the rows of a step, which then cannot be split."""


@dataclass(frozen=True)
class Term:
    """A further term: the rows it reads, and whether it takes answers or the distributions at all positions."""

    part: Literal["retain", "forget"]
    divergence: bool


FORGET: dict[str, ForgetLoss] = {
    "ga": ForgetLoss(lambda a, c: ga_loss(a["forget"].logp_B), per="tokens"),
    "npo": ForgetLoss(
        lambda a, c: npo_loss(a["forget"].logp_B, a["forget"].ref_B, c.beta), uses_reference=True
    ),
    "simnpo": ForgetLoss(
        lambda a, c: simnpo_loss(a["forget"].logp_B, a["forget"].num_tokens_B, c.beta, c.delta)
    ),
    "dpo": ForgetLoss(
        lambda a, c: dpo_loss(*a["idk"][:2], *a["forget"][:2], c.beta),
        reads=("forget", "idk"),
        uses_reference=True,
    ),
    "kto": ForgetLoss(
        lambda a, c: kto_loss(*a["idk"][:2], *a["forget"][:2], c.beta),
        reads=("forget", "idk"),
        uses_reference=True,
        whole_step=True,
    ),
    "idk": ForgetLoss(lambda a, c: nll(a["idk"].logp_B), reads=("idk",), per="tokens"),
}

TERMS: dict[str, Term] = {
    "rt": Term("retain", divergence=False),
    "kl": Term("retain", divergence=True),
    "fkl": Term("forget", divergence=True),
}


class Loss(NamedTuple):
    """A loss by its parts, as the tables have them."""

    name: str
    forget: ForgetLoss
    terms: Mapping[str, Term]

    @property
    def needs_retain(self) -> bool:
        return any(term.part == "retain" for term in self.terms.values())

    @property
    def answers(self) -> tuple[str, ...]:
        """Parts whose answers are scored in a step."""
        kept = {term.part for term in self.terms.values() if not term.divergence}
        return (*self.forget.reads, *sorted(kept - set(self.forget.reads)))


def parse(name: str) -> Loss:
    """The loss of a name such as "npo+rt"."""
    forget, terms = loss_parts(name)
    return Loss(name, FORGET[forget], {term: TERMS[term] for term in terms})
