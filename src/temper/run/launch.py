"""Outgrowing one process: the same command under Accelerate, cells as Ray tasks, rows to a tracker.

Under Accelerate every process runs the same command; the first one decides and writes, the others take part in
each `fit` and otherwise wait for its `done.json`.
"""

from __future__ import annotations

import importlib
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Sequence

from temper.core.errors import ConfigError, NeedsError, StoreError
from temper.run.execute import CellRunner, RunResult
from temper.run.plan import Plan
from temper.run.ranks import FOLDER, LAUNCH, is_worker
from temper.run.steps import Outcome, Worker

__all__ = ["launch", "pick_runner", "pick_sink"]


def pick_runner(plan: Plan, *, on: str | None) -> CellRunner | None:
    """The runner that the options ask for; None = this process. Raises ConfigError, NeedsError."""
    if on is not None:
        if plan.options.num_procs > 1:
            raise ConfigError("--nproc and --on do not go together", cure="Ray gives each cell one process.")
        name, _, address = on.partition(":")
        if name != "ray":
            raise ConfigError(f"--on {on!r} is unknown", cure="Write --on ray or --on ray:ADDRESS.")
        from temper.run.ray_cells import ray_runner

        return ray_runner(address or None)
    if plan.options.num_procs > 1 and not is_worker():
        _need("accelerate", "accelerate")
        return _accelerated
    return None


def pick_sink(track: str | None) -> Callable[[RunResult], None]:
    """Where finished rows go besides the run's folder; raises ConfigError, NeedsError before the run."""
    if track is None:
        return lambda result: None
    if track != "mlflow":
        raise ConfigError(f"--track {track!r} is unknown", cure="Write --track mlflow.")
    _need("mlflow", "temper-ml[mlflow]")
    from temper.run.tracking import to_mlflow

    return to_mlflow


def _need(module: str, install: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError:
        raise NeedsError(f"{module} is not installed", cure=f"pip install '{install}'") from None


def _accelerated(plan: Plan, worker: Worker) -> dict[str, Outcome]:
    """Finish the plan's steps in `num_procs` processes that run this same command."""
    before = {step.name for step in plan.steps if worker.folder.step(step.name).is_done()}
    launch(plan.options.num_procs, sys.argv[1:], str(worker.folder.path))
    return {step.name: "kept" if step.name in before else "ran" for step in plan.steps}


def launch(num_procs: int, arguments: Sequence[str], folder: str) -> None:
    """Run `temper ARGUMENTS` under `accelerate launch`; raises StoreError when it fails."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(num_procs)]
    if not os.path.exists(_accelerate_config()):
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["-m", "temper.cli.main", *arguments]
    environment = {**os.environ, LAUNCH: secrets.token_hex(4), FOLDER: folder}
    finished = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False)
    if finished.returncode:
        raise StoreError(
            f"A process of the launch failed with exit code {finished.returncode}",
            where=folder,
            cure="Its message stands above; the same command again resumes.",
        )


def _accelerate_config() -> str:
    home = os.environ.get("HF_HOME", os.path.expanduser("~/.cache/huggingface"))
    return os.path.join(home, "accelerate", "default_config.yaml")
