"""Teach or forget a skill, and study what forgetting does; the maths is in `maths.py`, the study in `study.py`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from temper.artefacts import Artefact, tuning
from temper.core.errors import ConfigError, nearest
from temper.core.types import Row, Run
from temper.data.schemas import Data
from temper.methods.unlearning.random_label_forgetting import maths
from temper.methods.unlearning.random_label_forgetting.card import Config
from temper.methods.unlearning.random_label_forgetting.study import Study, run_study
from temper.methods.unlearning.random_label_forgetting.tasks import load_tasks
from temper.methods.unlearning.random_label_forgetting.training import train_on, tune
from temper.systems.causal_lm import CausalLM

__all__ = ["fit", "measure"]

logger = logging.getLogger(__name__)

SLUG = "random-label-forgetting"
MEMORISED = 0.8
"""Below this fit of the labels the model was trained too little for its forgetting to mean anything."""


def fit(system: CausalLM, data: Data, config: Config, run: Run) -> Artefact:
    """Train on right, random or wrong responses of one task (or all); the system stays as it was."""
    tasks = load_tasks(data, config, tested=False)
    names = [task.name for task in tasks]
    if config.task and config.task not in names:
        raise ConfigError(
            f"The data has no task {config.task!r}", where="task", cure=nearest(config.task, names)
        )
    chosen = [task for task in tasks if config.task in ("", task.name)]
    items = [item for task in chosen for item in task.train]
    with tuning(system, tune(config), run) as tuned:
        train_on(tuned, items, config.labels, f"{run.seed}/{config.task}", config, run)
        return tuned.finish(SLUG)


def measure(system: CausalLM, data: Data, config: Config, run: Run) -> Iterator[Row]:
    """The map of what forgetting each task does to every task, probes, and what could have told so beforehand."""
    tasks = load_tasks(data, config)
    study = run_study(system, tasks, config, run)
    names = [task.name for task in tasks]
    sizes = {task.name: len(task.test) for task in tasks}
    flipped = config.labels == "flip"
    map_FE = np.array([[study.forgotten[f].after[e] for e in names] for f in names])
    forgotten, tested = ([names[i] for i in order] for order in maths.clustered(map_FE))
    yield from _before_rows(study, tested, sizes)
    yield from _map_rows(study, forgotten, tested, sizes, flipped)
    yield from _share_rows(map_FE)
    yield from _own_rows(study, names, flipped)
    yield from _summary_rows(study, names)


def _before_rows(study: Study, names: Sequence[str], sizes: dict[str, int]) -> Iterator[Row]:
    for name in names:
        before = study.before[name]
        yield Row(
            metric="accuracy",
            value=before.accuracy,
            n=sizes[name],
            arm="base",
            group=name,
            higher_is_better=True,
        )
        yield Row(metric="confidence", value=before.confidence, n=sizes[name], arm="base", group=name)
        if before.variance is not None:
            yield Row(metric="variance", value=before.variance, n=sizes[name], arm="base", group=name)


def _map_rows(
    study: Study, forgotten: Sequence[str], tested: Sequence[str], sizes: dict[str, int], flipped: bool
) -> Iterator[Row]:
    """Held-out accuracy and ratio of every task, one arm for each forgotten one.

    A report's heat map has its arms and groups in the order in which they come: similar ones stand together.
    """
    for name in forgotten:
        seen = study.forgotten[name]
        for other in tested:
            place: dict[str, Any] = {"n": sizes[other], "arm": f"forget_{name}", "group": other}
            yield Row(metric="accuracy_learnt", value=seen.learnt[other], **place)
            yield Row(metric="accuracy", value=seen.after[other], **place)
            ratio = maths.forget_ratio(seen.learnt[other], seen.after[other], flipped=flipped)
            note = (
                ""
                if ratio is not None
                else f"accuracy before was {seen.learnt[other]:.2f}: never had the skill"
            )
            yield Row(metric="forget_ratio", value=ratio, note=note, **place)


def _share_rows(map_FE: maths.Array) -> Iterator[Row]:
    """How much of the map's variance lies in what is tested, and in what was forgotten."""
    shares = maths.variance_shares(map_FE)
    for arm in ("tested", "forgotten"):
        value = None if shares is None else float(getattr(shares, arm))
        yield Row(metric="variance_share", value=value, n=map_FE.size, arm=arm)


def _own_rows(study: Study, names: Sequence[str], flipped: bool) -> Iterator[Row]:
    """Every task where it was itself forgotten; an item of these rows is a task."""
    for name in names:
        seen = study.forgotten[name]
        learnt, after = seen.learnt[name], seen.after[name]
        weak = seen.label_fit < MEMORISED
        note = f"inconclusive: labels fitted at {seen.label_fit:.2f} only; train longer" if weak else ""
        if weak:
            logger.warning("%s is %s", name, note)
        yield Row(metric="label_fit", value=seen.label_fit, item=name, arm="forgotten", note=note)
        yield Row(metric="gap", value=after - 0.5, item=name, arm="forgotten", note=note)
        ratio = maths.forget_ratio(learnt, after, flipped=flipped)
        yield Row(metric="own_ratio", value=ratio, item=name, arm="forgotten", note=note)
        yield Row(metric="kept_accuracy", value=after, item=name, arm="held_out")
        yield Row(metric="kept_accuracy", value=seen.forget_set, item=name, arm="forget_set")
        if seen.probe is not None:
            before_probe, after_probe = seen.probe
            yield Row(metric="probe_accuracy", value=before_probe, item=name, arm="learnt")
            yield Row(metric="probe_accuracy", value=after_probe, item=name, arm="forgotten")
            yield Row(metric="lost_accuracy", value=before_probe - after_probe, item=name, arm="probe")
            yield Row(metric="lost_accuracy", value=learnt - after, item=name, arm="output")
        if seen.order_rho is not None:
            yield Row(metric="order_rho", value=seen.order_rho, item=name, arm="forgotten")


def _summary_rows(study: Study, names: Sequence[str]) -> Iterator[Row]:
    """How much tasks differ, and what of the untouched model goes with it."""
    gaps = [study.forgotten[name].after[name] - 0.5 for name in names]
    yield Row(metric="gap_spread", value=max(gaps) - min(gaps), n=len(names), arm="forgotten")
    predictors: dict[str, list[float | None]] = {
        "confidence_rho": [study.before[name].confidence for name in names],
        "variance_rho": [study.before[name].variance for name in names],
    }
    for metric, values in predictors.items():
        known = [value for value in values if value is not None]
        rho = maths.rank_correlation(known, gaps) if len(known) == len(gaps) else None
        note = "" if rho is not None else "needs three tasks that differ"
        yield Row(metric=metric, value=rho, n=len(names), arm="forgotten", note=note)
