"""`temper index`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from temper.cli.output import AsJson, print_json, print_table, say
from temper.store.index import index_path, query, rebuild

__all__ = ["index_command", "register"]

SUMMARY = """select runs.id, name, status, created, count(rows.run) as num_rows
             from runs left join rows on rows.run = runs.id group by runs.id order by created, runs.id"""


def register(app: typer.Typer, name: str, help_line: str) -> None:
    """Add the command to the app."""
    app.command(name, help=help_line)(index_command)


def index_command(
    out: Annotated[str, typer.Option(help="Folder of runs.")] = "runs", as_json: AsJson = False
) -> None:
    """Rebuild the index and print the runs it holds; exit 1 when one of them is damaged."""
    folder = Path(out)
    indexed = rebuild(folder)
    runs = list(query(folder, SUMMARY))
    if as_json:
        print_json({"index": str(index_path(folder)), "runs": runs, "damaged": indexed.damaged})
    else:
        columns = ("id", "name", "status", "created", "num_rows")
        print_table(columns, [tuple(run[name] for name in columns) for run in runs])
        print(index_path(folder))
    for message in indexed.damaged:
        say(f"temper: damaged: {message}")
    if indexed.damaged:
        raise typer.Exit(1)
