"""The plan: every cell and step with its inputs, settings and hash, checked before any weights load."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from temper.core import config as core_config
from temper.core.card import Verb
from temper.core.errors import ConfigError
from temper.core.registry import load_card
from temper.core.spec import SystemSpec, parse_system
from temper.core.types import Json
from temper.run.against import UNATTACKED
from temper.run.artefact_paths import artefact_digest, base_identity, locate
from temper.run.axes import is_attack_axis
from temper.run.budgets import attack_of
from temper.run.cells import CellSpec, StepSpec, expand
from temper.run.checks import check_extras, check_kind, check_verb, wants_system
from temper.run.code import code_hash
from temper.run.inputs import check_part_names, load_inputs, wanted_parts
from temper.run.options import Options, resolve_options
from temper.run.ranking import check_columns
from temper.run.recipe import DataRef, Pipeline, load_recipe, method_defaults
from temper.run.settings import split_sets
from temper.store.atomic import canonical

if TYPE_CHECKING:
    from temper.data.schemas import Data

__all__ = ["Cell", "Plan", "PlannedStep", "Request", "make_plan"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a user asks to run; plain values, so that it can be sent to another process."""

    source: str
    """A method's slug or a .yaml file."""
    recipe: str | None = None
    """None = `small`, or the method's defaults where data or a system is given."""
    verb: str | None = None
    system: str | None = None
    data: str | Mapping[str, str] | None = None
    sets: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    arms: tuple[str, ...] = ()
    out: str = "runs"
    options: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """One step of one cell, ready to run."""

    id: str
    verb: Verb
    method: str
    seed: int
    config: Any
    origins: Mapping[str, str]
    system: SystemSpec | None
    uses: Mapping[str, str]
    """Step id among the system's artefacts -> folder name of that step."""
    data: DataRef
    reads: Mapping[str, str]
    """Step id among the data -> folder name of that step."""
    mentions: Mapping[str, str]
    """Step id among the settings -> folder name of that step."""
    limit: int | None
    loaded: Data | None
    """Its data, unless an earlier step makes it."""
    hash: str
    label: Mapping[str, Json] = field(default_factory=dict)
    """Further facts of its rows."""
    limits: Mapping[str, float] = field(default_factory=dict)
    """The most it may spend, by unit."""

    @property
    def name(self) -> str:
        """Its folder's name."""
        return f"{self.id}-{self.hash}"

    @property
    def settings_hash(self) -> str:
        return _short({"method": self.method, "settings": core_config.to_dict(self.config)})


@dataclass(frozen=True)
class Cell:
    """One arm, one seed, one choice of every matrix value."""

    arm: str
    seed: int
    matrix: Mapping[str, Json]
    steps: tuple[PlannedStep, ...]

    @property
    def label(self) -> str:
        parts = [self.arm, *(f"{k}={v}" for k, v in self.matrix.items()), f"seed {self.seed}"]
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All cells in order; equal plans have equal hashes."""

    request: Request
    pipeline: Pipeline
    cells: tuple[Cell, ...]
    options: Options

    @cached_property
    def hash(self) -> str:
        return _short([[c.arm, c.seed, dict(c.matrix), [s.name for s in c.steps]] for c in self.cells])

    @property
    def steps(self) -> list[PlannedStep]:
        """Every different step, in the order they run."""
        return list({step.name: step for cell in self.cells for step in cell.steps}.values())

    @property
    def slug(self) -> str:
        """What the run's folder is named after."""
        return self.pipeline.method or self.pipeline.name


def make_plan(request: Request) -> Plan:
    """The checked plan of a request; loads data but no weights. Raises ConfigError, DataError, NeedsError."""
    pipeline = _pipeline(request)
    options = resolve_options(pipeline.options, request.options)
    sets = split_sets(request.sets, pipeline)
    loads: dict[str, Data] = {}
    expanded = expand(pipeline, sets, seeds=request.seeds, arms=request.arms)
    _check_part_names(expanded)
    _check_read(request, expanded)
    _check_rank(pipeline, expanded)
    cells = [_plan_cell(cell, options, Path(request.out), loads) for cell in expanded]
    return Plan(request=request, pipeline=pipeline, cells=tuple(cells), options=options)


def _pipeline(request: Request) -> Pipeline:
    own = request.data is not None or request.system is not None
    if request.source.endswith((".yaml", ".yml")):
        if request.verb or request.recipe:
            raise ConfigError("--verb and --recipe go with a method, not with a file", where=request.source)
        pipeline = load_recipe(request.source)
    elif request.recipe or not (own or request.verb):
        if request.verb:
            raise ConfigError("--verb and --recipe do not go together", cure="A recipe names its verbs.")
        pipeline = load_recipe(request.source, request.recipe or "small")
    else:
        pipeline = method_defaults(request.source, request.verb)
    changes: dict[str, Any] = {}
    if request.system is not None:
        changes["system"] = request.system
    if request.data is not None:
        changes["data"] = request.data
    return replace(pipeline, **changes)


