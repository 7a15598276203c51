"""Make the probes, measure a model by them, and the baseline that only asks it to have forgotten."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from temper.artefacts import Artefact, Prompt
from temper.artefacts.base import ANY_BASE
from temper.core.errors import DataError
from temper.core.types import Row, Run
from temper.data.schemas import Data
from temper.methods.unlearning.rwku.card import Config
from temper.methods.unlearning.rwku.published import load_folder
from temper.methods.unlearning.rwku.scoring import Scored, probe_rows, recovery_rows, score_probes
from temper.methods.unlearning.rwku.standin import build, wordings
from temper.methods.unlearning.rwku.utility import membership_rows, utility_rows
from temper.systems.causal_lm import CausalLM

__all__ = ["fit", "make", "measure"]

SLUG = "rwku"


def make(system: CausalLM | None, data: Data, config: Config, run: Run) -> Data:
    """The probes: the user's copy of the benchmark (`folder`), or a stand-in built from facts about invented people.

    Part `forget` of what it gives are portraits of the targets: what gradient ascent and NPO train on in the paper.
    """
    if config.folder:
        return load_folder(config.folder, config.subjects)
    parts: dict[str, Sequence[Any]] = {name: data[name] for name in data}
    if config.subjects and "forget" in parts:
        parts["forget"] = [r for r in parts["forget"] if r.extra.get("person") in config.subjects]
    if config.num_targets and "forget" in parts:
        parts["forget"] = _of_turn(parts["forget"], config.num_targets, run.seed)
    return build(parts, config.num_facts, config.num_utility)


def _of_turn(records: Sequence[Any], count: int, seed: int) -> list[Any]:
    """The rows about `count` people: each further seed begins one person later, and the first comes after the last."""
    people = list(dict.fromkeys(record.extra.get("person") for record in records))
    chosen = {people[(seed + number) % len(people)] for number in range(min(count, len(people)))}
    return [record for record in records if record.extra.get("person") in chosen]


def measure(system: CausalLM, data: Data, config: Config, run: Run) -> Iterator[Row]:
    """Recall of probes by kind, membership scores and utility: each where the data has its parts."""
    if not data:
        raise DataError(
            "There are no probes", cure="Make some: temper run rwku, or name parts such as forget_level2."
        )
    plain = system.chat.template is None
    note = "no chat template: plain Question/Answer format" if plain else ""
    scores = score_probes(system, data, config, run)
    _write_examples(run, [row for rows in scores.values() for row in rows])
    for row in (*probe_rows(scores), *recovery_rows(scores)):
        yield replace(row, note=row.note or note)
    yield from membership_rows(system, data, config, run)
    for row in utility_rows(system, data, config, run):
        yield replace(row, note=row.note or note)


def fit(system: CausalLM, data: Data, config: Config, run: Run) -> Artefact:
    """In-context unlearning: a prefix that asks the model to behave as if it had never known the subjects (Departure 10)."""
    named = [
        str(record.extra.get("subject") or "")
        for part in data
        for record in data[part]
        if part.startswith("forget")
    ]
    subjects = list(dict.fromkeys(filter(None, config.subjects or named)))
    if not subjects:
        raise DataError(
            "Nobody is named to forget",
            where=data.source,
            cure="Set subjects, or give forget probes with a column subject.",
        )
    prefix = wordings()["icu"].format(subject=", ".join(subjects)).strip() + "\n"
    return Prompt(ANY_BASE, SLUG, prefix=prefix)


def _write_examples(run: Run, rows: Sequence[Scored], most: int = 60) -> None:
    """Probes, answers and replies, for the report: those of different kinds first to be seen."""
    if run.folder is None:
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / "examples.jsonl").open("w", encoding="utf-8") as file:
        for row in rows[:: max(1, len(rows) // most)]:
            shown = {
                "id": row.record.id,
                "prompt": row.record.prompt[-1].content,
                "before": row.record.reply,
                "after": row.reply,
            }
            file.write(json.dumps(shown, ensure_ascii=False) + "\n")
