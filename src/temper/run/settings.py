"""A step's final settings: defaults < recipe < arm < matrix < --set, each with its origin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from temper.core import config as core_config
from temper.core.errors import ConfigError, nearest
from temper.core.registry import load_card
from temper.core.types import Json
from temper.run.recipe import Pipeline, Step

__all__ = ["Sets", "split_sets", "step_config"]

Sets = Mapping[str, Mapping[str, Json]]
"""Step id -> {setting: value}."""


def split_sets(pairs: Sequence[str], pipeline: Pipeline) -> Sets:
    """`--set` pairs by step: `key=value` where there is one step, `step.key=value` for any; raises ConfigError."""
    by_step: dict[str, dict[str, Json]] = {}
    ids = [step.id for step in pipeline.steps]
    for key, value in core_config.parse_sets(pairs).items():
        step_id, dot, name = key.partition(".")
        if not dot or step_id not in ids:
            if len(ids) > 1:
                raise ConfigError(
                    f"--set {key} names no step",
                    where=pipeline.where,
                    cure=f"Write STEP.{name or key}=...; {nearest(step_id, ids) or 'steps: ' + ', '.join(ids)}",
                )
            step_id, name = ids[0], key
        by_step.setdefault(step_id, {})[name] = value
    return by_step


def step_config(
    step: Step,
    *,
    arm: str,
    arm_settings: Mapping[str, Json],
    matrix: Mapping[str, Json],
    sets: Mapping[str, Json],
    where: str,
) -> core_config.Resolved:
    """The step's config and where each value came from; raises ConfigError for a key no one reads."""
    layers: list[tuple[str, Mapping[str, Any]]] = [(f"{where}, step {step.id}", step.settings)]
    if arm_settings:
        layers.append((f"arm {arm}" if arm else "matrix", arm_settings))
    if matrix:
        layers.append(("matrix", matrix))
    if sets:
        layers.append(("--set", sets))
    return core_config.build(load_card(step.method).config, layers)
