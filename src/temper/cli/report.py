"""`temper report`."""

from __future__ import annotations

from typing import Annotated

import typer

from temper.cli.compare import open_run
from temper.cli.output import AsJson, print_json

__all__ = ["register", "report_command"]


def register(app: typer.Typer, name: str, help_line: str) -> None:
    """Add the command to the app."""
    app.command(name, help=help_line)(report_command)


def report_command(
    run: Annotated[str, typer.Argument(help="A run's folder or id.")],
    out: Annotated[str, typer.Option(help="Folder of runs.")] = "runs",
    as_json: AsJson = False,
) -> None:
    """Write `report.html` into the run's folder and print where it is."""
    folder = open_run(run, out)
    from temper.report.page import write_report

    path = write_report(folder.path)
    if as_json:
        print_json({"run": folder.id, "report": str(path)})
    else:
        print(path)
