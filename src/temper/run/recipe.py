"""Recipes: YAML -> Pipeline. A recipe holds values only; what is unknown in it stops with the nearest name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from temper.core.card import VERBS, Verb
from temper.core.errors import ConfigError, nearest
from temper.core.registry import find, load_card
from temper.core.types import Json
from temper.run.axes import parse_matrix, with_methods
from temper.run.budgets import parse_budget
from temper.run.ranking import Column, parse_rank
from temper.run.strict_yaml import load_yaml

__all__ = [
    "DataRef",
    "Opponent",
    "Pipeline",
    "Step",
    "load_recipe",
    "method_defaults",
    "parse_recipe",
    "recipe_names",
    "with_arm",
]

DataRef = str | Mapping[str, str] | None

STEP_KEYS = ("id", *VERBS, "system", "data", "settings", "limit", "against")
OPPONENT_KEYS = ("id", "fit", "attack", "data", "settings", "limit", "budget")
TOP_KEYS = (
    "name",
    "about",
    "system",
    "data",
    "settings",
    "verb",
    "limit",
    "matrix",
    "steps",
    "arms",
    "options",
    "against",
    "rank",
)
OPTION_KEYS: dict[str, type] = {
    "precision": str,
    "exact": bool,
    "batch_tokens": int,
    "checkpoint_every": int,
    "system_prompt": str,
}
BASE = "base"


@dataclass(frozen=True, kw_only=True)
class Opponent:
    """An attack on a fit: a method that changes weights (fit) or searches inputs (attack), and what it may spend."""

    id: str
    verb: Verb
    method: str
    data: DataRef = None
    settings: Mapping[str, Json] = field(default_factory=dict)
    limit: int | None = None
    budgets: tuple[Mapping[str, Json], ...] = ()
    """Settings or limits of each attempt, e.g. {num_steps: 5}, {num_steps: 20}; () for one attempt."""
    limits: Mapping[str, float] = field(default_factory=dict)
    """The most that any attempt may spend, by unit."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One verb of one method on a system and data."""

    id: str
    verb: Verb
    method: str
    system: str | None = None
    """A system spec; "base" stands for the recipe's system, step ids for their artefacts. None = the recipe's."""
    data: DataRef = None
    """A data spec, or {part: spec}; a step id stands for what it made. None = the recipe's."""
    settings: Mapping[str, Json] = field(default_factory=dict)
    limit: int | None = None
    """At most so many records a part."""
    against: tuple[Opponent, ...] = ()
    """Who attacks what a fit leaves, see `run/against.py`."""
    label: Mapping[str, Json] = field(default_factory=dict)
    """Further facts of the step's rows."""
    limits: Mapping[str, float] = field(default_factory=dict)
    """The most it may spend, by unit; see `core/budget.py`."""


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A recipe, checked for form but not yet for what it names."""

    name: str
    where: str
    """The file and recipe it came from, for messages."""
    method: str = ""
    """The slug whose recipe it is, or ""."""
    steps: tuple[Step, ...] = ()
    arms: Mapping[str, Mapping[str, Json]] = field(default_factory=dict)
    """Arm -> {step id: changes, or None to leave the step out}. Without arms there is one, named ""."""
    matrix: Mapping[str, tuple[Json, ...]] = field(default_factory=dict)
    system: str | None = None
    data: DataRef = None
    limit: int | None = None
    options: Mapping[str, Json] = field(default_factory=dict)
    rank: tuple[Column, ...] = ()
    """What the arms are ranked by; see `run/ranking.py`."""

    @property
    def is_short(self) -> bool:
        return len(self.steps) == 1


def recipe_names(slug: str) -> list[str]:
    """The recipes a method offers, in file order."""
    return list(_document(slug))


def _document(slug: str) -> Mapping[str, Json]:
    path = find(slug).file("recipes.yaml")
    return _mapping(_read(path), str(path))


def _read(path: Path) -> Json:
    try:
        return load_yaml(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise ConfigError("There is no such recipe file", where=str(path), cure="Check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The recipe file cannot be read: {error}", where=str(path)) from None


def load_recipe(source: str, recipe: str = "small") -> Pipeline:
    """The pipeline in a .yaml file, or a method's recipe by slug; raises ConfigError."""
    if source.endswith((".yaml", ".yml")):
        path = Path(source)
        return parse_recipe(_mapping(_read(path), str(path)), name=path.stem, where=str(path))
    slug = find(source).slug
    document = _document(slug)
    if recipe not in document:
        raise ConfigError(f"{slug!r} has no recipe {recipe!r}", cure=nearest(recipe, document))
    where = f"{find(slug).file('recipes.yaml')}: {recipe}"
    return parse_recipe(_mapping(document[recipe], where), name=f"{slug}-{recipe}", where=where, method=slug)


