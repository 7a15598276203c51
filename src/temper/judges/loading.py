"""Judges by name, and what has been measured of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from temper.core.errors import ConfigError, NeedsError, nearest
from temper.core.types import Run
from temper.judges.base import Judge

__all__ = ["ACCURACY", "NAMES", "Accuracy", "load", "measured"]

ACCURACY = Path(__file__).parent / "accuracy.jsonl"


class Accuracy(NamedTuple):
    """One measurement of a judge against known labels; precision, recall and F1 are of "yes".

    They rest on scored items only; `unscored_share` stands beside them.
    """

    judge: str
    revision: str
    data: str
    n: int
    num_pos: int
    unscored_share: float
    precision: float | None
    precision_low: float | None
    precision_high: float | None
    recall: float | None
    recall_low: float | None
    recall_high: float | None
    f1: float | None
    f1_low: float | None
    f1_high: float | None
    kappa: float | None


def _rules() -> Judge:
    from temper.judges.strings import RulesJudge

    return RulesJudge()


def _classic() -> Judge:
    from temper.judges.strings import PhraseJudge

    return PhraseJudge()


def _classic_start() -> Judge:
    from temper.judges.strings import PhraseJudge

    return PhraseJudge("refusal-classic-start", where="start")


def _classifier() -> Judge:
    from temper.judges.classifier import ClassifierJudge

    return ClassifierJudge()


NAMES: dict[str, Callable[[], Judge]] = {
    "refusal-rules": _rules,
    "refusal-classic": _classic,
    "refusal-classic-start": _classic_start,
    "refusal-classifier": _classifier,
}


def load(name: str, *, run: Run | None = None, rubric: str = "refusal") -> Judge:
    """The judge of a name; `model:SPEC` asks the base model or endpoint SPEC with a rubric.

    A judge over a system with artefacts is built as `ModelJudge(system)`.
    """
    if name.startswith("model:"):
        from temper.core.spec import parse_system
        from temper.judges.model_judge import ModelJudge
        from temper.systems.loading import load_base

        spec = parse_system(name.removeprefix("model:"))
        if spec.artefacts:
            raise NeedsError(
                f"{name!r} names artefacts", where="judge", cure="Build it as ModelJudge(system)."
            )
        device = run.device if run else "cpu"
        return ModelJudge(load_base(spec.base, device=device), rubric=rubric, run=run)
    if name not in NAMES:
        raise ConfigError(f"There is no judge {name!r}", cure=nearest(name, [*NAMES, "model:SPEC"]))
    return NAMES[name]()


def measured(judge: str | None = None) -> list[Accuracy]:
    """The measurements that are checked in, of one judge or of all."""
    rows = [Accuracy(**json.loads(line)) for line in ACCURACY.read_text().splitlines() if line.strip()]
    return [row for row in rows if judge in (None, row.judge)]
