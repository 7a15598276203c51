"""Unlearning watched on its way: how long it trains, what it kept when it had forgotten so much, and curves of both.

Losses forget at different speeds. Compared at one step, or at their last one, speed and damage are mixed; compared at
the same forget probability only the damage is left. Probabilities here are an answer's, per token: e^(mean log p).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

from temper.core.types import Row, Run
from temper.ops.batching import Example
from temper.ops.logprobs import response_logprobs
from temper.ops.optim import Schedule
from temper.ops.tofu_metrics import mean_row
from temper.ops.train_settings import TrainLog, TrainSettings

if TYPE_CHECKING:
    from temper.systems.causal_lm import CausalLM

__all__ = [
    "Look",
    "UnlearnConfig",
    "Watch",
    "at_level",
    "curve_figures",
    "item_rows",
    "level_rows",
    "num_steps",
    "train_settings",
    "way_rows",
]

Look = Mapping[str, float]
"""Probabilities at one step: the mean of a part under its name, its single rows under PART/NUMBER."""


class UnlearnConfig(Protocol):
    """The settings of an unlearning run that decide its length and its learning rate."""

    @property
    def lr(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def batch_rows(self) -> int: ...
    @property
    def num_epochs(self) -> float: ...
    @property
    def min_steps(self) -> int: ...
    @property
    def max_steps(self) -> int: ...
    @property
    def warmup_epochs(self) -> float: ...
    @property
    def schedule(self) -> Schedule: ...
    @property
    def clip_norm(self) -> float: ...


def num_steps(num_rows: int, config: UnlearnConfig) -> int:
    """Optimiser steps: the epochs', at least `min_steps`, at most `max_steps` where that is not 0."""
    steps = math.ceil(config.num_epochs * math.ceil(num_rows / config.batch_rows))
    steps = max(steps, config.min_steps)
    return min(steps, config.max_steps) if config.max_steps else steps


def train_settings(num_rows: int, config: UnlearnConfig, *, log_every: int = 10) -> TrainSettings:
    """Warm-up over the first `warmup_epochs`, then the schedule."""
    steps = num_steps(num_rows, config)
    warmup = config.warmup_epochs * math.ceil(num_rows / config.batch_rows)
    return TrainSettings(
        lr=config.lr,
        max_steps=steps,
        batch_rows=config.batch_rows,
        schedule=config.schedule,
        warmup_ratio=min(1.0, warmup / steps),
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        log_every=log_every,
    )


class Watch:
    """Mean and single answer probabilities of some rows; `look` is what a training callback returns."""

    def __init__(self, system: CausalLM, parts: Mapping[str, Sequence[Example]], run: Run) -> None:
        self.system, self.parts, self.run = system, parts, run

    def look(self, step: int) -> dict[str, float]:
        """Length-normalised answer probabilities now; a part without rows is left out."""
        found: dict[str, float] = {}
        for part, examples in self.parts.items():
            if not examples:
                continue
            values = response_logprobs(self.system, examples, reduce="mean", run=self.run).exp().tolist()
            found[part] = sum(values) / len(values)
            found |= {f"{part}/{number}": value for number, value in enumerate(values)}
        return found


def at_level(looks: Sequence[Look], level: float) -> dict[str, float] | None:
    """The look at the first moment when the mean forget probability is `level`, or None if it never is.

    Between two looks every number moves in a straight line.
    """
    for before, after in pairwise(looks):
        high, low = before["forget"], after["forget"]
        if high > level >= low:
            share = (high - level) / (high - low)
            return {key: (1 - share) * before[key] + share * after[key] for key in before}
    return None


def level_rows(looks: Sequence[Look], ids: Sequence[str], levels: Sequence[float]) -> Iterator[Row]:
    """For each level the retain rows' probabilities at it, one row each, and the step at which it was reached."""
    for level in levels:
        metric = f"retain_probability_at_{level:g}"
        found = at_level(looks, level)
        if found is None:
            values = [look["forget"] for look in looks]
            note = (
                f"forget probability went from {values[0]:.3f} to {values[-1]:.3f} (lowest {min(values):.3f})"
            )
            yield Row(metric=metric, value=None, n=0, split="retain", note=f"level not crossed: {note}")
            continue
        yield Row(metric=f"steps_to_{level:g}", value=found["step"], split="forget")
        yield from item_rows(metric, found, ids)


def item_rows(
    metric: str, look: Look, ids: Sequence[str], part: str = "retain", better: bool = True
) -> Iterator[Row]:
    """The mean over a part's rows and each of them, at one look."""
    values = [look[f"{part}/{number}"] for number in range(len(ids))]
    yield mean_row(metric, values, part, better)
    for name, value in zip(ids, values, strict=True):
        yield Row(metric=metric, value=value, item=name, split=part, higher_is_better=better)


def way_rows(
    looks: Sequence[Look], ids: Sequence[str], levels: Sequence[float], log: TrainLog, num_forget: int
) -> list[Row]:
    """All that is read off one run: its retain rows (`ids`) at each level and at the end, its forget rows, its length."""
    ends = {"start": looks[0], "end": looks[-1]}
    note = "stopped as diverged" if log.stopped_early else ""
    return [
        *level_rows(looks, ids, levels),
        *item_rows("retain_probability_end", looks[-1], ids),
        *(
            Row(metric=f"forget_probability_{when}", value=look["forget"], n=num_forget, split="forget")
            for when, look in ends.items()
        ),
        Row(metric="steps", value=float(log.num_steps), note=note),
    ]


def curve_figures(looks: Sequence[Look], name: str) -> dict[str, Any]:
    """What was kept against what was forgotten, and every part's mean over the steps, for the report."""
    if not looks:
        return {}
    steps = [look["step"] for look in looks]
    parts = [key for key in looks[0] if key != "step" and "/" not in key]
    lines = {part: {"x": steps, "y": [look[part] for look in looks]} for part in parts}
    curves = {
        "Answer probability while unlearning": {
            "x": "optimiser step",
            "y": "mean probability",
            "lines": lines,
        }
    }
    if {"forget", "retain"} <= set(parts):
        trade = {"x": lines["forget"]["y"], "y": lines["retain"]["y"]}
        curves["Kept against forgotten"] = {
            "x": "forget probability",
            "y": "retain probability",
            "lines": {name: trade},
        }
    return {"curves": curves}