def _check_part_names(cells: Sequence[CellSpec]) -> None:
    """Each named part is wanted by a step that reads it; a recipe's data serves several."""
    steps = [spec.step for cell in cells for spec in cell.steps]
    for ref in {canonical(_ref(step.data)): step.data for step in steps}.values():
        same = [step for step in steps if step.data == ref]
        check_part_names(ref, [(step.method, load_card(step.method), step.verb) for step in same])


def _check_read(request: Request, cells: Sequence[CellSpec]) -> None:
    """A system or data that the user gives is used by some step, else the user would believe what is not so."""
    specs = [spec for cell in cells for spec in cell.steps]
    cure = "Name it in the step, run the method without --recipe, or leave the option out."
    if request.data is not None and all(_ref(spec.step.data) != _ref(request.data) for spec in specs):
        raise ConfigError("No step reads --data", where=f"{request.source}, data {request.data!r}", cure=cure)
    if request.system is None:
        return
    given = parse_system(request.system)
    used = [spec.system for spec in specs if spec.system and wants_system(load_card(spec.step.method))]
    if all(system.base != given.base for system in used):
        raise ConfigError("No step uses --system", where=f"{request.source}, system {given}", cure=cure)


def _check_rank(pipeline: Pipeline, cells: Sequence[CellSpec]) -> None:
    """What the arms are to be ranked by will be measured: said before the run, not behind it."""
    steps = [spec.step for cell in cells for spec in cell.steps]
    attacks = dict.fromkeys(attack_of(step.label["against"]) for step in steps if "against" in step.label)
    attacks |= {c.matrix[key]: None for c in cells for key in c.matrix if is_attack_axis(key)}
    measures = dict.fromkeys(step.id for step in steps if step.verb == "measure")
    check_columns(
        pipeline.rank, [name for name in attacks if name != UNATTACKED], list(measures), pipeline.where
    )


def _plan_cell(cell: CellSpec, options: Options, out: Path, loads: dict[str, Data]) -> Cell:
    folders: dict[str, str] = {}
    steps: list[PlannedStep] = []
    for spec in cell.steps:
        planned = _plan_step(spec, cell.seed, folders, options, out, loads)
        folders[planned.id] = planned.name
        steps.append(planned)
    return Cell(cell.arm, cell.seed, cell.matrix, tuple(steps))


def _plan_step(
    spec: StepSpec, seed: int, folders: Mapping[str, str], options: Options, out: Path, loads: dict[str, Data]
) -> PlannedStep:
    step = spec.step
    card = load_card(step.method)
    check_verb(step.method, card, step.verb)
    check_extras(step.method, card)
    system = spec.system if wants_system(card) else None
    if wants_system(card) and system is None:
        raise ConfigError(
            f"{step.verb} {step.method!r} needs a system", cure="Add system: NAME, or --system NAME."
        )
    if system is not None:
        check_kind(step.method, card, system.base)
    uses = {name: folders[name] for name in spec.uses} if system else {}
    reads = {name: folders[name] for name in spec.reads}
    mentions = {name: folders[name] for name in spec.mentions}
    data = _loaded(spec, loads) if not reads else None
    payload = {
        "step": [step.id, step.verb, step.method, seed],
        "code": code_hash(step.method),
        "settings": core_config.to_dict(spec.config),
        "system": _system_identity(system, uses, out),
        "data": data.fingerprint if data is not None else [_ref(step.data), reads],
        "limit": step.limit,
        "options": options.hashed(),
        **({"mentions": mentions} if mentions else {}),
        **({"label": dict(step.label)} if step.label else {}),
        **({"limits": dict(step.limits)} if step.limits else {}),
    }
    return PlannedStep(
        id=step.id,
        verb=step.verb,
        method=step.method,
        seed=seed,
        config=spec.config,
        origins=spec.origins,
        system=system,
        uses=uses,
        data=step.data,
        reads=reads,
        mentions=mentions,
        limit=step.limit,
        loaded=data,
        hash=_short(payload),
        label=step.label,
        limits=step.limits,
    )


def _loaded(spec: StepSpec, loads: dict[str, Data]) -> Data:
    """The step's data, read once for all cells that want the same."""
    step = spec.step
    card = load_card(step.method)
    key = canonical([_ref(step.data), sorted(wanted_parts(card, step.verb).items()), step.limit, step.method])
    if key not in loads:
        loads[key] = load_inputs(step.method, card, step.verb, step.data, {}, step.limit)
    return loads[key]


def _ref(data: DataRef) -> Json:
    return dict(data) if isinstance(data, Mapping) else data


def _system_identity(system: SystemSpec | None, uses: Mapping[str, str], out: Path) -> Json:
    if system is None:
        return None
    chain = [
        [uses[a.name] if a.name in uses else artefact_digest(locate(a.name, out)), a.strength]
        for a in system.artefacts
    ]
    return [base_identity(system.base), chain]


def _short(value: Json) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:12]
