"""Fit a target model, unlearn from it, and measure what is left; the maths is in `losses.py`, the metrics in `metrics.py`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

from temper.artefacts import Artefact, tuning
from temper.artefacts.fine_tuning import fine_tuned
from temper.core.types import Row, Run
from temper.data.schemas import Data
from temper.methods.unlearning.npo import metrics, path, toy
from temper.methods.unlearning.npo.card import LEARN, Config
from temper.methods.unlearning.npo.training import encode_answers, outcome, prepare, tune, unlearn
from temper.ops.unlearning import curve_figures, train_settings
from temper.systems.causal_lm import CausalLM

__all__ = ["fit", "learn", "measure"]

logger = logging.getLogger(__name__)

SLUG = "npo"


def fit(system: CausalLM, data: Data, config: Config, run: Run) -> Artefact:
    """Unlearn the part forget (loss=learn: learn forget and retain, to have a target); the system stays as it was."""
    if config.loss == LEARN:
        return learn(system, data, config, run)
    rows = prepare(system, data, config, run)
    with tuning(system, tune(config, run), run) as tuned:
        log, looks = unlearn(tuned, rows, config, run)
        _write_figures(run, curve_figures(looks, config.loss) | _ending(outcome(log, config), config))
        return tuned.finish(SLUG)


def learn(system: CausalLM, data: Data, config: Config, run: Run) -> Artefact:
    """Plain fine-tuning on the answers of forget and retain: the target model that unlearning starts from.

    Used as `base+target`, its adapter is added to the weights, so a fresh one and its reference start from there.
    """
    records: list[Any] = [*data["forget"], *data.get("retain")]
    examples = encode_answers(system, records, config)
    settings = train_settings(len(examples), config)
    with fine_tuned(system, examples, tune(config, run), settings, run) as (tuned, log):
        logger.info("learnt %d rows: %.3f nats a token at the end", len(examples), log.loss[-1])
        return tuned.finish(SLUG)


def measure(system: CausalLM, data: Data, config: Config, run: Run) -> Iterator[Row]:
    """The TOFU report; with `path` what is kept at fixed levels of forgetting, with `toy` the logistic toy."""
    if config.toy:
        rows, figures = toy.measure(config, run)
        _write_figures(run, figures)
        yield from rows
    elif config.path:
        rows, figures = path.measure(system, data, config, run)
        _write_figures(run, figures)
        yield from rows
    else:
        yield from metrics.measure(system, data, config, run)


def _ending(said: str, config: Config) -> dict[str, Any]:
    """The report's table of what to know of how training ended, if anything."""
    if not said:
        return {}
    return {
        "tables": {"How unlearning ended": {"columns": ["loss", "ending"], "rows": [[config.loss, said]]}}
    }


def _write_figures(run: Run, figures: dict[str, Any]) -> None:
    if run.folder is not None and figures:
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "figures.json").write_text(json.dumps(figures))
