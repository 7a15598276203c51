"""Unlearn from forget rows alone, and measure what was kept on the way; the divergences are in `divergences.py`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from temper.artefacts import Artefact, tuning
from temper.core.errors import ConfigError
from temper.core.types import Row, Run
from temper.data.schemas import Data
from temper.methods.unlearning.flat.card import Config
from temper.methods.unlearning.flat.training import Unlearned, prepare, tune, unlearn
from temper.ops.tofu_metrics import fluency_rows, mean_row, write_examples
from temper.ops.unlearning import Look, curve_figures, item_rows, way_rows
from temper.systems.causal_lm import CausalLM

__all__ = ["fit", "measure", "template_rows"]

SLUG = "flat"


def fit(system: CausalLM, data: Data, config: Config, run: Run) -> Artefact:
    """Move the model from the forget answers to template answers; a part retain, if given, is only watched."""
    rows = prepare(system, data, config, run)
    with tuning(system, tune(config, run), run) as tuned:
        done = unlearn(tuned, rows, data.get("retain"), config, run)
        _write_figures(run, done, config.divergence)
        return tuned.finish(SLUG)


def measure(system: CausalLM, data: Data, config: Config, run: Run) -> Iterator[Row]:
    """Unlearn a copy and throw it away: retain probability at fixed forget probabilities, and how the last model writes.

    The same rows as `measure` of npo with path=true, and the templates' probabilities. Raises ConfigError without looks.
    """
    if not config.watch_every:
        raise ConfigError(
            "measure reads the way of unlearning and needs looks", cure="Set watch_every to 1 or more."
        )
    rows = prepare(system, data, config, run)
    forget, retain = (data[part][: config.watch_rows] for part in ("forget", "retain"))
    with tuning(system, tune(config, run), run) as tuned:
        done = unlearn(tuned, rows, data["retain"], config, run)
        yield from way_rows(done.looks, [r.id for r in retain], config.levels, done.log, len(rows.forget))
        yield from template_rows(done.looks, [r.id for r in forget])
        for split, records in (("forget", forget), ("retain", retain)) if config.reply_tokens else ():
            replies, found = fluency_rows(tuned.system, records, split, config.reply_tokens, run)
            if split == "forget":
                write_examples(run, records, replies)
            yield from found
    _write_figures(run, done, config.divergence)


def template_rows(looks: Sequence[Look], ids: Sequence[str]) -> Iterator[Row]:
    """The templates' probability per token at the end, and its gain over the start, for each forget row."""
    yield from item_rows("template_probability_end", looks[-1], ids, "template")
    gains = [looks[-1][f"template/{row}"] - looks[0][f"template/{row}"] for row in range(len(ids))]
    yield mean_row("template_probability_gain", gains, "template", True)
    for name, gain in zip(ids, gains, strict=True):
        yield Row(
            metric="template_probability_gain", value=gain, item=name, split="template", higher_is_better=True
        )


def _write_figures(run: Run, done: Unlearned, name: str) -> None:
    """Curves of the looks, and P_e and P_f of every step."""
    if run.folder is None:
        return
    figures: dict[str, Any] = curve_figures(done.looks, name)
    steps = list(range(1, done.log.num_steps + 1))
    figures.setdefault("curves", {})["Mean token probability at every step"] = {
        "x": "optimiser step",
        "y": "P",
        "lines": {
            label: {"x": steps, "y": done.log.terms[term]}
            for label, term in (
                ("template (P_e)", "template_probability"),
                ("forget (P_f)", "forget_probability"),
            )
        },
    }
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "figures.json").write_text(json.dumps(figures))
