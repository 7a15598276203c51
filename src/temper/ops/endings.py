"""How training ended that was stopped before its time, kept in the step's folder: rows about what it left say so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from temper.core.types import Json

__all__ = ["ended_early", "keep_ending"]

FILE = "ended.json"


def keep_ending(folder: Path | None, step: int, why: str) -> None:
    """Write after how many optimiser steps it was stopped and why ("the loss diverged"); nothing without a folder."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(json.dumps({"step": step, "why": why}))


def ended_early(folders: Mapping[str, Path]) -> dict[str, dict[str, Json]]:
    """Of these steps' folders by name, what those say that were stopped: {name: {"step": ..., "why": ...}}."""
    files = {name: folder / FILE for name, folder in folders.items()}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
