"""`temper list`."""

from __future__ import annotations

from typing import Annotated

import typer

from temper.cli.output import AsJson, print_json, print_table
from temper.core.card import VERBS
from temper.core.errors import ConfigError, nearest
from temper.core.registry import entries, load_card

__all__ = ["list_methods", "register"]


def register(app: typer.Typer, name: str, help_line: str) -> None:
    """Add the command to the app."""
    app.command(name, help=help_line)(list_methods)


def list_methods(
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    verb: Annotated[str | None, typer.Option(help="Only methods with this verb.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print the methods found in folders."""
    found = entries()
    families = {entry.family for entry in found.values()}
    if family is not None and family not in families:
        raise ConfigError(f"There is no family {family!r}", cure=nearest(family, families))
    if verb is not None and verb not in VERBS:
        raise ConfigError(f"There is no verb {verb!r}", cure=nearest(verb, VERBS))
    rows = []
    for slug, entry in found.items():
        card = load_card(slug)
        if (family is None or entry.family == family) and (verb is None or verb in card.verbs):
            rows.append(
                {
                    "slug": slug,
                    "family": entry.family,
                    "verbs": list(card.verbs),
                    "title": card.title,
                    "paper": card.paper,
                    "produces": list(card.produces),
                    "needs": sorted(card.needs),
                }
            )
    if as_json:
        print_json(rows)
        return
    columns = ("slug", "family", "verbs", "title")
    print_table(columns, [(r["slug"], r["family"], " ".join(r["verbs"]), r["title"]) for r in rows])
