"""The nouns that cross every module border and need no tensor: messages, rows, attempts, a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from temper.core.budget import Budget

__all__ = ["Attempt", "Json", "Message", "Row", "Run", "Ticker"]

Json = Any
"""A value that JSON can hold."""

T = TypeVar("T")


@dataclass(frozen=True)
class Message:
    """One turn of a dialogue; `role` is "system", "user", "assistant" or "tool".

    `control` names control tokens that follow the content, as ids. Only code sets it; files and
    requests bring text, which never becomes a control id.
    """

    role: str
    content: str
    control: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured number. A method fills the first block; the runner adds the rest in `facts`.

    metric    its name, e.g. "f1"; a name ending in "_s" is seconds, in "_nats" nats
    value     the number; None when it could not be computed, and `note` says why
    n         how many items it rests on
    stderr    its standard error over those items, if known
    item      the item's id when the row is about one item (claims pair on it)
    arm       the condition compared ("" outside an experiment)
    split     the part of the data, e.g. "test"
    group     a category within the split
    higher_is_better  None where neither is
    facts     method, settings hash, system + fingerprint, data fingerprint, seed, judge + revision,
              generation settings, template hash, dtype, batch, device, wall_s, commit, exact
    """

    metric: str
    value: float | None
    n: int = 1
    stderr: float | None = None
    item: str | None = None
    arm: str = ""
    split: str = ""
    group: str = ""
    higher_is_better: bool | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""
    facts: Mapping[str, Json] = field(default_factory=dict)

    def noted(self, note: str) -> Row:
        """The row with a further note; "" adds none."""
        return replace(self, note="; ".join(filter(None, (self.note, note))))


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attacked input, the reply, what it cost, and what was thought of it.

    success   True, False, or None when no judge could say
    cost      "queries", "tokens", "wall_s", and whatever else the attack counts
    """

    goal: str
    attack: str
    input: str
    reply: str
    success: bool | None
    cost: Mapping[str, float]
    judge: str = ""
    detail: Mapping[str, Json] = field(default_factory=dict)


class Ticker(Protocol):
    """Shows progress; the runner gives a bar on a terminal and silence elsewhere."""

    def __call__(self, items: Iterable[T], *, total: int | None = None, label: str = "") -> Iterator[T]: ...


def _silent(items: Iterable[T], *, total: int | None = None, label: str = "") -> Iterator[T]:
    yield from items


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that a verb may know of where it runs; seed, device and dtype are decided once, here.

    folder      the verb's own folder, or None (nothing is written: a plain Python call)
    resume      go on from `folder/checkpoint` if it is there
    precision   "float32", or "bf16" for autocast where the processor has it natively
    exact       batch size must change nothing (float32, CPU)
    num_procs   processes of this training (>1 under Accelerate)
    """

    seed: int = 0
    folder: Path | None = None
    resume: bool = False
    device: str = "cpu"
    precision: Literal["float32", "bf16"] = "float32"
    exact: bool = False
    batch_tokens: int = 4096
    """Token budget of one forward pass."""
    num_procs: int = 1
    checkpoint_every: int = 0
    """Optimiser steps between checkpoints; 0 = none."""
    budget: Budget = field(default_factory=Budget, compare=False)
    """What the verb may spend, and the meter of what it has."""
    ticker: Ticker = _silent

    @property
    def checkpoint(self) -> Path | None:
        """Where training state lives, or None without a folder."""
        return self.folder / "checkpoint" if self.folder else None
