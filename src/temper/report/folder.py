"""What a report reads: a run folder's own files and nothing else.

Besides the store's files a verb may leave some in its step folder (`run.folder`):

figures.json    {"roc": {NAME: {"fpr": [...], "tpr": [...], "threshold": [...]}},
                 "reliability": {NAME: {"confidence": [...], "share": [...], "counts": [...]}},
                 "curves": {TITLE: {"x": LABEL, "y": LABEL, "lines": {NAME: {"x": [...], "y": [...]}}}},
                 "pictures": {TITLE: {"png": BASE64}},
                 "grids": {TITLE: {NAME: {"png": BASE64}}},
                 "tables": {TITLE: {"columns": [...], "rows": [[...], ...]}}}
                 a `null` threshold means "above every score"; a line may have "low" and "high"; a curve with
                 "shared": true is one picture for all arms; a grid is a table of strips, a row a name and a column an arm
ended.json      {"step": ..., "why": ...} where training was stopped before its time (`ops/endings.py`)
examples.jsonl  {"prompt": ..., "before": ..., "after": ..., "verdict": ..., further keys shown as they are}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from temper.core.errors import StoreError
from temper.core.types import Attempt, Json, Row
from temper.store import lines
from temper.store.folders import RunFolder
from temper.store.records import attempt_from

__all__ = ["CellStep", "RunView", "read_run"]

MAX_EXAMPLES = 24
"""Examples shown of one step."""
MAX_ATTEMPTS = 300
"""Attempts shown; all of them count in the curves."""


@dataclass(frozen=True, kw_only=True)
class CellStep:
    """A step as one arm and seed sees it."""

    arm: str
    seed: int
    id: str
    name: str
    record: Mapping[str, Json]
    done: Mapping[str, Json]
    figures: Mapping[str, Any]
    examples: list[dict[str, Json]]

    @property
    def label(self) -> str:
        """Arm and seed for a legend."""
        return " · ".join(part for part in (self.arm, f"seed {self.seed}") if part)


@dataclass(frozen=True, kw_only=True)
class RunView:
    """A run folder, read."""

    record: Mapping[str, Json]
    rows: list[Row]
    attempts: list[Attempt]
    attempt_arms: list[str]
    num_attempts: int
    steps: list[CellStep]


def read_run(path: Path) -> RunView:
    """Read a run folder; raises ConfigError if it is none and StoreError for a damaged file."""
    folder = RunFolder.open(path)
    record = folder.record()
    attempts = list(_attempts(path))
    return RunView(
        record=record,
        rows=list(folder.rows()),
        attempts=[attempt for attempt, _ in attempts],
        attempt_arms=[arm for _, arm in attempts],
        num_attempts=len(attempts),
        steps=list(_cell_steps(folder, record)),
    )


def _attempts(path: Path) -> Iterator[tuple[Attempt, str]]:
    for line in lines.read(path / "attempts.jsonl"):
        yield attempt_from(line), str(line.get("arm", ""))


def _cell_steps(folder: RunFolder, record: Mapping[str, Json]) -> Iterator[CellStep]:
    """Every step of every cell; a step that cells share comes once, with the first."""
    seen: set[str] = set()
    steps: Mapping[str, Mapping[str, Json]] = record.get("steps") or {}
    for cell in record.get("cells") or ():
        for step_id, name in cell.get("steps", {}).items():
            if name in seen:
                continue
            seen.add(name)
            place = folder.step(name).path
            yield CellStep(
                arm=str(cell.get("arm", "")), seed=int(cell.get("seed", 0)), id=step_id, name=name,
                record=steps.get(name, {}), done=_json(place / "done.json"), figures=_json(place / "figures.json"),
                examples=list(islice(_examples(place / "examples.jsonl"), MAX_EXAMPLES)),
            )  # fmt: skip


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, empty if the file is not there."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    if not isinstance(found, dict):
        raise _unreadable(path, TypeError("not a JSON object"))
    return found


def _examples(path: Path) -> Iterable[dict[str, Json]]:
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                found = json.loads(line)
            except ValueError as error:
                raise _unreadable(path, error, number) from None
            if isinstance(found, dict):
                yield found


def _unreadable(path: Path, error: Exception, line: int | None = None) -> StoreError:
    where = f"{path}, line {line}" if line else str(path)
    return StoreError(f"A file of the run cannot be read: {error}", where=where, cure="Run the step again.")
