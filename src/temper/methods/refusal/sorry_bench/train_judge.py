"""Trains the fulfilment classifier on `builtin:policy-mini:judge`: python -m temper.methods.refusal.sorry_bench.train_judge

The machinery and the weights' form are those of the refusal classifier; a row that does not fulfil its request
stands where that one has a refusal. Every fourth class only chooses the penalty. Deterministic.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from temper.data.loading import load_data
from temper.data.schemas import Labelled
from temper.judges.train_classifier import LabelledReply, train
from temper.methods.refusal.sorry_bench.judging import WEIGHTS

__all__ = ["main", "split_by_class", "triples"]

DATA = "builtin:policy-mini:judge"


def triples(data: str = DATA) -> list[tuple[str, LabelledReply]]:
    """Class, and (request, reply, whether it fails to fulfil)."""
    records = [record for record in load_data(data)["judge"] if isinstance(record, Labelled)]
    return [
        (
            str(record.extra["category"]),
            LabelledReply(str(record.extra["prompt"]), record.text, record.label == 0),
        )
        for record in records
    ]


def split_by_class(rows: list[tuple[str, LabelledReply]]) -> tuple[list[LabelledReply], list[LabelledReply]]:
    """Rows to fit and rows to choose by: every fourth class by name, so that no template is in both."""
    held = set(sorted({name for name, _ in rows})[3::4])
    return [row for name, row in rows if name not in held], [row for name, row in rows if name in held]


def main(path: Path = WEIGHTS) -> int:
    """Train and write the weights; the exit code."""
    weights = train(*split_by_class(triples()))
    path.write_text(json.dumps(weights) + "\n")
    sys.stdout.write(
        f"{path}: {weights['num_rows']} rows, penalty {weights['penalty']}, held-out loss {weights['held_out_loss_nats']}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
