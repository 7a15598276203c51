"""`matrix` of a recipe: lists to go through, a key each. `STEP.setting` varies a setting, `STEP.VERB` a step's method.

Methods that fit, make or measure give arms: each is a column, ranked and tested like any other. Attacks stay a choice of
the matrix: attacks by defences is the map.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from temper.core.card import VERBS, Verb
from temper.core.errors import ConfigError, nearest
from temper.core.registry import load_card, slugs
from temper.core.types import Json, Row

if TYPE_CHECKING:
    from temper.run.recipe import Step

__all__ = [
    "Choice",
    "attack_chosen",
    "each_once",
    "is_attack_axis",
    "own_choices",
    "parse_matrix",
    "with_methods",
]

Arms = Mapping[str, Mapping[str, Json]]
"""Arm -> {step id: changes, or None to leave the step out}."""
EXAMPLE = "Write e.g. forget.fit: [npo, {flat: {divergence: kl}}]."


class Choice(NamedTuple):
    """A method for a step, and settings of its own."""

    name: str
    verb: Verb
    method: str
    settings: Mapping[str, Json]

    def joined(self, changes: Mapping[str, Json], step_id: str) -> Mapping[str, Json]:
        """An arm's changes and this one; a step that the arm leaves out stays out."""
        change = changes.get(step_id, {})
        if change is None:
            return changes
        settings = {**(change.get("settings") or {}), **self.settings}
        return {**changes, step_id: {**change, self.verb: self.method, "settings": settings}}


def parse_matrix(raw: Json, steps: Sequence[Step], where: str) -> dict[str, tuple[Json, ...]]:
    """Each key's values; where it is STEP.VERB they are Choices. Raises ConfigError."""
    if not isinstance(raw or {}, Mapping):
        raise ConfigError(f"{raw!r} is not a mapping", where=f"{where}: matrix", cure="Write key: [values].")
    out: dict[str, tuple[Json, ...]] = {}
    for key, values in (raw or {}).items():
        if not isinstance(values, list) or not values:
            raise ConfigError(
                f"matrix {key!r} is not a list", where=where, cure="Write e.g. seed: [0, 1, 2]."
            )
        step_id, _, verb = key.rpartition(".")
        if verb not in VERBS:
            out[key] = tuple(values)
            continue
        step = _step(step_id, verb, steps, f"{where}: matrix {key}")
        out[f"{step.id}.{verb}"] = _choices(values, step.verb, f"{where}: matrix {key}")
    if bad := [s for s in out.get("seed", ()) if not isinstance(s, int) or isinstance(s, bool) or s < 0]:
        raise ConfigError(f"Seed {bad[0]!r} is not a whole number >= 0", where=f"{where}: matrix")
    return out


def _step(step_id: str, verb: str, steps: Sequence[Step], where: str) -> Step:
    """The step whose method a key names; a recipe with one step need not name it."""
    known = {step.id: step for step in steps} | ({"": steps[0]} if len(steps) == 1 else {})
    if step_id not in known:
        if any(step_id == opponent.id for step in steps for opponent in step.against):
            cure = "Opponents are a list already: add one to `against`."
        else:
            cure = nearest(step_id, [step.id for step in steps]) or "Write STEP.fit: [SLUG, SLUG]."
        raise ConfigError(f"There is no step {step_id!r}", where=where, cure=cure)
    step = known[step_id]
    if step.verb != verb:
        raise ConfigError(
            f"The verb of step {step.id!r} is not {verb}", where=where, cure=f"Write {step.id}.{step.verb}."
        )
    return step


def _choices(values: Sequence[Json], verb: Verb, where: str) -> tuple[Choice, ...]:
    """Named by the method, and by settings in which choices of the same method differ."""
    found = [_choice(value, verb, where) for value in values]
    named = []
    for choice in found:
        same = [other.settings for other in found if other.method == choice.method]
        told = {k: v for k, v in choice.settings.items() if any(o.get(k) != v for o in same)}
        named.append(choice._replace(name=" ".join([choice.method, *(f"{k}={v}" for k, v in told.items())])))
    names = [choice.name for choice in named]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{twice[0]!r} stands twice", where=where, cure="Keep one.")
    return tuple(named)


def _choice(value: Json, verb: Verb, where: str) -> Choice:
    pairs = list(value.items()) if isinstance(value, Mapping) else [(value, {})]
    slug, settings = pairs[0] if len(pairs) == 1 else (value, {})
    if not isinstance(slug, str) or not isinstance(settings or {}, Mapping):
        raise ConfigError(f"{value!r} is no method with its settings", where=where, cure=EXAMPLE)
    if slug not in slugs():
        raise ConfigError(
            f"There is no method {slug!r}", where=where, cure=nearest(slug, slugs()) or "See `temper list`."
        )
    offered = load_card(slug).verbs
    if verb not in offered:
        raise ConfigError(
            f"{slug!r} has no verb {verb!r}", where=where, cure=f"It offers: {', '.join(offered)}."
        )
    return Choice(slug, verb, slug, settings or {})


def with_methods(
    arms: Arms, matrix: Mapping[str, tuple[Json, ...]], where: str
) -> tuple[Arms, dict[str, tuple[Json, ...]]]:
    """The arms with each method that a step can have, "ARM/METHOD", and the axes that are left. Raises ConfigError."""
    left = dict(matrix)
    for key, values in matrix.items():
        step_id = key.rpartition(".")[0]
        if not isinstance(values[0], Choice):
            continue
        _check_arms(arms, step_id, f"{where}: matrix {key}")
        if is_attack_axis(key):
            continue
        del left[key]
        arms = dict(_crossed(arms or {"": {}}, step_id, values))
    return arms, left


def _crossed(arms: Arms, step_id: str, values: Sequence[Choice]) -> Iterable[tuple[str, Mapping[str, Json]]]:
    for arm, changes in arms.items():
        if step_id in changes and changes[step_id] is None:
            yield arm, changes
            continue
        for choice in values:
            yield f"{arm}/{choice.name}".removeprefix("/"), choice.joined(changes, step_id)


def _check_arms(arms: Arms, step_id: str, where: str) -> None:
    for arm, changes in arms.items():
        if any(verb in (changes.get(step_id) or {}) for verb in VERBS):
            raise ConfigError(
                f"The arm {arm!r} and the matrix both choose the method of step {step_id!r}",
                where=where,
                cure="Keep one of the two.",
            )


def is_attack_axis(key: str) -> bool:
    """Whether a key of the matrix varies the method of an attack."""
    return key.rpartition(".")[2] == "attack"


def attack_chosen(row: Row) -> str:
    """The attack that the matrix chose for the row's own step; "" where it did not."""
    return str((row.facts.get("matrix") or {}).get(f"{row.facts.get('step')}.attack", ""))


def own_choices(row: Row) -> dict[str, Json]:
    """The row's choices of the matrix, without attacks of other steps, which decide their own rows alone."""
    own = f"{row.facts.get('step')}.attack"
    chosen = (row.facts.get("matrix") or {}).items()
    return {key: value for key, value in chosen if key == own or not is_attack_axis(key)}


def each_once(rows: Iterable[Row]) -> list[Row]:
    """The rows without those that come again because several choices of the matrix share a step of an arm."""
    first: dict[tuple[Json, str], Json] = {}
    return [
        row
        for row in rows
        if not row.facts.get("step_hash")
        or first.setdefault((row.facts["step_hash"], row.arm), row.facts.get("matrix"))
        == row.facts.get("matrix")
    ]
