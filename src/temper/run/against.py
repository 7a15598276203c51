"""`against:` of a fit step: the fit attacked as a matter of course, and the plain system attacked with the same budget.

A fit step F with opponents becomes more steps. An opponent that fits (it changes weights) gives, for each budget, one
step on the system with F and a twin on the one without; every measure step whose system ends in F then also looks at both,
and at the plain system. An opponent that attacks (it searches inputs) gives one step on either system. Rows of these
steps say whom they are about: `against` among their facts. What an opponent may spend (`budget`) is the same for both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from temper.core.budget import UNITS
from temper.core.errors import ConfigError
from temper.core.spec import ArtefactRef, SystemSpec, parse_system
from temper.core.types import Json
from temper.run.budgets import attack_of
from temper.run.recipe import BASE, Opponent, Step

__all__ = ["UNATTACKED", "attack_name", "with_opponents"]

UNATTACKED = "none"
"""The opponent that rows of a plain system name which nobody attacked."""


def attack_name(label: Mapping[str, Json]) -> str:
    """The attack that a label is about, and whether the fit was there: "relearn num_steps 20, plain"."""
    return attack_of(label) + ("" if label["defended"] else ", plain")


def with_opponents(steps: Sequence[Step], where: str) -> tuple[Step, ...]:
    """The steps, and behind them those that the opponents of each fit add. Raises ConfigError."""
    out = list(steps)
    for step in steps:
        if step.against:
            out += _added(step, steps, where)
    ids = [step.id for step in out]
    if twice := next((name for name in ids if ids.count(name) > 1), None):
        raise ConfigError(
            f"Step id {twice!r} stands twice: against makes a step of this name",
            where=where,
            cure="Rename yours.",
        )
    return tuple(out)


def _added(fit: Step, steps: Sequence[Step], where: str) -> Iterator[Step]:
    place = f"{where}: {fit.id}: against"
    looks = [step for step in steps if step.verb == "measure" and _ends_in(step.system, fit.id)]
    if not looks and any(opponent.verb == "fit" for opponent in fit.against):
        raise ConfigError(
            f"No measure step looks at {fit.id!r}, so nobody would see what the attack did",
            where=place,
            cure=f"Add - {{measure: SLUG, system: base+{fit.id}}}.",
        )
    defended = str(_with(fit.system, fit.id))
    for look in looks:
        yield _look(look, f"{look.id}-plain", _without(look.system), UNATTACKED, None, is_defended=False)
    for opponent in fit.against:
        for budget in opponent.budgets or ({},):
            name = "-".join([opponent.id, *(_text(value) for value in budget.values())])
            for is_defended in (True, False):
                system = defended if is_defended else fit.system or BASE
                attack = _attack(
                    opponent, budget, f"{fit.id}-{name}{'' if is_defended else '-plain'}", system
                )
                yield dataclasses.replace(attack, label=_label(opponent.id, budget, is_defended))
                for look in looks if opponent.verb == "fit" else ():
                    seen = look.system if is_defended else _without(look.system)
                    look_id = f"{look.id}-{attack.id}"
                    yield _look(
                        look, look_id, _with(seen, attack.id), opponent.id, budget, is_defended=is_defended
                    )


def _attack(opponent: Opponent, budget: Mapping[str, Json], step_id: str, system: str) -> Step:
    settings = {name: value for name, value in budget.items() if name not in UNITS}
    limits = {name: value for name, value in budget.items() if name in UNITS}
    return Step(
        id=step_id,
        verb=opponent.verb,
        method=opponent.method,
        system=system,
        data=opponent.data,
        settings={**opponent.settings, **settings},
        limit=opponent.limit,
        limits={**opponent.limits, **limits},
    )


def _look(
    look: Step,
    step_id: str,
    system: SystemSpec,
    opponent: str,
    budget: Mapping[str, Json] | None,
    *,
    is_defended: bool,
) -> Step:
    label = _label(opponent, budget or {}, is_defended, look.id)
    return dataclasses.replace(look, id=step_id, system=str(system), label={**look.label, **label})


def _label(opponent: str, budget: Mapping[str, Json], is_defended: bool, look: str = "") -> dict[str, Json]:
    """`look` is the step that measures the same of the fit unattacked."""
    label = {"opponent": opponent, "budget": dict(budget), "defended": is_defended, "look": look}
    return {"against": label}


def _text(value: Json) -> str:
    return str(value).replace(".", "_").replace("-", "m")


def _ends_in(system: str | None, name: str) -> bool:
    """Whether the fit stands last and at full strength: an attack on it fits no other system."""
    artefacts = parse_system(system or BASE).artefacts
    return bool(artefacts) and artefacts[-1] == ArtefactRef(name)


def _with(system: str | SystemSpec | None, name: str) -> SystemSpec:
    spec = system if isinstance(system, SystemSpec) else parse_system(system or BASE)
    return SystemSpec(spec.base, (*spec.artefacts, ArtefactRef(name)))


def _without(system: str | None) -> SystemSpec:
    """The system without its last artefact."""
    spec = parse_system(system or BASE)
    return SystemSpec(spec.base, spec.artefacts[:-1])
