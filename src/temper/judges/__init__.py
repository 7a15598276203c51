"""Judges: yes, no or unscored, each with its own measured accuracy."""

from temper.judges.base import Judge, Pair, Tally, Verdict, tally
from temper.judges.loading import Accuracy, load, measured

__all__ = ["Accuracy", "Judge", "Pair", "Tally", "Verdict", "load", "measured", "tally"]