def method_defaults(slug: str, verb: str | None = None) -> Pipeline:
    """One step with a method's default settings: its first verb, or `verb`."""
    spec: dict[str, Json] = {"verb": verb} if verb else {}
    return parse_recipe(spec, name=find(slug).slug, where=f"defaults of {slug}", method=find(slug).slug)


def parse_recipe(document: Mapping[str, Json], *, name: str, where: str, method: str = "") -> Pipeline:
    """A pipeline from a recipe's mapping; raises ConfigError for anything unknown or malformed."""
    _known(document, TOP_KEYS, where)
    if "steps" in document:
        for key in ("settings", "verb"):
            if key in document:
                raise ConfigError(f"{key!r} stands beside steps", where=where, cure="Move it into a step.")
        steps = _steps(document["steps"], where)
    else:
        steps = (_short_step(document, method, where),)
    steps = _with_against(steps, document.get("against"), where)
    matrix = parse_matrix(document.get("matrix"), steps, where)
    arms, matrix = with_methods(_arms(document.get("arms"), steps, where), matrix, where)
    return Pipeline(
        name=_text(document.get("name"), f"{where}: name") or name,
        where=where,
        method=method,
        steps=steps,
        arms=arms,
        matrix=matrix,
        system=_text(document.get("system"), f"{where}: system"),
        data=_data(document.get("data"), f"{where}: data"),
        limit=_limit(document.get("limit"), where),
        options=_options(document.get("options"), where),
        rank=parse_rank(document.get("rank"), f"{where}: rank"),
    )


def _short_step(document: Mapping[str, Json], method: str, where: str) -> Step:
    if not method:
        raise ConfigError("The recipe has no steps", where=where, cure="Add steps: [{id: ..., fit: SLUG}].")
    card = load_card(method)
    verb = document.get("verb") or card.verbs[0]
    if verb not in card.verbs:
        raise ConfigError(
            f"{method!r} has no verb {verb!r}", where=where, cure=f"It offers: {', '.join(card.verbs)}."
        )
    settings = _mapping(document.get("settings") or {}, f"{where}: settings")
    return Step(id=verb, verb=verb, method=method, settings=settings)


def _steps(raw: Json, where: str) -> tuple[Step, ...]:
    if not isinstance(raw, list) or not raw:
        raise ConfigError("steps is not a list of steps", where=where, cure="Write - {id: ..., fit: SLUG}.")
    steps = tuple(
        _parse_step(_mapping(item, f"{where}: step {n}"), f"{where}: step {n}")
        for n, item in enumerate(raw, 1)
    )
    ids = [step.id for step in steps]
    if twice := sorted({i for i in ids if ids.count(i) > 1}):
        raise ConfigError(f"Step id {twice[0]!r} stands twice", where=where, cure="Rename one.")
    return steps


def _parse_step(raw: Mapping[str, Json], where: str) -> Step:
    """One step; exactly one verb key names the method."""
    _known(raw, STEP_KEYS, where)
    verbs = [verb for verb in VERBS if verb in raw]
    if len(verbs) != 1:
        raise ConfigError(
            f"A step names exactly one verb, this one {len(verbs)}",
            where=where,
            cure=f"Write one of {', '.join(VERBS)}: SLUG.",
        )
    verb = verbs[0]
    method = _text(raw[verb], f"{where}: {verb}") or ""
    step_id = _text(raw.get("id"), f"{where}: id") or method
    if not re.fullmatch(r"[A-Za-z][\w-]*", step_id) or step_id == BASE:
        raise ConfigError(
            f"{step_id!r} is not a step id",
            where=where,
            cure="Use letters, digits, - and _; `base` is taken.",
        )
    if raw.get("against") and verb != "fit":
        raise ConfigError(
            "`against` stands at a fit: that is what is attacked", where=where, cure="Move it there."
        )
    return Step(
        id=step_id,
        verb=verb,
        method=method,
        system=_text(raw.get("system"), f"{where}: system"),
        data=_data(raw.get("data"), f"{where}: data"),
        settings=_mapping(raw.get("settings") or {}, f"{where}: settings"),
        limit=_limit(raw.get("limit"), where),
        against=_opponents(raw.get("against") or [], f"{where}: against"),
    )


def _with_against(steps: tuple[Step, ...], raw: Json, where: str) -> tuple[Step, ...]:
    """A recipe's own opponents go to its last fit."""
    opponents = _opponents(raw or [], f"{where}: against")
    fits = [number for number, step in enumerate(steps) if step.verb == "fit"]
    if not opponents:
        return steps
    if not fits or steps[fits[-1]].against:
        raise ConfigError(
            "`against` has no fit to go to",
            where=where,
            cure="Write it once, at a fit or at the recipe's top.",
        )
    last = dataclasses.replace(steps[fits[-1]], against=opponents)
    return (*steps[: fits[-1]], last, *steps[fits[-1] + 1 :])


