"""The study: every task taught, forgotten, and looked at from outside and inside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from torch import Tensor

from temper.artefacts import tuning
from temper.core.types import Run
from temper.methods.unlearning.random_label_forgetting import maths
from temper.methods.unlearning.random_label_forgetting.card import Config
from temper.methods.unlearning.random_label_forgetting.tasks import Item, Task
from temper.methods.unlearning.random_label_forgetting.training import (
    encode_items,
    response_scores,
    train_on,
    tune,
)
from temper.ops.probing import fit_probe, last_token_states, total_variance
from temper.systems import anchors
from temper.systems.causal_lm import CausalLM

__all__ = ["Before", "Forgotten", "Study", "layer_of", "run_study"]

LEVEL = 0.6
"""Confidence at which an item counts as learnt (Sec. on the order of forgetting)."""


class Before(NamedTuple):
    """The untouched model on a task: held-out accuracy, mean confidence, spread of hidden states."""

    accuracy: float
    confidence: float
    variance: float | None


class Forgotten(NamedTuple):
    """One task taught and forgotten."""

    learnt: dict[str, float]
    """Task -> held-out accuracy after learning."""
    after: dict[str, float]
    """Task -> held-out accuracy after forgetting."""
    forget_set: float
    """Accuracy on the trained rows after forgetting."""
    label_fit: float
    """Accuracy of the trained rows against the labels they got."""
    probe: tuple[float, float] | None
    """Held-out accuracy of a probe before and after forgetting."""
    order_rho: float | None


class Study(NamedTuple):
    """What was seen of every task."""

    before: dict[str, Before]
    forgotten: dict[str, Forgotten]


class _Watch:
    """Confidence of some trained items at every look."""

    def __init__(self, system: CausalLM, items: Sequence[Item], config: Config, run: Run) -> None:
        self.system, self.items, self.config, self.run = system, items, config, run
        self.steps: list[int] = []
        self.looks: list[list[float]] = []
        self(0)

    def __call__(self, step: int) -> None:
        scores = response_scores(self.system, self.items, self.config, self.run)
        self.steps.append(step)
        self.looks.append(maths.confidence(scores).tolist())

    def passed(self, *, above: bool) -> list[int]:
        """The step at which each item first passed the level; one after the last look where it never did."""
        never = self.steps[-1] + 1
        found = [
            maths.first_step(self.steps, values, LEVEL, above=above)
            for values in zip(*self.looks, strict=True)
        ]
        return [never if step is None else step for step in found]


def layer_of(system: CausalLM, config: Config) -> int:
    """The layer that probes read, counted from the end; the first one of a shallower model."""
    return max(config.probe_layer, -len(anchors.layers(system.model)))


def run_study(system: CausalLM, tasks: Sequence[Task], config: Config, run: Run) -> Study:
    """Look at the untouched model, then teach and forget each task."""
    before = {task.name: _before(system, task, config, run) for task in tasks}
    forgotten: dict[str, Forgotten] = {}
    if config.joint:
        with _taught(system, tasks, config, run) as (taught, watches):
            learnt = _accuracies(taught, tasks, config, run)
            for task in tasks:
                forgotten[task.name] = _forget(
                    taught, task, tasks, learnt, watches.get(task.name), config, run
                )
        return Study(before, forgotten)
    for task in tasks:
        with _taught(system, [task], config, run) as (taught, watches):
            learnt = _accuracies(taught, tasks, config, run)
            forgotten[task.name] = _forget(taught, task, tasks, learnt, watches.get(task.name), config, run)
    return Study(before, forgotten)


def _before(system: CausalLM, task: Task, config: Config, run: Run) -> Before:
    scores = response_scores(system, task.test, config, run)
    variance = None
    if config.probes:
        questions = [_question_ids(item.rows[0]) for item in encode_items(system, task.test, config)]
        variance = total_variance(last_token_states(system, questions, layer_of(system, config), run))
    return Before(maths.accuracy(scores), float(maths.confidence(scores).mean()), variance)


def _question_ids(row: object) -> list[int]:
    """What stands before the response."""
    return row.ids[: row.scored.index(True)]  # type: ignore[attr-defined]


@contextmanager
def _taught(
    system: CausalLM, tasks: Sequence[Task], config: Config, run: Run
) -> Iterator[tuple[CausalLM, Mapping[str, _Watch]]]:
    """The system taught the tasks, and what was seen of their items on the way."""
    items = [item for task in tasks for item in task.train]
    with tuning(system, tune(config), _stage(run, "learn")) as tuned:
        watches = {
            task.name: _Watch(tuned.system, task.train[: config.order_items], config, run)
            for task in tasks
            if config.order_items
        }

        def look(step: int) -> None:
            for watch in watches.values():
                watch(step)

        train_on(tuned, items, "learn", "", config, _stage(run, "learn"), look if watches else None)
        artefact = tuned.finish("random-label-forgetting")
    with artefact.apply(system) as taught:
        yield taught, watches


def _stage(run: Run, name: str) -> Run:
    """The run with no checkpoint of its own: a study trains many models, and starts anew when it is stopped."""
    return replace(run, checkpoint_every=0, resume=False)


def _accuracies(system: CausalLM, tasks: Sequence[Task], config: Config, run: Run) -> dict[str, float]:
    return {task.name: maths.accuracy(response_scores(system, task.test, config, run)) for task in tasks}


def _forget(
    taught: CausalLM,
    task: Task,
    tasks: Sequence[Task],
    learnt: Mapping[str, float],
    learning: _Watch | None,
    config: Config,
    run: Run,
) -> Forgotten:
    labels: maths.Labels = "flip" if config.labels == "flip" else "forget"
    probe_before = _probe(taught, task, config, run)
    with tuning(taught, tune(config), _stage(run, "forget")) as tuned:
        system = tuned.system
        watch = _Watch(system, learning.items, config, run) if learning else None
        given = train_on(
            tuned, task.train, labels, f"{run.seed}/{task.name}", config, _stage(run, "forget"), watch
        )
        after = _accuracies(system, tasks, config, run)
        trained = response_scores(system, task.train, config, run)
        probe_after = _probe(system, task, config, run)
    right = maths.hits(trained).numpy()
    both = (probe_before, probe_after) if probe_before is not None and probe_after is not None else None
    order = (
        maths.rank_correlation(learning.passed(above=True), watch.passed(above=False))
        if learning and watch
        else None
    )
    return Forgotten(
        learnt=dict(learnt),
        after=after,
        forget_set=float(right.mean()),
        label_fit=float(np.where(given, right, 1 - right).mean()),
        probe=both,
        order_rho=order,
    )


def _probe(system: CausalLM, task: Task, config: Config, run: Run) -> float | None:
    """Held-out accuracy of a probe that tells right responses from wrong ones."""
    if not config.probes:
        return None
    layer = layer_of(system, config)

    def states(items: Sequence[Item]) -> tuple[Tensor, list[int]]:
        rows = [row.ids for item in encode_items(system, items, config) for row in item.rows]
        return last_token_states(system, rows, layer, run), [1, 0] * len(items)

    return fit_probe(*states(task.train), seed=run.seed).accuracy(*states(task.test))
