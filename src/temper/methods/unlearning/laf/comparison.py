"""The same task for every technique: the original model, the retrained one, and what each technique makes of the first."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from temper.artefacts import Artefact
from temper.core.types import Row, Run
from temper.data.schemas import Data
from temper.methods.unlearning.laf.card import Config
from temper.methods.unlearning.laf.metrics import Part, Seen, look, prepare, report
from temper.systems.image_classifier import ImageClassifier

__all__ = ["compare"]

Fit = Callable[[ImageClassifier, Data, Config, Run], Artefact]
SECONDS = "fit_s"
STEPS: dict[str, tuple[str, ...]] = {
    "laf": ("laf",), "laf_r": ("laf", "repair"), "ascent": ("ascent",), "finetune": ("finetune",),
}  # fmt: skip
"""Arm -> the techniques that follow one another; one that two arms share runs once."""


def compare(system: ImageClassifier, data: Data, config: Config, run: Run, fit: Fit) -> Iterator[Row]:
    """Rows of each arm; the system is a fresh network and stays one."""
    quiet = dataclasses.replace(run, folder=None, checkpoint_every=0)
    parts = prepare(system, data, config)

    def timed(base: ImageClassifier, technique: str) -> tuple[Artefact, float]:
        began = time.monotonic()
        settings: Any = {"technique": technique, "compare": ()}
        return fit(base, data, dataclasses.replace(config, **settings), quiet), time.monotonic() - began

    retrained, seconds = timed(system, "retrain")
    with retrained.apply(system) as applied:
        reference = look(applied, parts, config, run)
    yield from _arm("retrained", reference, parts, run, None, seconds)
    original, seconds = timed(system, "learn")
    made: dict[str, tuple[Artefact, float]] = {}
    with original.apply(system) as base:
        yield from _arm("original", look(base, parts, config, run), parts, run, reference, seconds)
        for name in run.ticker(config.compare, total=len(config.compare), label="techniques"):
            with ExitStack() as stack:
                applied, seconds = base, 0.0
                for technique in STEPS[name]:
                    made[technique] = made.get(technique) or timed(applied, technique)
                    applied = stack.enter_context(made[technique][0].apply(applied))
                    seconds += made[technique][1]
                seen = look(applied, parts, config, run)
            yield from _arm(name, seen, parts, run, reference, seconds)


def _arm(
    name: str, seen: Seen, parts: dict[str, Part], run: Run, reference: Seen | None, seconds: float
) -> Iterator[Row]:
    for row in report(seen, parts, run, reference):
        yield dataclasses.replace(row, arm=name)
    yield Row(metric=SECONDS, value=seconds, arm=name, higher_is_better=False)
