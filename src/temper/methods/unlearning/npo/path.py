"""What an objective costs on the way: retain probabilities read off at fixed forget probabilities, and the last model's text.

A copy is unlearned as `fit` would do it and thrown away. Comparing losses at the same step, or at their last one, mixes
how fast each forgets with what it destroys; at the same forget probability only the second is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from temper.artefacts import tuning
from temper.core.errors import ConfigError
from temper.core.types import Row, Run
from temper.data.schemas import Data
from temper.methods.unlearning.npo.card import LEARN, Config
from temper.methods.unlearning.npo.metrics import fluency_rows, mean_row, write_examples
from temper.methods.unlearning.npo.training import curve_figures, prepare, tune, unlearn
from temper.systems.causal_lm import CausalLM

__all__ = ["at_level", "item_rows", "level_rows", "measure"]

Look = Mapping[str, float]


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


def item_rows(metric: str, look: Look, ids: Sequence[str]) -> Iterator[Row]:
    """The mean over retain rows and each of them, at one look."""
    values = [look[f"retain/{number}"] for number in range(len(ids))]
    yield mean_row(metric, values, "retain", True)
    for name, value in zip(ids, values, strict=True):
        yield Row(metric=metric, value=value, item=name, split="retain", higher_is_better=True)


def measure(system: CausalLM, data: Data, config: Config, run: Run) -> tuple[list[Row], dict[str, Any]]:
    """Rows of the way and of the model at its end, and its curves."""
    if config.loss == LEARN or "retain" not in data:
        raise ConfigError(
            "path watches what unlearning keeps: it needs an unlearning loss and a part retain",
            where=f"loss={config.loss}",
            cure="Set loss to e.g. npo and give retain rows.",
        )
    rows = prepare(system, data, config, run)
    ids = [record.id for record in data["retain"][: config.watch_rows]]
    with tuning(system, tune(config, run), run) as tuned:
        log, looks = unlearn(tuned, rows, config, run)
        found = [*level_rows(looks, ids, config.levels), *item_rows("retain_probability_end", looks[-1], ids)]
        found += [
            Row(
                metric="forget_probability_start",
                value=looks[0]["forget"],
                n=len(rows.forget),
                split="forget",
            ),
            Row(
                metric="forget_probability_end", value=looks[-1]["forget"], n=len(rows.forget), split="forget"
            ),
            Row(
                metric="steps",
                value=float(log.num_steps),
                note="stopped as diverged" if log.stopped_early else "",
            ),
        ]
        if config.reply_tokens:
            records = data["forget"][: config.watch_rows]
            replies, more = fluency_rows(tuned.system, records, "forget", config, run)
            found += more
            write_examples(run, records, replies)
    return found, curve_figures(looks, config.loss)
