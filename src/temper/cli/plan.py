"""`temper plan`."""

from __future__ import annotations

from typing import Any

import typer

from temper.cli import requests as req
from temper.cli.output import AsJson, bytes_text, print_json, print_table, say, seconds_text
from temper.core import config as core_config
from temper.run.estimate import Cost, check_cost, estimate
from temper.run.plan import Plan, make_plan

__all__ = ["describe_cost", "plan_command", "plan_record", "register"]


def register(app: typer.Typer, name: str, help_line: str) -> None:
    """Add the command to the app."""
    app.command(name, help=help_line)(plan_command)


def plan_command(
    source: req.Source,
    recipe: req.Recipe = None,
    verb: req.VerbOption = None,
    system: req.SystemOption = None,
    data: req.DataOption = None,
    sets: req.SetOption = None,
    seeds: req.Seeds = None,
    arms: req.Arms = None,
    out: req.Out = "runs",
    device: req.Device = None,
    precision: req.Precision = None,
    base_url: req.BaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Print the cells, the final settings with their origins, and the cost; run nothing."""
    options: dict[str, Any] = {"device": device, "precision": precision, "base_url": base_url}
    plan = make_plan(
        req.build_request(
            source, recipe=recipe, verb=verb, system=system, data=data, sets=sets, seeds=seeds, arms=arms, out=out,
            options=options,
        )
    )  # fmt: skip
    costs = estimate(plan)
    if as_json:
        print_json(plan_record(plan, costs))
    else:
        _print(plan, costs)
    check_cost(plan, costs)


def plan_record(plan: Plan, costs: list[Cost]) -> dict[str, Any]:
    """The plan as JSON."""
    return {
        "name": plan.pipeline.name,
        "hash": plan.hash,
        "options": plan.options.hashed(),
        "cells": [
            {"arm": c.arm, "seed": c.seed, "matrix": dict(c.matrix), "steps": {s.id: s.name for s in c.steps}}
            for c in plan.cells
        ],
        "steps": [
            {
                "name": step.name,
                "verb": step.verb,
                "method": step.method,
                "system": str(step.system) if step.system else None,
                "parts": {p: len(step.loaded[p]) for p in step.loaded} if step.loaded is not None else None,
                "settings": {
                    key: {"value": value, "origin": step.origins[key]}
                    for key, value in core_config.to_dict(step.config).items()
                },
            }
            for step in plan.steps
        ],
        "costs": [cost._asdict() for cost in costs],
    }


def describe_cost(costs: list[Cost]) -> str:
    """One line: time, memory and disk of all steps."""
    seconds = sum(c.seconds for c in costs if c.seconds is not None)
    num_unknown = sum(c.seconds is None for c in costs)
    more = f" and {num_unknown} steps of unknown length" if num_unknown else ""
    time = "unknown" if num_unknown == len(costs) else seconds_text(seconds) + more
    memory = (
        None
        if any(c.memory_bytes is None for c in costs)
        else max((c.memory_bytes or 0 for c in costs), default=0)
    )
    disk = sum(c.disk_bytes for c in costs)
    return f"a guess: {time}, {bytes_text(memory)} of memory, {bytes_text(disk)} of disk"


def _print(plan: Plan, costs: list[Cost]) -> None:
    rows = [(cell.label, step.id, step.verb, step.method, step.system, _parts(step.loaded), step.hash)
            for cell in plan.cells for step in cell.steps]  # fmt: skip
    print_table(("cell", "step", "verb", "method", "system", "data", "hash"), rows, plan.pipeline.name)
    print()
    seen: set[str] = set()
    for step in plan.steps:
        if step.settings_hash in seen:
            continue
        seen.add(step.settings_hash)
        settings = core_config.to_dict(step.config).items()
        print_table(
            ("setting", "value", "from"), [(k, repr(v), step.origins[k]) for k, v in settings], step.name
        )
        print()
    shown = [(c.label, c.tokens, seconds_text(c.seconds), bytes_text(c.memory_bytes), bytes_text(c.disk_bytes))
             for c in costs]  # fmt: skip
    print_table(("step", "tokens", "time", "memory", "disk"), shown)
    say(f"{len(plan.cells)} cells, {len(plan.steps)} different steps; {describe_cost(costs)}")


def _parts(data: Any) -> str:
    return "from a step" if data is None else ", ".join(f"{p}: {len(data[p])}" for p in data) or "none"
