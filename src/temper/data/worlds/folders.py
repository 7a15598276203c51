"""Where the worlds' reference models lie: one folder a model and parameter hash, and which of them is in use."""

from __future__ import annotations

from pathlib import Path

from temper.core.errors import NeedsError
from temper.data.assets import cache_dir

__all__ = ["CURRENT", "models_home", "world_folder"]

CURRENT = "current"
"""File beside a model's folders that holds the name of the one in use."""


def models_home(name: str) -> Path:
    """The folder that holds every version of a model."""
    return cache_dir() / "worlds" / name


def world_folder(name: str) -> Path:
    """The folder of a reference model in use, e.g. of `clip`; raises NeedsError before it is trained."""
    home = models_home(name)
    try:
        folder = home / (home / CURRENT).read_text("utf-8").strip()
    except OSError:
        folder = None
    if folder is None or not folder.is_dir():
        raise NeedsError(
            f"The model world:{name} is not on this machine yet",
            where=str(home),
            cure=f"Train it once, in minutes: temper fetch world:{name}",
        )
    return folder
