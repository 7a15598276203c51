"""`temper run`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from temper.cli import requests as req
from temper.cli.bar import make_ticker
from temper.cli.output import AsJson, print_json, print_table, say, seconds_text
from temper.cli.plan import describe_cost
from temper.core.errors import DataError
from temper.core.types import Row, Ticker
from temper.report.against import attack_maps, bills, is_attacked
from temper.report.tables import Cell, HeatMap, SummaryRow, format_interval, format_value, summary_table
from temper.run.estimate import check_cost, estimate
from temper.run.execute import CellRunner, RunResult, execute
from temper.run.plan import Plan, PlannedStep, make_plan
from temper.run.progress import silent
from temper.run.ranking import Column, rank_arms, rank_lines, ranking_note, stops_note
from temper.run.ranks import is_follower, is_worker
from temper.store import lines

__all__ = ["register", "run_command"]

NUM_SHOWN = 60
MAPS_SHOWN = 6


def register(app: typer.Typer, name: str, help_line: str) -> None:
    """Add the command to the app."""
    app.command(name, help=help_line)(run_command)


def run_command(
    source: req.Source,
    recipe: req.Recipe = None,
    verb: req.VerbOption = None,
    system: req.SystemOption = None,
    data: req.DataOption = None,
    sets: req.SetOption = None,
    seeds: req.Seeds = None,
    arms: req.Arms = None,
    out: req.Out = "runs",
    resume: Annotated[bool, typer.Option("--resume", help="Insist on going on with a stopped run.")] = False,
    evidence: Annotated[
        bool, typer.Option("--evidence", help="Append the rows to the method's evidence.")
    ] = False,
    nproc: Annotated[int, typer.Option(help="Processes, under Accelerate.")] = 1,
    on: Annotated[str | None, typer.Option(help="ray[:ADDRESS]")] = None,
    track: Annotated[str | None, typer.Option(help="mlflow")] = None,
    device: req.Device = None,
    precision: req.Precision = None,
    base_url: req.BaseUrl = None,
    report: Annotated[
        bool, typer.Option("--report", help="Write report.html into the run's folder.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run all cells; the same command again resumes, and repeats nothing that is unchanged."""
    options = {"device": device, "precision": precision, "base_url": base_url, "num_procs": nproc}
    request = req.build_request(
        source, recipe=recipe, verb=verb, system=system, data=data, sets=sets, seeds=seeds, arms=arms, out=out,
        options=options,
    )  # fmt: skip
    from temper.run import launch

    plan = make_plan(request)
    if evidence:
        from temper.run.evidence import check_evidence

        check_evidence(plan)
    if is_worker():
        execute(plan, ticker=_worker_ticker(), say=_told())
        return
    runner = launch.pick_runner(plan, on=on)
    sink = launch.pick_sink(track)
    _announce(plan)
    began = time.monotonic()
    result = _executed(plan, resume, runner)
    sink(result)
    if evidence:
        from temper.run.evidence import append_evidence

        say(f"{append_evidence(result)} rows appended to the evidence of {plan.pipeline.method}")
    _show(result, as_json)
    say(f"took {seconds_text(time.monotonic() - began)}")
    if report:
        from temper.report.page import write_report

        say(str(write_report(result.folder.path)))


def _executed(plan: Plan, resume: bool, runner: CellRunner | None) -> RunResult:
    try:
        return execute(plan, resume=resume, ticker=make_ticker(), say=_told(), runner=runner)
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from here")
        raise typer.Exit(1) from None


def _worker_ticker() -> Ticker:
    return silent if is_follower() else make_ticker()


def _told() -> Any:
    return (lambda text: None) if is_follower() else say


def _announce(plan: Plan) -> None:
    costs = estimate(plan)
    check_cost(plan, costs)
    _told()(f"{plan.slug}: {len(plan.cells)} cells, {len(plan.steps)} steps; {describe_cost(costs)}")


def _show(result: RunResult, as_json: bool) -> None:
    folder = result.folder
    if as_json:
        print_json(iter(lines.read(folder.path / "rows.jsonl")))
        say(str(folder.path))
        return
    rows = list(folder.rows())
    table = summary_table((row for row in rows if not is_attacked(row)), groups=True)
    columns = ("metric", "split", "group", *(arm or "value" for arm in table.arms))
    if table.rows:
        print_table(columns, [_line(row, table.arms) for row in table.rows[:NUM_SHOWN]])
    if len(table.rows) > NUM_SHOWN:
        say(f"... {len(table.rows) - NUM_SHOWN} more metrics in {folder.path / 'rows.jsonl'}")
    maps = attack_maps(rows)
    for attacked in maps[:MAPS_SHOWN]:
        print_table((attacked.metric, *attacked.arms), _attack_lines(attacked))
    if len(maps) > MAPS_SHOWN:
        say(f"... {len(maps) - MAPS_SHOWN} more metrics under attack: see the report (--report)")
    paid = bills((step.label, folder.step(step.name).done()) for step in result.plan.steps)
    if paid:
        print_table(("budget of", "limit", "used on the fitted", "used on the plain"), paid)
    _show_ranking(rows, result.plan.pipeline.rank)
    for step in result.plan.steps:
        if step.verb == "fit" and "against" not in step.label:
            print(f"{step.id} (seed {step.seed}): {_spec(step, folder.step(step.name).path)}")
    print(folder.path)
    sys.stdout.flush()


def _show_ranking(rows: Sequence[Row], columns: Sequence[Column]) -> None:
    """The arms in order; a column that this run cannot fill is said, for the rows are whole without it."""
    try:
        ranking = rank_arms(rows, columns) if columns else None
    except DataError as error:
        say(str(error))
        return
    if ranking:
        head, *lines = rank_lines(ranking)
        print_table(head, lines)
        print("\n".join(filter(None, (ranking_note(ranking), stops_note(ranking)))))


def _attack_lines(attacked: HeatMap) -> list[list[str]]:
    """One attack a line: the metric with the fit and without."""
    return [
        [attack, *(_value(line[place], attacked.metric) for line in attacked.cells)]
        for place, attack in enumerate(attacked.groups)
    ]


def _spec(step: PlannedStep, fitted: Path) -> str:
    """The fitted system's name, as any command takes it; the folder alone where it was fitted on other artefacts."""
    return f"{step.system.base}+{fitted}" if step.system and not step.system.artefacts else str(fitted)


def _line(row: SummaryRow, arms: Sequence[str]) -> list[str]:
    """One metric: its value in every arm, with its interval, or why there is none."""
    return [row.metric, row.split, row.group, *(_value(row.cells.get(arm), row.metric) for arm in arms)]


def _value(cell: Cell | None, metric: str) -> str:
    if cell is None:
        return ""
    if cell.value is None:
        return f"none: {cell.note}"
    return f"{format_value(cell.value, metric)} {format_interval(cell, metric)}".rstrip()
