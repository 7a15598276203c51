"""Rows of a forget/retain report: items beside means, sides, metrics nobody has, replies and examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from temper.core.types import Message, Run
from temper.data.schemas import Dialogue
from temper.ops import text, tofu_metrics
from temper.systems.loading import load_base

RECORDS = [
    Dialogue((Message("user", f"What is {n}?"), Message("assistant", f"It is {n}.")), id=f"row-{n}")
    for n in range(3)
]


def test_a_mean_row_has_its_interval_or_none() -> None:
    row = tofu_metrics.mean_row("m", [0.2, 0.4, 0.6], "forget", False)
    assert (row.value, row.n, row.higher_is_better) == (pytest.approx(0.4), 3, False)
    assert row.low is not None and row.high is not None and row.low < 0.4 < row.high  # noqa: PT018
    single = tofu_metrics.mean_row("m", [0.2], "forget", None)
    assert (single.value, single.low, single.high) == (0.2, None, None)


def test_raw_rows_by_hand() -> None:
    scores: dict[str, list[float | None]] = {
        "probability": [0.5, None, 1.0],
        "truth_ratio": [None, None, None],
    }
    rows = list(tofu_metrics.raw_rows(scores, ["a", "b", "c"], "retain"))
    assert {row.item: row.value for row in rows if row.item} == {"a": 0.5, "c": 1.0}, "b has no value"
    mean, missing = [row for row in rows if row.item is None]
    assert (mean.metric, mean.value, mean.higher_is_better) == ("retain_probability", 0.75, True)
    assert (missing.value, missing.note) == (None, "no row has a column perturbed_answer")
    forget = next(tofu_metrics.raw_rows(scores, ["a", "b", "c"], "forget"))
    assert forget.higher_is_better is False
    assert tofu_metrics.BETTER[True, "truth_ratio"] is True


def test_replies_are_scored_and_kept(tmp_path: Path) -> None:
    system: Any = load_base("tiny:llama")
    replies, rows = tofu_metrics.fluency_rows(system, RECORDS, "forget", 6, Run())
    found = {(row.metric, row.item): row.value for row in rows}
    for record, reply in zip(RECORDS, replies, strict=True):
        assert len(reply.ids) <= 6
        assert found["forget_rouge", record.id] == text.rouge_l_recall(reply.text, record.reply or "")
        assert found["forget_repetition", record.id] == text.repetition_rate(reply.ids)
    assert found["forget_distinct_2", None] == text.distinct_n([reply.text for reply in replies])
    tofu_metrics.write_examples(Run(folder=tmp_path), RECORDS, replies, most=2)
    lines = (tmp_path / "examples.jsonl").read_text().splitlines()
    shown = [json.loads(line) for line in lines]
    assert [row["id"] for row in shown] == ["row-0", "row-1"]
    assert shown[0]["prompt"] == "What is 0?"
    tofu_metrics.write_examples(Run(), RECORDS, replies)
