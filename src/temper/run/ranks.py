"""Which process this is among those of one launch; one file a step tells the others to take part."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from temper.store.atomic import write_bytes

__all__ = [
    "FOLDER",
    "LAUNCH",
    "announce_start",
    "is_follower",
    "is_worker",
    "launch_folder",
    "wait_for",
    "was_started",
]

LAUNCH = "TEMPER_LAUNCH"
"""Set in the processes of one launch, to a name of their own."""
FOLDER = "TEMPER_RUN_FOLDER"
"""The run's folder, chosen and locked by the process that launched them."""


def is_worker() -> bool:
    """Whether this process was started by a launch."""
    return LAUNCH in os.environ


def is_follower() -> bool:
    """Whether another process of the launch decides and writes."""
    return is_worker() and os.environ.get("RANK", "0") != "0"


def launch_folder() -> Path:
    """The run's folder of this launch."""
    return Path(os.environ[FOLDER])


def _mark(step: Path) -> Path:
    return step.with_name(f".{step.name}.{os.environ[LAUNCH]}")


def announce_start(step: Path) -> None:
    """Tell the launch's other processes that the step's verb is about to be called; nothing without a launch."""
    if is_worker():
        write_bytes(_mark(step), b"")


def was_started(step: Path) -> bool:
    """Whether the first process is about to call the step's verb."""
    return _mark(step).exists()


def wait_for(ready: Callable[[], bool], *, pause_s: float = 0.05) -> None:
    """Return once `ready`; the launcher ends this process if the first one fails."""
    while not ready():
        time.sleep(pause_s)
