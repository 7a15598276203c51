"""The generation loop: prompts in, finished rows out, one backend or the other beneath.

Prompts are prefilled in length-sorted groups, longest first. Up to `width` rows decode together;
a row that ends leaves at once and the next waiting one takes its place. Samples of one prompt
share its prefill. One transfer from the device a step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from temper.core.errors import NumericsError
from temper.core.types import Json
from temper.ops.decode_backends import Backend, Prefilled, PromptRow
from temper.ops.sampling import choose_tokens, row_uniforms
from temper.systems.base import Sampling, StepRule

__all__ = ["Decoding", "Loop", "RowState", "Stops", "decode", "prefill_groups"]


@dataclass
class RowState:
    """One reply being written: `sample` counts the replies to the same prompt."""

    prompt: PromptRow
    sample: int
    limit: int
    uniforms: Tensor | None
    states: list[dict[str, Json]]
    ids: list[int] = field(default_factory=list)
    finish: str = ""

    @property
    def length(self) -> int:
        return len(self.prompt.ids) + len(self.ids)


@dataclass(frozen=True)
class Stops:
    """When a row ends: an end token, or a stop string in its decoded tail."""

    end_ids: frozenset[int]
    strings: tuple[str, ...]
    decode: Callable[[list[int]], str]

    def hit(self, ids: list[int]) -> bool:
        """Whether the last token of `ids` ends the row."""
        if ids[-1] in self.end_ids:
            return True
        if not self.strings:
            return False
        # A token holds at least one byte and a character at most four.
        window = 4 * max(len(s.encode()) for s in self.strings) + 8
        tail = self.decode(ids[-window:])
        return any(string in tail for string in self.strings)


ENOUGH_TOKENS = 256
"""A forward pass of so many tokens runs at the speed of a larger one."""
MAX_WASTE = 0.1
"""Share of padding that ends a group which is large enough."""


def prefill_groups(prompts: Sequence[PromptRow], budget: int, shared: int) -> deque[list[PromptRow]]:
    """Prompts longest first, cut into groups of similar length, each at most `budget` tokens with padding.

    A prompt longer than the budget is a group of its own. `shared` leading tokens of every prompt
    cost nothing.
    """
    groups: deque[list[PromptRow]] = deque()
    widest = real = 0
    for prompt in sorted(prompts, key=lambda p: (-len(p.ids), p.number)):
        own = len(prompt.ids) - shared
        count = len(groups[-1]) if groups else 0
        padded = widest * (count + 1)
        wasteful = widest * count >= ENOUGH_TOKENS and padded - real - own > MAX_WASTE * padded
        if not groups or padded > budget or wasteful:
            groups.append([])
            widest, real = own, 0
        groups[-1].append(prompt)
        real += own
    return groups


@dataclass
class Loop:
    """The rows decoding now; row i is row i of the backend."""

    backend: Backend
    rules: Sequence[StepRule]
    sampling: Sampling
    stops: Stops
    active: list[RowState] = field(default_factory=list)

    def start(self, prefilled: Prefilled, sample: int, limit: int) -> RowState:
        prompt, sampling = prefilled.prompt, self.sampling
        drawn = sampling.temperature > 0
        uniforms = row_uniforms(sampling.seed, prompt.number, sample, limit) if drawn else None
        states = [rule.start(prompt.ids) for rule in self.rules]
        row = RowState(prompt, sample, limit, uniforms, states)
        self.backend.load(len(self.active), prefilled)
        self.active.append(row)
        return row

    def step(self) -> None:
        """One more token for every active row."""
        self.advance(self.active, self.next_logits())

    def next_logits(self) -> Tensor:
        """Logits after the last token of every active row, (B, V)."""
        rows = self.active
        return self.backend.step(
            [row.prompt for row in rows], [row.ids[-1] for row in rows], [row.length - 1 for row in rows]
        )

    def advance(self, rows: list[RowState], logits_BV: Tensor) -> None:
        """Append the next token of each row, chosen from its logits, and mark rows that end."""
        positions = [len(row.ids) for row in rows]
        for number, rule in enumerate(self.rules):
            logits_BV = rule(logits_BV, positions, [row.states[number] for row in rows])
        uniform_B = None
        if self.sampling.temperature > 0:
            uniform_B = torch.stack([row.uniforms[len(row.ids)] for row in rows if row.uniforms is not None])
        token_B = choose_tokens(logits_BV, self.sampling, uniform_B)
        top_B = logits_BV.gather(1, token_B[:, None])[:, 0]
        for row, (token, broken) in zip(
            rows, torch.stack([token_B, top_B.isnan().long()], 1).tolist(), strict=True
        ):
            if broken:
                raise NumericsError(
                    "Logits are not numbers",
                    where=f"prompt {row.prompt.number}, reply token {len(row.ids)}",
                    cure="Check the weights, a steering strength, or use float32.",
                )
            row.ids.append(token)
            self.mark(row)

    def mark(self, row: RowState) -> None:
        """Say whether the row ends with its last token, and why."""
        if self.stops.hit(row.ids):
            row.finish = "stop"
        else:
            row.finish = "length" if len(row.ids) >= row.limit else ""

    def release(self) -> Iterator[RowState]:
        """Take finished rows out of the batch; the last row moves into each hole."""
        for slot in range(len(self.active) - 1, -1, -1):
            row = self.active[slot]
            if not row.finish:
                continue
            last = self.active[-1]
            self.backend.drop(slot, len(self.active) - 1, last.length)
            self.active[slot] = last
            self.active.pop()
            yield row


class Decoding(Protocol):
    """What `decode` drives: rows start, get their first token, step on together, and leave when they are done."""

    @property
    def active(self) -> list[RowState]: ...
    @property
    def backend(self) -> Backend: ...
    def start(self, prefilled: Prefilled, sample: int, limit: int) -> RowState: ...
    def advance(self, rows: list[RowState], logits_BV: Tensor) -> None: ...
    def step(self) -> None: ...
    def release(self) -> Iterator[RowState]: ...


def decode(
    loop: Decoding,
    groups: deque[list[PromptRow]],
    *,
    width: int,
    num_samples: int,
    limit_of: Callable[[PromptRow], int],
) -> Iterator[RowState]:
    """Rows as they finish, `num_samples` a prompt."""
    ready: deque[tuple[Prefilled, int]] = deque()
    while groups or ready or loop.active:
        fresh, logits = [], []
        while len(loop.active) < width and (ready or groups):
            if not ready:
                ready.extend(
                    (done, n) for done in loop.backend.prefill(groups.popleft()) for n in range(num_samples)
                )
            prefilled, sample = ready.popleft()
            fresh.append(loop.start(prefilled, sample, limit_of(prefilled.prompt)))
            logits.append(prefilled.logits_V)
        if fresh:
            loop.advance(fresh, torch.stack(logits))
        elif loop.active:
            loop.step()
        yield from loop.release()
