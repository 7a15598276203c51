"""Drafts checked by a second model: one model writes a block, another reads it at once and takes back what only the first likes.

A drafted token is suspicious where the drafting model finds it `alpha` times as likely as the reference does. What comes
before the first suspicious token stays; the reference writes one token in its place, and drafting goes on behind that.
The reply is the same for every block length, which decides the time alone: a token depends on the text before it and,
when drawn, on uniforms of its own place. Every token is checked, also those of a block that an end token, a stop text or
the length limit cuts short.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from temper.core.errors import ModelError, NumericsError
from temper.core.types import Json
from temper.ops.decode_backends import Backend, Prefilled, PromptRow
from temper.ops.decoding import Loop, RowState
from temper.ops.projection import gather_logprobs
from temper.ops.sampling import choose_tokens, row_uniforms
from temper.systems.causal_lm import CausalLM

__all__ = [
    "CheckedLoop",
    "PairBackend",
    "ReferenceCheck",
    "first_suspicious",
    "fit_width",
    "require_same_vocabulary",
]

UNKNOWN_NATS = -1e4
"""Log-probability of an id beyond a model's vocabulary rows: below any real one, and still a number in JSON."""


@dataclass(eq=False)
class ReferenceCheck:
    """A step rule that makes `generate` draft and check; alone it changes no logits, for tokens have to be taken back.

    A row's state tells `replaced` (places in the reply, from 0), `suspicion_nats` (log p - log q of every place's drafted
    token), `num_drafted` tokens and `num_checks`, the reference's forward passes.
    """

    name: str
    reference: CausalLM
    alpha: float
    block: int = 4

    def start(self, prompt_ids: list[int]) -> dict[str, Json]:
        """Nothing drafted yet."""
        return {"replaced": [], "suspicion_nats": [], "num_drafted": 0, "num_checks": 0}

    def __call__(self, logits_BV: Tensor, position_B: list[int], states: list[dict[str, Json]]) -> Tensor:
        """The logits as they are."""
        return logits_BV


def first_suspicious(suspicion_nats: Sequence[float], alpha: float) -> int | None:
    """The first place where log p - log q reaches log(alpha), or None."""
    limit = math.log(alpha)
    return next((n for n, score in enumerate(suspicion_nats) if score >= limit), None)


def fit_width(logits_TV: Tensor, width: int) -> Tensor:
    """Log-probabilities over the first `width` ids; an id that the model has no row for gets next to none."""
    logp_TV = logits_TV.float().log_softmax(-1)[:, :width]
    return torch.nn.functional.pad(logp_TV, (0, width - logp_TV.shape[-1]), value=UNKNOWN_NATS)


