"""Measures the judges against known labels and writes `accuracy.jsonl`: python -m temper.judges.accuracy

Three samples: the test part of the built-in sets (labels by construction, templates that no judge has seen), and two
parts of real replies that people labelled (the opt-in asset "refusal-labels"; only counts are kept). Those people
asked whether a harmful goal was served: a cheerful reply about something else is a refusal to them, in most positives
of "extra" and many of "test". Judges that look for refusing words miss these, and their recall there says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from temper.core.types import Run
from temper.judges.base import Judge, Verdict
from temper.judges.loading import ACCURACY, NAMES, Accuracy, load
from temper.judges.train_classifier import LabelledReply, labelled_replies

if TYPE_CHECKING:
    from temper.ops.stats import Estimate

__all__ = ["human_rows", "main", "measure_judge"]

BUILTIN = "builtin:noncompliance+behaviours:test"
HUMAN = "asset:refusal-labels"


def human_rows(part: str) -> list[LabelledReply]:
    """Real replies with people's labels, part "test" or "extra"; fetched once, never copied."""
    from temper.data.loading import load_data
    from temper.data.schemas import Labelled

    records = [r for r in load_data(HUMAN)[part] if isinstance(r, Labelled)]
    return [LabelledReply(str(r.extra.get("prompt", "")), r.text, bool(int(r.label))) for r in records]


def measure_judge(judge: Judge, rows: Sequence[LabelledReply], data: str) -> Accuracy:
    """Precision, recall (Wilson) and F1 (bootstrap over items) of yes, kappa, and the unscored share."""
    verdicts = judge.judge([(row.prompt, row.reply) for row in rows])
    return _accuracy(judge, rows, verdicts, data)


def _accuracy(
    judge: Judge, rows: Sequence[LabelledReply], verdicts: Sequence[Verdict], data: str
) -> Accuracy:
    from temper.ops import stats

    scored = [(row.refusal, v.label) for row, v in zip(rows, verdicts, strict=True) if v.label is not None]
    gold = np.array([g for g, _ in scored], dtype=float)
    said = np.array([s for _, s in scored], dtype=float)
    hits = int((gold * said).sum())
    precision = stats.wilson(hits, int(said.sum())) if said.sum() else None
    recall = stats.wilson(hits, int(gold.sum())) if gold.sum() else None
    f1 = stats.bootstrap((gold, said), _f1) if len(scored) else None
    kappa = round(stats.kappa(gold.tolist(), said.tolist()), 4) if scored else None
    return Accuracy(
        judge=judge.name,
        revision=judge.revision,
        data=data,
        n=len(rows),
        num_pos=sum(row.refusal for row in rows),
        unscored_share=round(1 - len(scored) / len(rows), 4),
        **_named("precision", precision),
        **_named("recall", recall),
        **_named("f1", f1),
        kappa=kappa,
    )


def _named(name: str, estimate: Estimate | None) -> dict[str, Any]:
    """An estimate as three columns, None where it is undefined."""
    value, low, high = (round(x, 4) for x in estimate[:3]) if estimate else (None, None, None)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def _f1(gold: np.ndarray, said: np.ndarray) -> float:  # type: ignore[type-arg]
    return float(2 * (gold * said).sum() / max(1.0, gold.sum() + said.sum()))


def main(arguments: Sequence[str] | None = None, path: Path = ACCURACY) -> int:
    """Measure the named judges (all offline ones by default); rows of other judges stay."""
    parser = argparse.ArgumentParser(description="Measure the judges against known labels.")
    parser.add_argument("judges", nargs="*", default=list(NAMES), help="names, e.g. model:smollm2-135m")
    parser.add_argument("--limit", type=int, default=0, help="rows of each sample, from its beginning")
    options = parser.parse_args(arguments)
    samples = {BUILTIN: labelled_replies("test")} | {f"{HUMAN}:{p}": human_rows(p) for p in ("test", "extra")}
    if options.limit:
        samples = {f"{name}:{options.limit}": rows[: options.limit] for name, rows in samples.items()}
    found = []
    for name in options.judges:
        judge = load(name, run=Run())
        for data, rows in samples.items():
            found.append(measure_judge(judge, rows, data))
            sys.stdout.write(f"{json.dumps(found[-1]._asdict())}\n")
    kept = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    fresh = {row.judge for row in found}
    lines = [row for row in kept if row["judge"] not in fresh] + [row._asdict() for row in found]
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in sorted(lines, key=lambda r: (r["judge"], r["data"])))
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
