"""Finished runs copied to MLflow: one MLflow run a cell, settings as parameters, aggregate rows as metrics."""

from __future__ import annotations

import re

from temper.core import config as core_config
from temper.core.types import Row
from temper.run.execute import RunResult

__all__ = ["metric_name", "to_mlflow"]


def to_mlflow(result: RunResult) -> None:
    """Copy a run to the tracking server that MLFLOW_TRACKING_URI names, by default the folder mlruns."""
    import mlflow

    mlflow.set_experiment(result.plan.slug)
    rows = [row for row in result.folder.rows() if row.item is None and row.value is not None]
    for cell in result.plan.cells:
        with mlflow.start_run(run_name=f"{result.folder.id} {cell.label}"):
            mlflow.set_tags({"run": result.folder.id, "arm": cell.arm, "seed": str(cell.seed)})
            for step in cell.steps:
                settings = core_config.to_dict(step.config)
                mlflow.log_params({f"{step.id}.{key}": str(value)[:500] for key, value in settings.items()})
            mine = [
                r
                for r in rows
                if r.facts.get("seed") == cell.seed and r.arm.split("/")[0] == cell.arm.split("/")[0]
            ]
            mlflow.log_metrics({metric_name(row): float(row.value or 0) for row in mine})


def metric_name(row: Row) -> str:
    """Step, metric, split and group as one name that MLflow accepts."""
    parts = [str(row.facts.get("step", "")), row.metric, row.split, row.group]
    return re.sub(r"[^\w .\-/]", "_", "/".join(part for part in parts if part))
