"""A pipeline times its matrix, arms and seeds: the cells of an experiment, with every reference resolved."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from temper.core.errors import ConfigError, nearest
from temper.core.registry import load_card
from temper.core.spec import ArtefactRef, SystemSpec, parse_system
from temper.core.types import Json
from temper.run.against import with_opponents
from temper.run.axes import Choice
from temper.run.inputs import data_steps, wanted_parts
from temper.run.recipe import BASE, DataRef, Pipeline, Step, with_arm
from temper.run.settings import Sets, step_config

__all__ = ["STEP", "CellSpec", "StepSpec", "expand"]

STEP = "step:"
"""How a setting names what an earlier step left: its rows if it measures, its artefact if it fits, its data if it makes."""

MAX_SEED = 2**32 - 1
"""NumPy's generators take no larger one."""


@dataclass(frozen=True, kw_only=True)
class StepSpec:
    """A step of one cell: its final settings, system and data, before anything is hashed or loaded."""

    step: Step
    system: SystemSpec | None
    uses: tuple[str, ...]
    """Earlier step ids among its system's artefacts."""
    reads: tuple[str, ...]
    """Earlier step ids among its data."""
    mentions: tuple[str, ...]
    """Earlier step ids that a setting names as step:ID, for what that step left."""
    config: Any
    origins: Mapping[str, str]


class CellSpec(NamedTuple):
    """One arm with one seed and one choice of every matrix value."""

    arm: str
    seed: int
    matrix: dict[str, Json]
    steps: tuple[StepSpec, ...]


def expand(
    pipeline: Pipeline, sets: Sets, *, seeds: Sequence[int] = (), arms: Sequence[str] = ()
) -> list[CellSpec]:
    """Every cell, seeds innermost; `seeds` and `arms` narrow or replace the recipe's. Raises ConfigError."""
    chosen = _arms(pipeline, arms)
    axes = {k: v for k, v in pipeline.matrix.items() if k != "seed"}
    _check_axes(pipeline, axes)
    seed_axis = list(seeds) or list(pipeline.matrix.get("seed", (0,)))
    if len(set(seed_axis)) != len(seed_axis):
        raise ConfigError("A seed stands twice", where=pipeline.where, cure="Name each seed once.")
    if large := [seed for seed in seed_axis if seed > MAX_SEED]:
        raise ConfigError(
            f"Seed {large[0]} is above {MAX_SEED}", where=pipeline.where, cure="Choose a smaller one."
        )
    return [
        _cell(pipeline, arm, changes, seed, dict(zip(axes, values, strict=True)), sets)
        for values in itertools.product(*axes.values())
        for arm, changes in chosen.items()
        for seed in seed_axis
    ]


def _arms(pipeline: Pipeline, names: Sequence[str]) -> Mapping[str, Mapping[str, Json]]:
    known = pipeline.arms or {"": {}}
    for name in names:
        if name not in known:
            raise ConfigError(f"There is no arm {name!r}", where=pipeline.where, cure=nearest(name, known))
    return {name: known[name] for name in known if not names or name in names}


def _check_axes(pipeline: Pipeline, axes: Mapping[str, Any]) -> None:
    ids = [step.id for step in pipeline.steps]
    for key in axes:
        head, dot, _ = key.partition(".")
        if key not in ("system", "data") and not (dot and head in ids) and not pipeline.is_short:
            raise ConfigError(
                f"matrix key {key!r} is unknown",
                where=pipeline.where,
                cure="Use seed, system, data, STEP.setting or, for a step's method, STEP.VERB.",
            )


def _cell(
    pipeline: Pipeline, arm: str, changes: Mapping[str, Json], seed: int, matrix: dict[str, Json], sets: Sets
) -> CellSpec:
    where = f"{pipeline.where}: arm {arm}" if arm else pipeline.where
    methods = {key: choice for key, choice in matrix.items() if isinstance(choice, Choice)}
    told = {key: methods[key].name if key in methods else value for key, value in matrix.items()}
    matrix = {key: value for key, value in matrix.items() if key not in methods}
    for key, choice in methods.items():
        changes = choice.joined(changes, key.rpartition(".")[0])
    system, data = matrix.get("system", pipeline.system), matrix.get("data", pipeline.data)
    here = dataclasses.replace(pipeline, system=system, data=data)
    earlier: dict[str, Step] = {}
    steps: list[StepSpec] = []
    for step in with_opponents(with_arm(pipeline.steps, changes, where), where):
        arm_settings = (changes.get(step.id) or {}).get("settings") or {}
        resolved = step_config(
            step,
            arm=arm,
            arm_settings=arm_settings,
            matrix=dict(_axis_settings(matrix, step.id, pipeline.is_short)),
            sets=sets.get(step.id, {}),
            where=pipeline.where,
        )
        steps.append(_resolve(step, here, earlier, resolved, where))
        earlier[step.id] = step
    if not steps:
        raise ConfigError("No step is left", where=where, cure="An arm keeps at least one step.")
    return CellSpec(arm, seed, told, tuple(steps))


