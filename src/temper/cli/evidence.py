"""`temper evidence`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from temper.cli.output import AsJson, number, print_json
from temper.cli.show import claim_record
from temper.core.registry import find, load_card, slugs
from temper.run.evidence import findings

__all__ = ["evidence_command", "register"]


def register(app: typer.Typer, name: str, help_line: str) -> None:
    """Add the command to the app."""
    app.command(name, help=help_line)(evidence_command)


def evidence_command(
    slug: Annotated[str | None, typer.Argument(help="A method's slug; all methods without.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print each claim with the paper's figures, ours, and the verdict computed from the rows."""
    chosen = [find(slug).slug] if slug else slugs()
    records = [{"slug": name, **record} for name in chosen for record in _claims(name)]
    if as_json:
        print_json(records)
        return
    for record in records:
        print("\n".join(_lines(record)) + "\n")
    counts = {v: sum(r["verdict"] == v for r in records) for v in ("shown", "contradicted", "not shown")}
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))


def _claims(slug: str) -> list[dict[str, Any]]:
    return [claim_record(c, f) for c, f in zip(load_card(slug).claims, findings(slug), strict=True)]


def _lines(record: dict[str, Any]) -> list[str]:
    out = [f"{record['slug']} / {record['claim']}: {record['verdict'].upper()}", f"  {record['sentence']}"]
    out.append(f"  paper: {record['paper'] or 'no figure'}")
    for arm in record["arms"]:
        out.append(f"  ours:  {arm['arm'] or 'mean'} {record['metric']} = {number(arm['mean'])}")
    if record["difference"] is not None:
        interval = (
            f"[{number(record['low'])}, {number(record['high'])}]"
            if record["low"] is not None
            else "no interval"
        )
        base = record["baseline"]
        out.append(
            f"  {record['arm'] or 'arm'} - {base} = {number(record['difference'])}, 95% {interval}, "
            f"{record['n']} {record['pairing']}, seeds {', '.join(map(str, record['seeds']))}"
        )
    out.append(f"  {record['verdict']}: {record['reason']}")
    return out
