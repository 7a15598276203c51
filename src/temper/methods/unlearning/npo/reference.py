"""The retain-only model that forget quality and PrivLeak compare with: measured here, or read from its own rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from temper.artefacts.opening import opened
from temper.core.errors import ConfigError
from temper.core.types import Run
from temper.data.schemas import Data
from temper.methods.unlearning.npo.card import Config
from temper.store import lines
from temper.systems.causal_lm import CausalLM

__all__ = ["Reference", "ScoreSplit", "load_reference", "read_rows"]

logger = logging.getLogger(__name__)

ScoreSplit = Callable[[Any, Any, str, Config, Run], Mapping[str, Sequence[float | None]]]
"""Scores of a split's rows by metric."""
METRICS = ("forget_log_truth_ratio", "forget_min_k_nats", "holdout_min_k_nats")


class Reference(NamedTuple):
    """Item values of the retain-only model by metric."""

    items: Mapping[str, list[float]]
    source: str


def load_reference(
    config: Config, system: CausalLM, data: Data, run: Run, score: ScoreSplit
) -> Reference | None:
    """The reference a config names, or None where it names none. Raises ConfigError for one that holds nothing."""
    if not config.reference:
        return None
    path = Path(config.reference)
    files = (
        [path] if path.suffix == ".jsonl" else [path / "rows.jsonl", *sorted(path.glob("steps/*/rows.jsonl"))]
    )
    present = [file for file in files if file.is_file()]
    if present:
        return read_rows(present[0])
    if path.suffix == ".jsonl" or path.exists():
        raise ConfigError(
            "There are no rows of a measured reference",
            where=config.reference,
            cure="Name a run of measure npo.",
        )
    return _measured(config, system, data, run, score)


def read_rows(path: Path) -> Reference:
    """A reference from the rows of an earlier `measure` on the retain-only model."""
    found: dict[str, list[float]] = {metric: [] for metric in METRICS}
    for row in lines.read(path):
        if row.get("metric") in found and row.get("item") is not None and row.get("value") is not None:
            found[row["metric"]].append(float(row["value"]))
    if not found[METRICS[0]]:
        raise ConfigError(
            f"The rows hold no item of {METRICS[0]!r}",
            where=str(path),
            cure="Measure the retain-only model with this method on the same forget rows.",
        )
    return Reference(found, str(path))


def _measured(config: Config, system: CausalLM, data: Data, run: Run, score: ScoreSplit) -> Reference:
    found: dict[str, list[float]] = {}
    with opened(config.reference, device=run.device, system_prompt=system.chat.system_prompt) as base:
        if base.fingerprint == system.fingerprint:
            logger.warning(
                "the reference %s is the model that is measured: forget quality is then 1 whatever it still knows. Name a "
                "model that never saw the forget rows",
                config.reference,
            )
        for split in ("forget", "holdout"):
            records = data.get(split)[: config.max_rows]
            scores = score(base, records, split, config, run) if records else {}
            for name, values in scores.items():
                found[f"{split}_{name}"] = [value for value in values if value is not None]
    return Reference({metric: found.get(metric, []) for metric in METRICS}, config.reference)
