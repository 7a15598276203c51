"""The page of commands and the README's table of them, from the command line itself."""

from __future__ import annotations

import importlib
from typing import Any

import typer

from generators.markdown import NOTE, cell, table
from temper.cli.main import COMMANDS

__all__ = ["command_page", "command_table"]


def _top() -> None:
    """Options stand with the commands."""


def _commands() -> dict[str, Any]:
    app = typer.Typer(name="temper", add_completion=False)
    app.callback()(_top)
    for name, help_line in COMMANDS.items():
        importlib.import_module(f"temper.cli.{name}").register(app, name, help_line)
    group: Any = typer.main.get_command(app)
    return {name: group.commands[name] for name in COMMANDS}


def command_table() -> str:
    """Every command with its line of help."""
    return table(("command", "what it does"), [(f"`temper {n}`", cell(text)) for n, text in COMMANDS.items()])


def command_page() -> str:
    """Every command with its arguments and options."""
    blocks = [
        NOTE,
        "# Commands",
        "Results go to standard output, everything said on the way to standard error. `--json` prints one JSON "
        "document. Exit codes: 0 done, 1 failed, 2 bad request. Colours stop with `NO_COLOR` or without a "
        "terminal; `TEMPER_DEBUG=1` shows where an error came from.",
    ]
    for name, command in _commands().items():
        inner = getattr(command, "commands", None)
        for label, found in (
            {f"{name} {n}": c for n, c in inner.items()}.items() if inner else [(name, command)]
        ):
            blocks += [f"## temper {label}", cell(found.help or COMMANDS[name])]
            rows = [_row(param) for param in found.params if param.name != "help"]
            blocks += [table(("", "meaning", "default"), rows)] if rows else []
    return "\n\n".join(blocks) + "\n"


def _row(param: Any) -> tuple[str, str, str]:
    is_argument = param.param_type_name == "argument"
    shown = f"`{param.name.upper()}`" if is_argument else ", ".join(f"`{opt}`" for opt in param.opts)
    default = "required" if param.required else _default(param)
    return shown, cell(param.help or ""), default


def _default(param: Any) -> str:
    return "" if param.default in (None, False, ()) else f"`{param.default}`"
