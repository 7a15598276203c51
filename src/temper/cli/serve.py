"""`temper serve`, which is coming."""

from __future__ import annotations

import typer

from temper.cli.output import say

__all__ = ["register", "serve_command"]


def register(app: typer.Typer, name: str, help_line: str) -> None:
    """Add the command to the app."""
    app.command(name, help=help_line)(serve_command)


def serve_command() -> None:
    """Say that it is coming, and exit 2."""
    say("temper: serve is coming; until then use a system from Python: temper.run.resolve.open_system(SPEC)")
    raise typer.Exit(2)
