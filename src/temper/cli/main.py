"""The command line: finds the subcommand's module, imports that one only, and turns errors into exit codes.

Exit codes: 0 done, 1 failed, 2 bad request.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Literal

from temper.core.errors import TemperError

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "list": "All methods: slug, verbs, title.",
    "show": "One method: story, settings, claims with verdicts, recipes.",
    "plan": "What a recipe would do and cost; runs nothing.",
    "data": "Look at data, and at what is trained token by token.",
    "run": "Run a method's recipe, a pipeline file, or a method on your own data.",
    "compare": "Two runs side by side, paired by item, corrected for many comparisons.",
    "report": "One self-contained HTML page of a run.",
    "evidence": "Claims with the paper's figures, ours, and the verdict.",
    "fetch": "Download the locked, hash-checked assets.",
    "new": "Start a new method's folder.",
    "doctor": "Versions, hardware, cache and disk.",
    "index": "Rebuild the SQLite index from run folders.",
    "serve": "OpenAI-compatible server (coming).",
}
TOP = "Change how a model behaves, attack it, and show what then holds."


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit the process."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that lacks a letter must not stop a command half-way through its table.
            stream.reconfigure(errors="backslashreplace")
    try:
        _dispatch(arguments)
    except TemperError as error:
        if os.environ.get("TEMPER_DEBUG") == "1":
            raise
        _complain(f"{type(error).__name__}: {error}")
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader went away (`temper list | head`); there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        _complain("interrupted")
        sys.exit(1)
    except Exception as error:
        if os.environ.get("TEMPER_DEBUG") == "1":
            raise
        _complain(_unexpected(error))
        sys.exit(1)


def _unexpected(error: Exception) -> str:
    """One line about an error that is not ours."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "The memory is used up. Use a smaller system, fewer batch_tokens, or --precision bf16."
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"The disk is full ({error.filename or 'an output'}). Free some space, then run the same command again."
    return f"Unexpected {type(error).__name__}: {error}. Set TEMPER_DEBUG=1 to see where."


def _complain(text: str) -> None:
    print(f"temper: {text}", file=sys.stderr)


def _dispatch(arguments: list[str]) -> None:
    if arguments[:1] in (["--version"], ["-V"]):
        from temper.run.code import version

        print(f"temper {version()}")
        return
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    import typer

    # A box of colours is for people; a pipe or a file gets plain lines.
    rich: Literal["rich"] | None = "rich" if sys.stdout.isatty() and sys.stderr.isatty() else None
    app = typer.Typer(
        name="temper",
        help=TOP,
        no_args_is_help=True,
        rich_markup_mode=rich,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_top)
    wanted = [arguments[0]] if arguments[:1] and arguments[0] in COMMANDS else []
    completing = "_TEMPER_COMPLETE" in os.environ
    for name, help_line in COMMANDS.items():
        if name in wanted or completing:
            importlib.import_module(f"temper.cli.{name}").register(app, name, help_line)
        elif not wanted:
            app.command(name, help=help_line)(_listed)
    if wanted:
        # With one command alone typer would take its name for an argument.
        app.command("help", hidden=True)(_listed)
    app(args=arguments, prog_name="temper")


def _top() -> None:
    """Nothing: options stand with the commands."""


def _listed() -> None:
    """A command that is only listed in the help."""


if __name__ == "__main__":
    main()
