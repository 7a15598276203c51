"""Every error temper raises on purpose.

TemperError
├── ConfigError     a recipe, setting, spec or name is wrong                   exit code 2
├── NeedsError      the system or the machine lacks what is asked              exit code 2
├── DataError       the user's data is wrong: file, row, column                exit code 2
├── ModelError      model, tokenizer, template or artefact don't fit together  exit code 2
├── NumericsError   a number went non-finite or out of bounds                  exit code 1
└── StoreError      disk, cache, asset or run folder failed                    exit code 1

A message has three parts: what is wrong (with the value), where, and the cure.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar

__all__ = [
    "ConfigError",
    "DataError",
    "ModelError",
    "NeedsError",
    "NumericsError",
    "StoreError",
    "TemperError",
    "nearest",
]


class TemperError(Exception):
    """An error with its place and its cure; `str()` gives all three parts."""

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str = "", cure: str = "") -> None:
        self.what, self.where, self.cure = what, where, cure
        place = f" ({where})" if where else ""
        advice = f" {cure}" if cure else ""
        super().__init__(f"{what}{place}.{advice}")


class ConfigError(TemperError):
    """A recipe, setting, spec or name is wrong."""

    exit_code = 2


class NeedsError(TemperError):
    """The system, an extra or the machine lacks what is asked of it."""

    exit_code = 2


class DataError(TemperError):
    """The user's data is wrong; `where` names file, row and column."""

    exit_code = 2


class ModelError(TemperError):
    """Model, tokenizer, template or artefact do not fit together."""

    exit_code = 2


class NumericsError(TemperError):
    """A number went non-finite or left its bounds."""


class StoreError(TemperError):
    """Disk, cache, asset or run folder failed."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The cure for an unknown name: the closest known ones, or all of a short list."""
    pool = sorted(known)
    close = difflib.get_close_matches(name, pool, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    if 0 < len(pool) <= 30:
        return f"Known: {', '.join(pool)}."
    return ""
