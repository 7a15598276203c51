"""Runs a plan: cells in order, each step once, rows copied into the run as they are finished.

A run killed at any point goes on from its folder: finished steps are kept, an unfinished one starts again or from
its checkpoint, and the run's own rows continue after the last whole one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from temper.core import config as core_config
from temper.core.errors import ConfigError, StoreError, TemperError
from temper.core.types import Json, Ticker
from temper.run.against import attack_name
from temper.run.facts import environment
from temper.run.plan import Cell, Plan, PlannedStep, Request, make_plan
from temper.run.progress import silent
from temper.run.ranking import columns_record
from temper.run.ranks import is_worker, launch_folder
from temper.run.steps import Outcome, Worker, run_step
from temper.store import lines
from temper.store.atomic import canonical
from temper.store.folders import RunFolder, run_folders
from temper.store.records import stable

__all__ = ["CellRunner", "RunResult", "execute", "find_run", "run_cells", "run_recipe"]

T = TypeVar("T")

CellRunner = Callable[[Plan, Worker], dict[str, Outcome]]
"""Finishes every step of a plan; returns what became of each folder name."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """A finished run."""

    folder: RunFolder
    plan: Plan
    outcomes: Mapping[str, Outcome]
    num_rows: int


def _quiet(text: str) -> None:
    """Say nothing."""


def run_recipe(
    source: str | Request,
    *,
    resume: bool = False,
    ticker: Ticker = silent,
    say: Callable[[str], None] = _quiet,
    runner: CellRunner | None = None,
    **request: Json,
) -> RunResult:
    """Plan and execute; keyword arguments are those of Request. The same call again resumes or finds it done."""
    asked = source if isinstance(source, Request) else Request(source=source, **request)
    return execute(make_plan(asked), resume=resume, ticker=ticker, say=say, runner=runner)


def execute(
    plan: Plan,
    *,
    resume: bool = False,
    ticker: Ticker = silent,
    say: Callable[[str], None] = _quiet,
    runner: CellRunner | None = None,
) -> RunResult:
    """Run a plan in a new folder, or go on in the folder of an equal unfinished one.

    With `resume`, there must be such a folder. Raises TemperError; a stopped run says in `run.json` why.
    """
    if is_worker():
        return _execute_in_launch(plan, ticker, say)
    folder, fresh = _folder(plan, resume)
    with folder.lock():
        if not fresh:
            # It decides nothing that was run, so it may have changed since.
            folder.update(rank=columns_record(plan.pipeline.rank))
        if not fresh and _is_complete(folder, plan):
            say(f"{folder.id} is complete and unchanged; nothing was run")
            kept: dict[str, Outcome] = {step.name: "kept" for step in plan.steps}
            return RunResult(
                folder=folder, plan=plan, outcomes=kept, num_rows=lines.count(folder.path / "rows.jsonl")
            )
        if not fresh:
            say(f"resuming {folder.id}")
        worker = Worker(
            folder=folder, out=Path(plan.request.out), options=plan.options, ticker=ticker, say=say
        )
        with _status(folder), _nothing_left(folder, fresh):
            outcomes = (runner or run_cells)(plan, worker)
            num_rows = _Emitter(folder).emit_all(plan)
        return RunResult(folder=folder, plan=plan, outcomes=outcomes, num_rows=num_rows)


def _is_complete(folder: RunFolder, plan: Plan) -> bool:
    """Whether nothing is left to do; raises StoreError for a finished step that is no longer as it was left."""
    steps = [folder.step(step.name) for step in plan.steps]
    if folder.record().get("status") != "done" or not all(step.is_done() for step in steps):
        return False
    for step in steps:
        step.check()
    return True


def _execute_in_launch(plan: Plan, ticker: Ticker, say: Callable[[str], None]) -> RunResult:
    """One process's share of a launch; the process that launched it holds the folder and emits the rows."""
    folder = RunFolder.open(launch_folder())
    worker = Worker(folder=folder, out=Path(plan.request.out), options=plan.options, ticker=ticker, say=say)
    outcomes = {step.name: run_step(step, worker) for step in plan.steps}
    return RunResult(folder=folder, plan=plan, outcomes=outcomes, num_rows=0)


def run_cells(plan: Plan, worker: Worker) -> dict[str, Outcome]:
    """Every cell in order, in this process; rows are emitted as each step ends."""
    outcomes: dict[str, Outcome] = {}
    emitter = _Emitter(worker.folder)
    for number, cell in enumerate(plan.cells, 1):
        for step in cell.steps:
            if step.name not in outcomes:
                worker.say(
                    f"[{number}/{len(plan.cells)}] {cell.label} · {step.id}: {step.verb} {step.method}"
                )
                worker.folder.log(f"{cell.label} {step.name} starts")
                outcomes[step.name] = run_step(step, worker)
                worker.folder.log(f"{step.name} {outcomes[step.name]}")
            emitter.emit(cell, step)
    return outcomes


def _folder(plan: Plan, resume: bool) -> tuple[RunFolder, bool]:
    """The folder to work in and whether it is new."""
    out = Path(plan.request.out)
    found = find_run(out, plan.hash)
    if found is not None and (resume or not found.is_locked()):
        return found, False
    if resume:
        raise ConfigError(
            "There is no run to resume: none has these inputs, settings and code",
            where=str(out),
            cure="Leave out --resume; finished steps that are unchanged are taken over.",
        )
    return RunFolder.create(out, plan.slug, _record(plan)), True