def _opponents(raw: Json, where: str) -> tuple[Opponent, ...]:
    if isinstance(raw, tuple):
        return raw
    if not isinstance(raw, list):
        raise ConfigError("against is not a list", where=where, cure="Write - {fit: SLUG, budget: {...}}.")
    found = tuple(_opponent(_mapping(item, f"{where} {n}"), f"{where} {n}") for n, item in enumerate(raw, 1))
    names = [opponent.id for opponent in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"Opponent {twice[0]!r} stands twice", where=where, cure="Give each an id of its own."
        )
    return found


def _opponent(raw: Mapping[str, Json], where: str) -> Opponent:
    _known(raw, OPPONENT_KEYS, where)
    verbs: list[Verb] = [verb for verb in VERBS if verb in raw]
    if len(verbs) != 1:
        raise ConfigError("An opponent has one verb", where=where, cure="Write fit: SLUG or attack: SLUG.")
    method = _text(raw[verbs[0]], where) or ""
    budgets, limits = parse_budget(raw.get("budget"), where)
    return Opponent(
        id=_text(raw.get("id"), f"{where}: id") or method,
        verb=verbs[0],
        method=method,
        data=_data(raw.get("data"), f"{where}: data"),
        settings=_mapping(raw.get("settings") or {}, f"{where}: settings"),
        limit=_limit(raw.get("limit"), where),
        budgets=budgets,
        limits=limits,
    )


def _arms(raw: Json, steps: tuple[Step, ...], where: str) -> Mapping[str, Mapping[str, Json]]:
    arms: dict[str, Mapping[str, Json]] = {}
    ids = [step.id for step in steps]
    for name, changes in _mapping(raw or {}, f"{where}: arms").items():
        changes = _mapping(changes or {}, f"{where}: arm {name}")
        if len(steps) == 1 and changes and not set(changes) & set(ids):
            changes = {ids[0]: changes}  # the short form of a recipe with one step
        for step_id in changes:
            if step_id not in ids:
                raise ConfigError(
                    f"There is no step {step_id!r}", where=f"{where}: arm {name}", cure=nearest(step_id, ids)
                )
        arms[name] = changes
        with_arm(steps, changes, f"{where}: arm {name}")
    return arms


def with_arm(steps: tuple[Step, ...], changes: Mapping[str, Json], where: str) -> tuple[Step, ...]:
    """The steps as an arm changes them; settings are merged by key in `run.settings`, not here."""
    out: list[Step] = []
    for step in steps:
        if step.id not in changes:
            out.append(step)
        elif changes[step.id] is not None:
            out.append(
                _changed(step, _mapping(changes[step.id], f"{where}: {step.id}"), f"{where}: {step.id}")
            )
    return tuple(out)


def _changed(step: Step, change: Mapping[str, Json], where: str) -> Step:
    raw: dict[str, Any] = {"id": step.id, step.verb: step.method, "system": step.system, "data": step.data}
    raw |= {"limit": step.limit, "against": step.against}
    if any(verb in change for verb in VERBS):
        raw.pop(step.verb)
        raw["settings"] = {}
    changed = _parse_step(raw | {k: v for k, v in change.items() if k != "settings"}, where)
    _mapping(change.get("settings") or {}, f"{where}: settings")
    # Settings meant for one method say nothing to another.
    keep = step.settings if changed.method == step.method else {}
    return dataclasses.replace(changed, settings=keep)


def _options(raw: Json, where: str) -> Mapping[str, Json]:
    options = _mapping(raw or {}, f"{where}: options")
    _known(options, tuple(OPTION_KEYS), f"{where}: options")
    for key, value in options.items():
        if type(value) is not OPTION_KEYS[key]:
            raise ConfigError(
                f"{key} = {value!r} is not {OPTION_KEYS[key].__name__}", where=f"{where}: options"
            )
    return options


def _limit(raw: Json, where: str) -> int | None:
    if raw is not None and (not isinstance(raw, int) or isinstance(raw, bool) or raw < 1):
        raise ConfigError(f"limit {raw!r} is not a whole number >= 1", where=where)
    return raw


def _data(raw: Json, where: str) -> DataRef:
    if isinstance(raw, Mapping):
        if not raw:
            raise ConfigError("data names no part", where=where, cure="Write {part: spec}.")
        return {part: _text(spec, f"{where}.{part}") or "" for part, spec in raw.items()}
    return _text(raw, where)


def _text(raw: Json, where: str) -> str | None:
    if raw is None or (isinstance(raw, str) and raw.strip()):
        return raw
    raise ConfigError(f"{raw!r} is not text", where=where, cure="Write a name.")


def _mapping(raw: Json, where: str) -> dict[str, Json]:
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{raw!r} is not a mapping", where=where, cure="Write key: value pairs.")
    return dict(raw)


def _known(raw: Mapping[str, Json], known: tuple[str, ...], where: str) -> None:
    for key in raw:
        if key not in known:
            raise ConfigError(f"Unknown key {key!r}", where=where, cure=nearest(key, known))
