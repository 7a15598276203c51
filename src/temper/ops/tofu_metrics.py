"""Rows of a forget/retain report as TOFU has them: a value an item, a mean with its interval, replies and examples."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from temper.core.types import Row, Run
from temper.ops import stats, text
from temper.ops.generate import Reply, Sampling, generate

if TYPE_CHECKING:
    from temper.systems.causal_lm import CausalLM

__all__ = ["BETTER", "fluency_rows", "mean_row", "raw_rows", "write_examples"]

BETTER: Mapping[tuple[bool, str], bool] = {
    (is_forget, name): not is_forget
    for is_forget in (True, False)
    for name in ("probability", "exact_memorisation", "extraction_strength", "rouge")
} | {(True, "truth_ratio"): True, (False, "truth_ratio"): True}
"""(whether the split is to be forgotten, metric) -> whether higher is better; metrics that are missing have no side."""


def mean_row(metric: str, values: Sequence[float], split: str, better: bool | None) -> Row:
    """A mean with its interval."""
    mean = stats.mean_ci(values)
    low, high = (mean.low, mean.high) if math.isfinite(mean.low) else (None, None)
    return Row(
        metric=metric, value=mean.value, n=mean.n, stderr=mean.stderr, low=low, high=high, split=split,
        higher_is_better=better,
    )  # fmt: skip


def raw_rows(scores: Mapping[str, Sequence[float | None]], ids: Sequence[str], split: str) -> Iterator[Row]:
    """One row an item and one mean for each metric; a metric that no row has is None and says why."""
    for name, values in scores.items():
        metric, better = f"{split}_{name}", BETTER.get((split == "forget", name))
        known = [value for value in values if value is not None]
        if not known:
            note = "no row has a column perturbed_answer"
            yield Row(metric=metric, value=None, n=0, split=split, higher_is_better=better, note=note)
            continue
        yield mean_row(metric, known, split, better)
        for item, value in zip(ids, values, strict=True):
            if value is not None:
                yield Row(metric=metric, value=value, item=item, split=split, higher_is_better=better)


def fluency_rows(
    system: CausalLM, records: Sequence[Any], split: str, reply_tokens: int, run: Run
) -> tuple[list[Reply], list[Row]]:
    """Greedy replies to the prompts, and rows of their ROUGE-L recall, repetition and distinct bigrams."""
    sampling = Sampling(max_new_tokens=reply_tokens, seed=run.seed)
    replies = generate(system, [record.prompt for record in records], sampling, run)
    scores: dict[str, list[float | None]] = {
        "rouge": [
            text.rouge_l_recall(r.text, record.reply) for r, record in zip(replies, records, strict=True)
        ],
        # Of tokens: a broken reply may hold no words.
        "repetition": [text.repetition_rate(reply.ids) for reply in replies],
    }
    rows = list(raw_rows(scores, [record.id for record in records], split))
    distinct = text.distinct_n([reply.text for reply in replies])
    rows.append(
        Row(metric=f"{split}_distinct_2", value=distinct, n=len(replies), split=split, higher_is_better=True)
    )
    return replies, rows


def write_examples(run: Run, records: Sequence[Any], replies: Sequence[Reply], most: int = 24) -> None:
    """Forget questions with their answer and what the model writes now, for the report."""
    if run.folder is None:
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / "examples.jsonl").open("w", encoding="utf-8") as file:
        for record, reply in list(zip(records, replies, strict=True))[:most]:
            row = {
                "id": record.id,
                "prompt": record.prompt[-1].content,
                "before": record.reply,
                "after": reply.text,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
