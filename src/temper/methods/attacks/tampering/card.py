"""Tampering: what an owner of the weights does to undo a fit, as artefacts with a stated budget.

Paper         No single one. Relearning on part of the forgotten rows: Eight Methods to Evaluate Robust Unlearning in LLMs,
              Lynch et al. 2024, https://arxiv.org/abs/2402.16835. Quantisation: Catastrophic Failure of LLM Unlearning via
              Quantization, Zhang et al., ICLR 2025, https://arxiv.org/abs/2410.16454. Pruning by size: Han et al. 2015.
              Prefilled replies: Jailbreaking Leading Safety-Aligned LLMs with Simple Adaptive Attacks, Andriushchenko et
              al., ICLR 2025, https://arxiv.org/abs/2404.02151; by the first tokens of a known answer: Safety Alignment
              Should Be Made More Than Just a Few Tokens Deep, Qi et al., ICLR 2025, https://arxiv.org/abs/2406.05946.
What you get  An artefact that stands on a fitted system like any other: `base+mine+tampered` is the model after the attack.
              Any measure then says what came back, and the same attack on the plain base says what it would have had anyway.
              `against:` in a recipe does both for every fit.

Idea          A behaviour that a few gradient steps, a coarser number format or a little pruning bring back was hidden, not
              gone. All are what people do to open weights every day, so they belong to the ordinary test. A reply that somebody
              else began needs no weights at all: many interfaces let one write its first words.

Maths         finetune   minimise the token-mean cross-entropy of the replies of a random `share` of the given rows for
                         `num_steps` steps of AdamW, by a LoRA adapter or all weights
              quantise   w' = s round(w / s), s = max |w| / (2^(bits - 1) - 1) over each row of a matrix, or over each
                         `group_size` neighbours of a row; `dynamic`: the same for x, 8 bits, s from each token's own inputs
              prune      w' = 0 where |w| is among the smallest `sparsity` of its matrix, else w
              prefill    p(y | x) becomes p(y | x, z): z stands where the reply begins, before the model writes. z is
                         `opening`, or for each given row the first `known_tokens` tokens of its own answer

Departures    1. Quantisation rounds the weights, with `dynamic` also what enters each layer, and computes on in the model's own
                 dtype: what the numbers can hold, not how a kernel multiplies them.
              2. Only linear layers are rounded and pruned; embeddings and the vocabulary projection stay.
              3. z is context and no part of the reply: judges and ROUGE see what the model adds, probabilities are those of
                 the answer's rest. An answer that does not begin with z is scored whole, behind it. With `known_tokens`
                 only the given prompts are prefilled.

Limits        Budgets compare within a kind, not across: steps, bits and shares have no common unit. Attacks that search for
              inputs (gcg) are methods of their own. What these attacks undo is a matter of the fit: the claims are about one.
Reference code  None followed; the formulas are textbook.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from temper.core.card import Card, Claim

__all__ = ["CARD", "Config"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What the attacker does and may spend."""

    how: Literal["finetune", "quantise", "prune", "prefill"] = "finetune"
    """Train on the given rows, round the weights, set small ones to 0, or begin the replies."""
    num_steps: int = 20
    """Optimiser steps of finetune."""
    share: float = 1.0
    """Part of the given rows that the attacker holds, drawn by the seed."""
    lr: float = 2e-4
    """Learning rate of finetune, constant."""
    batch_rows: int = 4
    """Rows of a step."""
    mode: Literal["lora", "full"] = "lora"
    """Train an adapter or all weights."""
    rank: int = 16
    """Rank of the adapter."""
    max_tokens: int = 256
    """Longest row of finetune."""
    bits: int = 4
    """Bits of a weight after quantise."""
    group_size: int = 32
    """Neighbours of a row that share a scale in quantise; 0 = the whole row, as int8 is stored."""
    dynamic: bool = False
    """Quantise: round each token's inputs of these layers to 8 bits too, as dynamic int8 does."""
    sparsity: float = 0.2
    """Share of each matrix that prune sets to 0."""
    opening: str = "Sure, here is the answer:"
    """How prefill begins every reply."""
    known_tokens: int = 0
    """Prefill: begin the replies to the given rows' prompts with so many tokens of their own answers instead; 0 = off."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_rows", "rank", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.known_tokens < 0 or not (self.known_tokens or self.opening):
            raise ValueError("prefill needs an opening, or known_tokens above 0")
        if self.dynamic and self.how != "quantise":
            raise ValueError(f"dynamic rounds what quantised layers read; how is {self.how}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share is a part of the rows, above 0 and at most 1, not {self.share}")


CARD = Card(
    title="Tampering: relearning, quantisation, pruning, prefilled replies",
    paper="arXiv:2402.16835",
    verbs=("fit",),
    config=Config,
    needs=frozenset({"grads"}),
    data={"fit": {"train?": "Dialogue"}},
    produces=("adapter", "weights", "steer"),
    claims=(
        Claim(
            id="relearning-brings-back",
            sentence="After NPO with a retain term, twenty steps on a quarter of the forgotten rows make the "
            "other forgotten answers more probable.",
            metric="forget_probability",
            arm="relearn",
            baseline="unlearned",
            direction="higher",
            paper="relearning on a part restores what unlearning took (Lynch et al., figures)",
        ),
        Claim(
            id="other-data-brings-back",
            sentence="So do twenty steps on facts about other people.",
            metric="forget_probability",
            arm="other_data",
            baseline="unlearned",
            direction="higher",
            paper="no figure followed; asked because anybody may go on training",
        ),
        Claim(
            id="four-bits-bring-back",
            sentence="After NPO with a retain term, weights of four bits make the forgotten answers more probable.",
            metric="forget_probability",
            arm="4-bit",
            baseline="unlearned",
            direction="higher",
            paper="21 % of the knowledge is left in full precision and 83 % in four bits on average (Zhang et al., abstract)",
        ),
    ),
)
