"""`temper show`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from temper.cli.output import AsJson, number, print_json, print_table
from temper.core import config as core_config
from temper.core.card import Claim
from temper.core.registry import find, load_card, load_story
from temper.run.evidence import findings
from temper.run.recipe import recipe_names
from temper.run.verdicts import Finding

__all__ = ["claim_record", "register", "show_command"]


def register(app: typer.Typer, name: str, help_line: str) -> None:
    """Add the command to the app."""
    app.command(name, help=help_line)(show_command)


def show_command(
    slug: Annotated[str, typer.Argument(help="A method's slug, see `temper list`.")], as_json: AsJson = False
) -> None:
    """Print a method's story, its settings, its claims with their verdicts, and its recipes."""
    record = _record(slug)
    if as_json:
        print_json(record)
        return
    print(f"{record['slug']} ({record['family']}): {', '.join(record['verbs'])}\n")
    print(record["story"].strip() + "\n")
    settings = [
        (s["name"], s["type"], json.dumps(s["default"]), _first_line(s["doc"])) for s in record["settings"]
    ]
    print_table(("setting", "type", "default", "meaning"), settings, "Settings")
    print()
    claims = [
        (c["claim"], c["verdict"], number(c["difference"]), _first_line(c["sentence"]))
        for c in record["claims"]
    ]
    print_table(("claim", "verdict", "difference", "sentence"), claims, "Claims")
    print()
    for name in record["recipes"]:
        print(f"temper run {record['slug']} --recipe {name}")


def _record(slug: str) -> dict[str, Any]:
    entry = find(slug)
    card = load_card(entry.slug)
    return {
        "slug": entry.slug,
        "family": entry.family,
        "title": card.title,
        "paper": card.paper,
        "verbs": list(card.verbs),
        "kinds": list(card.kinds),
        "needs": sorted(card.needs),
        "data": {verb: dict(parts) for verb, parts in card.data.items()},
        "produces": list(card.produces),
        "story": load_story(entry.slug),
        "settings": [_setting(field) for field in core_config.describe(card.config)],
        "claims": [claim_record(c, f) for c, f in zip(card.claims, findings(entry.slug), strict=True)],
        "recipes": recipe_names(entry.slug) if entry.file("recipes.yaml").exists() else [],
    }


def _setting(field: core_config.FieldHelp) -> dict[str, Any]:
    default = list(field.default) if isinstance(field.default, tuple | frozenset) else field.default
    return {"name": field.name, "type": field.type, "default": default, "doc": field.doc}


def claim_record(claim: Claim, finding: Finding) -> dict[str, Any]:
    """A claim beside its finding, as JSON."""
    return {
        "claim": claim.id,
        "sentence": claim.sentence,
        "metric": claim.metric,
        "arm": claim.arm,
        "baseline": claim.baseline,
        "direction": claim.direction,
        "margin": claim.margin,
        "paper": claim.paper,
        "verdict": finding.verdict,
        "reason": finding.reason,
        "arms": [arm._asdict() for arm in finding.arms],
        "difference": finding.difference,
        "low": finding.low,
        "high": finding.high,
        "n": finding.n,
        "pairing": finding.pairing,
        "seeds": list(finding.seeds),
    }


def _first_line(text: str) -> str:
    return " ".join(text.split())
