"""What a reference model is: its parameters, and the function that trains it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from temper.core.types import Json

__all__ = ["WorldModel"]


@dataclass(frozen=True, kw_only=True)
class WorldModel:
    """One reference model."""

    parameters: Mapping[str, Json]
    """Everything that decides its weights, as JSON values; they name its folder."""
    train: Callable[[Path], None]
    """Trains it and writes its files into an empty folder."""
    needs: tuple[str, ...] = ()
    """Other models that must be there before."""
    title: str = ""
    """What it is and how long it takes, on a line."""