def _axis_settings(matrix: Mapping[str, Json], step_id: str, is_short: bool) -> Iterator[tuple[str, Json]]:
    for key, value in matrix.items():
        head, dot, name = key.partition(".")
        if dot and head == step_id:
            yield name, value
        elif not dot and is_short and key not in ("system", "data"):
            yield key, value


def _resolve(
    step: Step, pipeline: Pipeline, earlier: Mapping[str, Step], resolved: Any, where: str
) -> StepSpec:
    place = f"{where}: {step.id}"
    system = _system(step.system or BASE, pipeline.system, earlier, place, required=step.system is not None)
    _check_order(system, pipeline, earlier, place)
    data = _data(step, pipeline, place)
    reads = data_steps(data)
    for name in reads:
        if name not in earlier:
            raise ConfigError(
                f"Data {name!r} is neither a spec nor an earlier step",
                where=place,
                cure=nearest(name, earlier),
            )
        if earlier[name].verb != "make":
            raise ConfigError(f"Step {name!r} makes no data", where=place, cure="Only a make step does.")
    mentions = _mentions(resolved.config, earlier, place)
    uses = tuple(a.name for a in system.artefacts if a.name in earlier) if system else ()
    limit = step.limit if step.limit is not None else pipeline.limit
    return StepSpec(
        step=dataclasses.replace(step, data=data, limit=limit),
        system=system,
        uses=uses,
        reads=tuple(reads),
        mentions=mentions,
        config=resolved.config,
        origins=resolved.origins,
    )


def _mentions(config: Any, earlier: Mapping[str, Step], place: str) -> tuple[str, ...]:
    """Steps that a setting names as `step:ID`; raises ConfigError for one that does not come before."""
    named = [v.removeprefix(STEP) for v in vars(config).values() if isinstance(v, str) and v.startswith(STEP)]
    for name in named:
        if name not in earlier:
            raise ConfigError(
                f"{STEP}{name} is no earlier step",
                where=place,
                cure=nearest(name, earlier) or "Put it before.",
            )
    return tuple(named)


def _data(step: Step, pipeline: Pipeline, place: str) -> DataRef:
    """The step's own data, else the recipe's; none for a verb that takes none."""
    if wanted_parts(load_card(step.method), step.verb):
        return step.data if step.data is not None else pipeline.data
    if step.data is not None:
        raise ConfigError(
            f"{step.verb} {step.method!r} takes no data", where=place, cure="Remove data: from the step."
        )
    return None


def _system(
    text: str, base: str | None, earlier: Mapping[str, Step], place: str, *, required: bool
) -> SystemSpec | None:
    """The spec with `base` replaced and each step id among the artefacts checked."""
    spec = parse_system(text)
    if spec.base in earlier:
        raise ConfigError(f"{spec.base!r} is a step", where=place, cure=f"Write base+{text}.")
    if spec.base == BASE:
        if base is None:
            if required:
                raise ConfigError(
                    "The recipe names no system", where=place, cure="Add system: NAME, or --system NAME."
                )
            return None
        root = parse_system(base)
        spec = SystemSpec(root.base, root.artefacts + spec.artefacts)
    for ref in spec.artefacts:
        _check_ref(ref, earlier, place)
    return spec


def _check_order(
    system: SystemSpec | None, pipeline: Pipeline, earlier: Mapping[str, Step], place: str
) -> None:
    """Raise ConfigError for an artefact that is a step of the recipe but does not come before this one."""
    late = {step.id for step in pipeline.steps} - set(earlier)
    for ref in system.artefacts if system else ():
        if ref.name in late and not Path(ref.name).exists():
            raise ConfigError(
                f"Step {ref.name!r} does not come before this one",
                where=place,
                cure="Put it earlier; a step cannot use itself, a later one, or one that the arm leaves out.",
            )


def _check_ref(ref: ArtefactRef, earlier: Mapping[str, Step], place: str) -> None:
    if ref.name in earlier and earlier[ref.name].verb != "fit":
        raise ConfigError(f"Step {ref.name!r} leaves no artefact", where=place, cure="Only a fit step does.")
