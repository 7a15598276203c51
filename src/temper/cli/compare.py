"""`temper compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from temper.cli.output import AsJson, number, print_json, print_table, say
from temper.run.compare import Comparison, compare_runs
from temper.store.folders import RunFolder

__all__ = ["compare_command", "open_run", "register"]


def register(app: typer.Typer, name: str, help_line: str) -> None:
    """Add the command to the app."""
    app.command(name, help=help_line)(compare_command)


def open_run(name: str, out: str) -> RunFolder:
    """A run by path, or by its id in the folder of runs."""
    direct = Path(name)
    return RunFolder.open(direct if (direct / "run.json").exists() else Path(out) / name)


def compare_command(
    run_a: Annotated[str, typer.Argument(help="A run's folder or id.")],
    run_b: Annotated[str, typer.Argument(help="Another one.")],
    out: Annotated[str, typer.Option(help="Folder of runs.")] = "runs",
    as_json: AsJson = False,
) -> None:
    """Print each metric of two runs, the paired difference B - A, and what it would take to see it."""
    found = compare_runs(open_run(run_a, out), open_run(run_b, out))
    if as_json:
        print_json([item._asdict() for item in found])
        return
    columns = (
        "step",
        "metric",
        "where",
        "A",
        "B",
        "B - A",
        "95% interval",
        "pairs",
        "p (Holm)",
        "verdict",
        "needed",
    )
    print_table(columns, [_line(item) for item in found])
    say(
        f"p is corrected for {len(found)} metrics; `needed` is the number of pairs that would show such a difference"
    )


def _line(item: Comparison) -> tuple[str, ...]:
    where = ", ".join(part for part in (item.arm, item.split, item.group) if part)
    interval = f"[{number(item.low)}, {number(item.high)}]" if item.low is not None else "none: one pair"
    return (
        item.step, item.metric, where, number(item.a), number(item.b), number(item.difference), interval,
        f"{item.n} {item.pairing}", number(item.p), item.verdict, "-" if item.needed is None else str(item.needed),
    )  # fmt: skip