def require_same_vocabulary(system: CausalLM, reference: CausalLM) -> None:
    """Raise ModelError, naming a token, unless both tokenizers give every token the same id.

    The models' matrices may have rows beyond it.
    """
    ours, theirs = system.tokenizer.get_vocab(), reference.tokenizer.get_vocab()
    if ours == theirs:
        return
    token = min(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    raise ModelError(
        f"The reference model has another vocabulary: {token!r} is id {theirs.get(token)} there and {ours.get(token)} here",
        where=f"{system.spec or 'system'} ({len(ours)} tokens), reference {reference.spec} ({len(theirs)} tokens)",
        cure="Use a reference of the same model family, with the same tokenizer.",
    )


@dataclass(frozen=True)
class PairBackend:
    """The drafting model's rows, and the same rows as the reference reads them."""

    draft: Backend
    reference: Backend

    def prefill(self, prompts: Sequence[PromptRow]) -> list[Prefilled]:
        """Both models read the prompts; the logits are the drafting model's."""
        pairs = zip(self.draft.prefill(prompts), self.reference.prefill(prompts), strict=True)
        return [Prefilled(own.prompt, (own, other), 0, own.logits_V) for own, other in pairs]

    def load(self, slot: int, prefilled: Prefilled) -> None:
        """A row in the same slot of both."""
        own, other = prefilled.cache
        self.draft.load(slot, own)
        self.reference.load(slot, other)

    def step(self, prompts: list[PromptRow], tokens: list[int], positions: list[int]) -> Tensor:
        """The drafting model's logits."""
        return self.draft.step(prompts, tokens, positions)

    def block(self, prompts: list[PromptRow], blocks: list[list[int]], starts: list[int]) -> list[Tensor]:
        """The reference's logits."""
        return self.reference.block(prompts, blocks, starts)

    def drop(self, slot: int, last: int, last_length: int) -> None:
        """Forget a row of both."""
        self.draft.drop(slot, last, last_length)
        self.reference.drop(slot, last, last_length)


@dataclass
class _Draft:
    """The unchecked end of a row: from reply token `start` on, the log-probability of each token when it was drafted."""

    row: RowState
    start: int
    logp: list[float] = field(default_factory=list)
    states: list[list[dict[str, Json]]] = field(default_factory=list)
    """What the other rules' states were after each token."""


class CheckedLoop:
    """`Loop` in blocks: a step drafts up to a block for every row and checks all of them in one pass of the reference."""

    def __init__(self, loop: Loop, check: ReferenceCheck) -> None:
        self.loop, self.check = loop, check
        self.own = next(number for number, rule in enumerate(loop.rules) if rule is check)
        self.drafts: dict[int, _Draft] = {}
        self.num_ids = 0

    @property
    def backend(self) -> Backend:
        """A `PairBackend`."""
        return self.loop.backend

    @property
    def active(self) -> list[RowState]:
        """The rows under way."""
        return self.loop.active

    def start(self, prefilled: Prefilled, sample: int, limit: int) -> RowState:
        """A row with uniforms for what is drafted, as without a check, and behind them for what replaces it."""
        row = self.loop.start(prefilled, sample, limit)
        if row.uniforms is not None:
            row.uniforms = row_uniforms(self.loop.sampling.seed, row.prompt.number, sample, 2 * limit)
        return row

    def advance(self, rows: list[RowState], logits_BV: Tensor) -> None:
        """Draft the next token of each row."""
        drafts = [self.drafts.setdefault(id(row), _Draft(row, len(row.ids))) for row in rows]
        self.loop.advance(rows, logits_BV)
        self.num_ids = logits_BV.shape[-1]
        token_B = torch.tensor([row.ids[-1] for row in rows], device=logits_BV.device)
        for draft, logp in zip(drafts, gather_logprobs(logits_BV, token_B).tolist(), strict=True):
            draft.logp.append(logp)
            others = enumerate(draft.row.states)
            draft.states.append([{} if n == self.own else copy.deepcopy(state) for n, state in others])

    def step(self) -> None:
        """A block for every row, checked."""
        while writing := [n for n, row in enumerate(self.active) if self._writes(row)]:
            # A row that waits for the others reads its last token again.
            logits_BV = self.loop.next_logits()
            self.advance([self.active[n] for n in writing], logits_BV[writing])
        self._check()

    def release(self) -> Iterator[RowState]:
        """Rows whose end is checked; one that ended in its first token waits for that."""
        if not self.drafts:
            yield from self.loop.release()

    def _writes(self, row: RowState) -> bool:
        draft = self.drafts.get(id(row))
        return not row.finish and (draft is None or len(draft.logp) < self.check.block)

    def _check(self) -> None:
        rows = self.active
        drafts = [self.drafts[id(row)] for row in rows]
        # What the reference says after the last settled token is about the first drafted one, and so on.
        starts = [len(row.prompt.ids) + draft.start - 1 for row, draft in zip(rows, drafts, strict=True)]
        blocks = [[*row.prompt.ids, *row.ids][start:-1] for row, start in zip(rows, starts, strict=True)]
        found = self.backend.block([row.prompt for row in rows], blocks, starts)
        for draft, logits_TV in zip(drafts, found, strict=True):
            self._settle(draft, logits_TV)
        self.drafts = {}

    def _settle(self, draft: _Draft, logits_TV: Tensor) -> None:
        """Keep the block, or what comes before its first suspicious token with the reference's own behind it."""
        row, state = draft.row, draft.row.states[self.own]
        drafted = row.ids[draft.start :]
        logq_TV = fit_width(logits_TV, self.num_ids)
        scores = _suspicion(draft, logq_TV[range(len(drafted)), drafted].tolist())
        at = first_suspicious(scores, self.check.alpha)
        state["num_checks"] += 1
        state["num_drafted"] += len(drafted)
        state["suspicion_nats"] += scores if at is None else scores[: at + 1]
        if at is None:
            return
        place = draft.start + at
        uniform_B = None if row.uniforms is None else row.uniforms[row.limit + place][None]
        # An id beyond the drafting model's rows is padding, which it could not read.
        token = choose_tokens(logits_TV[at][None, : self.num_ids], self.loop.sampling, uniform_B)
        row.ids[place:] = token.tolist()
        row.states = [
            now if n == self.own else then
            for n, (now, then) in enumerate(zip(row.states, draft.states[at], strict=True))
        ]
        state["replaced"].append(place)
        self.loop.mark(row)


def _suspicion(draft: _Draft, logq: list[float]) -> list[float]:
    scores = [p - q for p, q in zip(draft.logp, logq, strict=True)]
    if any(math.isnan(score) for score in scores):
        raise NumericsError(
            "The reference's logits are not numbers",
            where=f"prompt {draft.row.prompt.number}, reply token {draft.start}",
            cure="Check its weights, or use float32.",
        )
    return scores
