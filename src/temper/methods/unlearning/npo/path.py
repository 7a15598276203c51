"""What an objective costs on the way: retain probabilities read off at fixed forget probabilities, and the last model's text.

A copy is unlearned as `fit` would do it and thrown away. Comparing losses at the same step, or at their last one, mixes
how fast each forgets with what it destroys; at the same forget probability only the second is left.
"""

from __future__ import annotations

from typing import Any

from temper.artefacts import tuning
from temper.core.errors import ConfigError
from temper.core.types import Row, Run
from temper.data.schemas import Data
from temper.methods.unlearning.npo.card import LEARN, Config
from temper.methods.unlearning.npo.training import prepare, tune, unlearn
from temper.ops.tofu_metrics import fluency_rows, write_examples
from temper.ops.unlearning import curve_figures, way_rows
from temper.systems.causal_lm import CausalLM

__all__ = ["measure"]


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
        found = way_rows(looks, ids, config.levels, log, len(rows.forget))
        if config.reply_tokens:
            records = data["forget"][: config.watch_rows]
            replies, more = fluency_rows(tuned.system, records, "forget", config.reply_tokens, run)
            found += more
            write_examples(run, records, replies)
    return found, curve_figures(looks, config.loss)