def find_run(out: Path, plan_hash: str) -> RunFolder | None:
    """The newest run of an equal plan, or None."""
    for folder in reversed(run_folders(out)):
        try:
            if folder.record().get("plan") == plan_hash:
                return folder
        except StoreError:
            continue  # a damaged run of something else must not stop this one; `temper index` names it
    return None


def _record(plan: Plan) -> dict[str, Json]:
    """What `run.json` says: the request, every final setting with its origin, the cells, the machine."""
    request = plan.request
    return {
        "name": plan.pipeline.name,
        "method": plan.pipeline.method,
        "rank": columns_record(plan.pipeline.rank),
        "plan": plan.hash,
        "request": {
            "source": request.source,
            "recipe": request.recipe,
            "verb": request.verb,
            "system": request.system,
            "data": dict(request.data) if isinstance(request.data, Mapping) else request.data,
            "set": list(request.sets),
            "seeds": list(request.seeds),
            "arms": list(request.arms),
        },
        "options": {**plan.options.hashed(), "checkpoint_every": plan.options.checkpoint_every},
        "cells": [
            {"arm": c.arm, "seed": c.seed, "matrix": dict(c.matrix), "steps": {s.id: s.name for s in c.steps}}
            for c in plan.cells
        ],
        "steps": {step.name: _step_record(step) for step in plan.steps},
        "environment": environment(),
    }


def _step_record(step: PlannedStep) -> dict[str, Json]:
    values = core_config.to_dict(step.config)
    data = dict(step.data) if isinstance(step.data, Mapping) else step.data
    return {
        "id": step.id,
        "verb": step.verb,
        "method": step.method,
        "seed": step.seed,
        "system": str(step.system) if step.system else None,
        "data": data,
        "data_fingerprint": step.loaded.fingerprint if step.loaded is not None else None,
        "limit": step.limit,
        "limits": dict(step.limits),
        **step.label,
        "settings": {key: {"value": values[key], "origin": step.origins[key]} for key in values},
    }


@contextmanager
def _nothing_left(folder: RunFolder, fresh: bool) -> Iterator[None]:
    """Take a new run away again when it turns out to be a bad request before any step has something to keep."""
    try:
        yield
    except TemperError as error:
        if fresh and error.exit_code == 2 and not folder.holds_work():
            folder.remove()
        raise


@contextmanager
def _status(folder: RunFolder) -> Iterator[None]:
    """Keep `status` of run.json true: running, then done, interrupted or failed with its error."""
    folder.update(status="running", error=None)
    try:
        yield
    except KeyboardInterrupt:
        folder.update(status="interrupted")
        folder.log("interrupted")
        raise
    except Exception as error:
        _note_failure(folder, error)
        raise
    folder.update(status="done")


def _note_failure(folder: RunFolder, error: Exception) -> None:
    if not folder.path.exists():
        return
    try:
        folder.update(status="failed", error=f"{type(error).__name__}: {error}")
        folder.log(f"failed: {error}")
    except TemperError:
        return  # the disk that failed the run may refuse this too; the first error is the one to show


class _Emitter:
    """Copies the steps' rows and attempts into the run's files, after those already there."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.rows = _Tail(folder.path / "rows.jsonl")
        self.attempts = _Tail(folder.path / "attempts.jsonl")

    def emit_all(self, plan: Plan) -> int:
        """Emit every cell; returns how many rows the run has."""
        for cell in plan.cells:
            for step in cell.steps:
                self.emit(cell, step)
        return self.rows.position

    def emit(self, cell: Cell, step: PlannedStep) -> None:
        source = self.folder.step(step.name)
        self.rows.add(_labelled(record, cell) for record in lines.read(source.rows_file))
        self.attempts.add(_labelled(record, cell) for record in lines.read(source.attempts_file))


def _labelled(record: dict[str, Json], cell: Cell) -> dict[str, Json]:
    """A step's record with its cell's arm and matrix; an arm the method named itself comes after the cell's.

    Whom an attack is about makes an arm of its own, so that no claim mistakes an attacked system for another.
    """
    arm = "/".join(part for part in (cell.arm, record.get("arm", "")) if part)
    facts = dict(record.get("facts", {}))
    if cell.matrix:
        facts["matrix"] = dict(cell.matrix)
    if label := facts.get("against"):
        facts["against"] = {**label, "arm": arm}
        arm = "/".join(part for part in (arm, attack_name(label)) if part)
    return {**record, "facts": facts, **({"arm": arm} if arm else {})}


class _Tail:
    """A file of records that is written from its beginning by every resume; what is there already is checked off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines.repair(path)
        self.present = [_digest(record) for record in lines.read(path)]
        self.position = 0

    def add(self, records: Iterable[dict[str, Json]]) -> None:
        new: list[dict[str, Json]] = []
        for record in records:
            if self.position < len(self.present):
                if self.present[self.position] != _digest(record):
                    raise StoreError(
                        "A record differs from the finished step it came from",
                        where=f"{self.path}, line {self.position + 1}",
                        cure="Delete the run and start again; finished steps of other runs are taken over.",
                    )
            else:
                new.append(record)
            self.position += 1
        if new:
            lines.append(self.path, new)


def _digest(record: Mapping[str, Json]) -> bytes:
    # Time and machine may differ where a step was deleted and run again.
    return hashlib.sha1(canonical(stable(dict(record))).encode()).digest()
