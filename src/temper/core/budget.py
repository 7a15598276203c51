"""What a verb may spend and what it has spent: queries, steps, tokens, seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["UNITS", "Budget"]

UNITS = ("queries", "steps", "tokens", "seconds")
"""Texts the model read, exchanges or optimiser steps made, tokens run, wall time since the verb began."""


@dataclass(eq=False)
class Budget:
    """Limits, and a meter that always runs; a method asks `allows` before it spends, and stops with what it has.

    Nothing but time is ever exceeded by a method that asks: a step that would cost too much is not begun.
    """

    limits: Mapping[str, float] = field(default_factory=dict)
    """Unit -> the most of it; a unit that is missing has no limit."""
    used: dict[str, float] = field(default_factory=lambda: dict.fromkeys(UNITS, 0.0))
    """What was spent so far; its seconds are those before a resume."""
    stopped_by: str = ""
    """The unit that ended the work, or ""."""
    began: float = field(default_factory=time.monotonic)
    caps: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self.caps = dict(self.limits)

    def spent(self, unit: str) -> float:
        """How much of a unit is gone."""
        return self.used[unit] + (time.monotonic() - self.began if unit == "seconds" else 0.0)

    def allows(self, **more: float) -> bool:
        """Whether that much more stays within every limit; `stopped_by` keeps the unit that said no."""
        for unit, most in self.caps.items():
            if self.spent(unit) + more.get(unit, 0.0) > most:
                self.stopped_by = unit
                return False
        return True

    def is_open(self) -> bool:
        """Whether every limit of the whole has something left; `stopped_by` keeps the unit that has not."""
        gone = [unit for unit, most in self.limits.items() if self.spent(unit) >= most]
        self.stopped_by = gone[0] if gone else self.stopped_by
        return not gone

    def spend(self, **more: float) -> None:
        """Book it."""
        for unit, amount in more.items():
            self.used[unit] += amount

    def share(self, num_left: int) -> None:
        """Let the next of `num_left` equal jobs have its part of what is left; what it leaves goes to the others."""
        self.caps = {
            unit: self.spent(unit) + max(0.0, most - self.spent(unit)) / num_left
            for unit, most in self.limits.items()
        }

    def record(self) -> dict[str, Any]:
        """What was used, by unit, and what ended it."""
        used: dict[str, Any] = {unit: self.spent(unit) for unit in UNITS}
        used = {unit: round(value, 3) if math.modf(value)[0] else int(value) for unit, value in used.items()}
        return {**used, "stopped_by": self.stopped_by}
