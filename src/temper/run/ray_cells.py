"""Cells as Ray tasks. All of them share the run's folder, so the cluster needs a shared file system."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from temper.core.errors import NeedsError, StoreError
from temper.run.execute import CellRunner
from temper.run.plan import Plan, Request, make_plan
from temper.run.progress import silent
from temper.run.steps import Outcome, Worker, run_step
from temper.store.folders import RunFolder

__all__ = ["ray_runner", "run_one_cell"]


def ray_runner(address: str | None) -> CellRunner:
    """A runner that gives each cell to Ray; raises NeedsError without ray."""
    try:
        import ray
    except ImportError:
        raise NeedsError("--on ray needs ray", cure="pip install 'temper-ml[ray]'") from None

    def runner(plan: Plan, worker: Worker) -> dict[str, Outcome]:
        started_here = not ray.is_initialized()
        if started_here:
            ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, include_dashboard=False)
        try:
            return _spread(ray, plan, worker)
        finally:
            if started_here:
                ray.shutdown()

    return runner


def _spread(ray: Any, plan: Plan, worker: Worker) -> dict[str, Outcome]:
    needs = {"num_gpus": 1} if plan.options.device.startswith("cuda") else {"num_cpus": _cores()}
    task = ray.remote(**needs, max_retries=1)(run_one_cell)
    request = replace(plan.request, out=str(Path(plan.request.out).resolve()))
    home, folder = os.getcwd(), str(worker.folder.path.resolve())
    waiting = {task.remote(request, number, folder, home): cell for number, cell in enumerate(plan.cells)}
    outcomes: dict[str, Outcome] = {}
    while waiting:
        (done,), _ = ray.wait(list(waiting), num_returns=1)
        cell = waiting.pop(done)
        try:
            outcomes |= ray.get(done)
        except ray.exceptions.RayTaskError as error:
            raise StoreError(f"Cell {cell.label} failed: {error.cause}", where=folder) from error
        worker.say(f"finished: {cell.label}")
    return outcomes


def _cores() -> int:
    return int(os.environ.get("OMP_NUM_THREADS") or 1)


def run_one_cell(request: Request, number: int, folder: str, home: str) -> dict[str, Outcome]:
    """Finish the steps of one cell; a step that two cells share is finished by whoever comes first."""
    os.chdir(home)
    plan = make_plan(request)
    worker = Worker(
        folder=RunFolder.open(Path(folder)),
        out=Path(request.out),
        options=plan.options,
        ticker=silent,
        say=lambda text: None,
    )
    return {step.name: run_step(step, worker) for step in plan.cells[number].steps}
