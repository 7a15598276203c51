"""Plain fine-tuning of a system for as long as a block lasts: what learns, and what attacks by learning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from temper.artefacts.training import Tune, Tuning, tuning
from temper.core.types import Run
from temper.ops.batching import Example
from temper.ops.train import SftObjective, TrainLog, TrainSettings, train

__all__ = ["FineTuned", "Look", "fine_tuned"]

Look = Callable[[Any, int], Mapping[str, float]]
"""(the system as trained so far, optimiser steps done) -> numbers for the log's curve."""


class FineTuned(NamedTuple):
    """The system as it was trained, and how that went."""

    tuned: Tuning
    log: TrainLog


@contextmanager
def fine_tuned(
    system: Any,
    rows: Sequence[Example],
    tune: Tune,
    settings: TrainSettings,
    run: Run,
    *,
    every: int = 0,
    look: Look | None = None,
) -> Iterator[FineTuned]:
    """The system after training on the rows' scored tokens; on leaving it is bit-identical to what it was.

    `look` is called every `every` steps. Raises DataError where there are no rows.
    """
    with tuning(system, tune, run) as tuned:
        log = train(
            tuned.system.model,
            tuned.parameters(),
            lambda epoch: rows,
            SftObjective(tuned.system.pad_id, tuned.system.device),
            settings,
            run,
            length=lambda row: len(row.ids),
            every=every,
            callback=None if look is None else lambda step: look(tuned.system, step),
        )
        yield FineTuned(tuned, log)
