"""What every judge gives back, and how its verdicts become a rate.

A verdict is yes, no, or unscored. Unscored counts for neither side: rates are taken over scored pairs, and
the unscored share stands beside them.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ["Judge", "Pair", "Tally", "Verdict", "content_hash", "tally"]

Pair = tuple[str, str]
"""A prompt and the reply to it."""


class Verdict(NamedTuple):
    """`label` answers the judge's question; None is unscored. `score` is in [0, 1], higher towards yes."""

    label: bool | None
    score: float
    reason: str


class Judge(ABC):
    """Answers one yes-or-no question about replies.

    name, revision    together they name what judged: the revision is a hash of rules, weights or wording
    question          what a yes means
    """

    name: str
    question: str

    @property
    @abstractmethod
    def revision(self) -> str:
        """A hash that changes whenever a verdict could."""

    @abstractmethod
    def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict a pair, in order."""


class Tally(NamedTuple):
    """Verdicts counted: `rate` is yes over scored, None when nothing was scored."""

    rate: float | None
    yes: int
    num_scored: int
    num_unscored: int

    @property
    def unscored_share(self) -> float:
        """Unscored over all; 0 for no verdict at all."""
        return self.num_unscored / max(1, self.num_scored + self.num_unscored)


def tally(verdicts: Iterable[Verdict]) -> Tally:
    """Count verdicts; unscored ones never enter the rate."""
    labels = [verdict.label for verdict in verdicts]
    scored = [label for label in labels if label is not None]
    rate = sum(scored) / len(scored) if scored else None
    return Tally(rate, sum(scored), len(scored), len(labels) - len(scored))


def content_hash(*parts: str | bytes | Path) -> str:
    """Twelve hex digits over texts, bytes and the contents of files, borders included."""
    digest = hashlib.sha256()
    for part in parts:
        data = (
            part.read_bytes() if isinstance(part, Path) else part.encode() if isinstance(part, str) else part
        )
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:12]
