"""FLAT as a training run: forget rows paired with templates, one loss for both, every step's probabilities kept."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from temper.artefacts import Tune, Tuning
from temper.core.errors import DataError
from temper.core.types import Run
from temper.data.schemas import Data, Dialogue, Text
from temper.methods.unlearning.flat.card import Config
from temper.methods.unlearning.flat.divergences import flat_loss, mean_probabilities
from temper.ops.batching import Example, collate, encode
from temper.ops.logprobs import score_batch
from temper.ops.objectives import SumCount
from temper.ops.train import TrainLog, train
from temper.ops.unlearning import Look, Watch, train_settings
from temper.systems.causal_lm import CausalLM

__all__ = [
    "FlatObjective",
    "Pair",
    "Rows",
    "Unlearned",
    "focused",
    "prepare",
    "report_outcome",
    "templates_of",
    "tune",
    "unlearn",
]

logger = logging.getLogger(__name__)

FEW_TEMPLATES = 10
"""Fewer than so many are learnt by heart."""
SHIPPED = Path(__file__).parent / "data" / "templates.txt"


class Pair(NamedTuple):
    """A forget row, and the same question with the template drawn for it."""

    forget: Example
    template: Example


@cache
def _shipped() -> tuple[str, ...]:
    return tuple(SHIPPED.read_text(encoding="utf-8").splitlines())


def templates_of(record: Dialogue, pool: Sequence[str]) -> tuple[str, ...]:
    """A row's own templates (column `template`: a text or a list), or the pool, blank ones left out.

    Raises DataError for none.
    """
    own = record.extra.get("template")
    given = tuple(pool) if own is None else (own,) if isinstance(own, str) else tuple(map(str, own))
    found = tuple(text for text in given if text.strip())
    if not found:
        raise DataError(
            "There is no template answer to move to",
            where=f"row {record.id}",
            cure="Leave the column template out, or give the row or the part templates a text.",
        )
    return found


def focused(system: CausalLM, example: Example, record: Dialogue) -> Example:
    """The example scored only where its reply spells the texts of the row's column `focus`, if it has one (Departure 9).

    Raises DataError for a text that the reply does not hold.
    """
    wanted = record.extra.get("focus")
    if not wanted:
        return example
    places = [place for place, scored in enumerate(example.scored) if scored]
    ids = [example.ids[place] for place in places]
    texts = [system.tokenizer.decode(ids[:end]) for end in range(len(ids) + 1)]
    spans = [(len(before), len(after)) for before, after in pairwise(texts)]
    kept: list[tuple[int, int]] = []
    for part in [wanted] if isinstance(wanted, str) else wanted:
        start = texts[-1].find(str(part))
        if start < 0 or not str(part):
            raise DataError(
                f"The answer does not hold {part!r}",
                where=f"row {record.id}, column 'focus'",
                cure="Copy the text from the answer, letter by letter.",
            )
        kept.append((start, start + len(str(part))))
    chosen = {
        place
        for place, (begin, end) in zip(places, spans, strict=True)
        if any(begin < last and first < end for first, last in kept)
    }
    return Example(example.ids, [place in chosen for place in range(len(example.ids))])


class Rows:
    """Forget rows as tokens, and their questions with any template: drawn anew for every row in every epoch."""

    def __init__(
        self, system: CausalLM, records: Sequence[Any], pool: Sequence[str], config: Config, seed: int
    ) -> None:
        self.system, self.records, self.max_tokens, self.seed = system, records, config.max_tokens, seed
        self.pools = [templates_of(record, pool) for record in records]
        self.answers = [self._encode(record) for record in records]
        self.forget = [
            focused(system, answer, record) for answer, record in zip(self.answers, records, strict=True)
        ]
        self._encoded: dict[tuple[int, str], Example] = {}

    def _encode(self, record: Any) -> Example:
        return encode(self.system, record, train_on="last", max_tokens=self.max_tokens)

    def template(self, row: int, epoch: int) -> Example:
        """A row's question with the template of an epoch."""
        text = random.Random(f"{self.seed}/template/{epoch}/{row}").choice(self.pools[row])
        if (row, text) not in self._encoded:
            record = self.records[row]
            place = f"row {record.id}, its template"
            pair = (record.prompt, text)
            self._encoded[row, text] = encode(self.system, pair, max_tokens=self.max_tokens, where=place)
        return self._encoded[row, text]

    def pairs(self, epoch: int) -> list[Pair]:
        """Every forget row once, each with its template of the epoch (Departure 4: two rows of tokens)."""
        return [Pair(row, self.template(number, epoch)) for number, row in enumerate(self.forget)]


def prepare(system: CausalLM, data: Data, config: Config, run: Run) -> Rows:
    """The forget rows and their templates: the part `templates`, or the shipped ones (Departure 5)."""
    pool = [record.text for record in data.records("templates", Text)] if "templates" in data else _shipped()
    rows = Rows(system, data["forget"], pool, config, run.seed)
    if min(map(len, rows.pools)) < FEW_TEMPLATES:
        logger.warning(
            "%d template answers: so few are learnt by heart; give %d or more",
            min(map(len, rows.pools)),
            FEW_TEMPLATES,
        )
    return rows


class FlatObjective:
    """The loss over Pairs; terms of weight 0 watch P_e and P_f, averaged over the rows of a step."""

    def __init__(self, config: Config, *, pad_id: int, device: str | torch.device) -> None:
        self.config, self.pad_id, self.device = config, pad_id, device
        self.weights = {"flat": 1.0, "template_probability": 0.0, "forget_probability": 0.0}
        self.unsplittable = config.reduction == "batch_mean"
        self.packs = True

    def longest(self, item: Pair) -> int:
        """Tokens of the pair's longer row."""
        return max(len(item.forget.ids), len(item.template.ids))

    def counts(self, items: Sequence[Pair]) -> dict[str, float]:
        """Rows; a step whose probabilities are averaged first counts as one."""
        rows = float(len(items))
        return {name: rows for name in self.weights} | {"flat": 1.0 if self.unsplittable else rows}

    def __call__(self, model: nn.Module, items: Sequence[Pair]) -> dict[str, SumCount]:
        """Each term's sum over the pairs, both answers of all of them in one forward pass."""
        counts = self.counts(items)
        rows = [item.template for item in items] + [item.forget for item in items]
        probabilities = mean_probabilities(score_batch(model, collate(rows, self.pad_id, self.device)))
        template_B, forget_B = probabilities.split(len(items))
        # Departure 2: one loss a row.
        pair = (
            (template_B.mean()[None], forget_B.mean()[None]) if self.unsplittable else (template_B, forget_B)
        )
        totals = {
            "flat": flat_loss(*pair, self.config.divergence).sum(),
            "template_probability": template_B.detach().sum(),
            "forget_probability": forget_B.detach().sum(),
        }
        return {name: SumCount(total, counts[name]) for name, total in totals.items()}


class Unlearned(NamedTuple):
    """What a run logged, and the looks on its way, the first one before the first step."""

    log: TrainLog
    looks: list[Look]


def tune(config: Config, run: Run) -> Tune:
    """What is trained; weights that stay frozen are held in the run's precision."""
    low = run.precision == "bf16" and config.mode == "lora"
    return Tune(
        mode=config.mode, r=config.rank, alpha=2.0 * config.rank, frozen_dtype="bf16" if low else "same"
    )


def unlearn(tuned: Tuning, rows: Rows, retain: Sequence[Any], config: Config, run: Run) -> Unlearned:
    """Train in place; retain rows are only looked at."""
    system = tuned.system
    most = config.watch_rows
    parts = {
        "forget": rows.answers[:most],
        "retain": [encode(system, r, train_on="last", max_tokens=config.max_tokens) for r in retain[:most]],
        "template": [rows.template(number, 0) for number in range(len(rows.answers))][:most],
    }
    watch = Watch(system, parts, run)
    looks: list[Look] = [{"step": 0.0, **watch.look(0)}] if config.watch_every else []
    log = train(
        system.model,
        tuned.parameters(),
        rows.pairs,
        FlatObjective(config, pad_id=system.pad_id, device=system.device),
        train_settings(len(rows.forget), config, log_every=1),
        run,
        length=lambda pair: len(pair.forget.ids) + len(pair.template.ids),
        every=config.watch_every,
        callback=watch.look if config.watch_every else None,
    )
    report_outcome(log)
    return Unlearned(log, [*looks, *log.curve])


def report_outcome(log: TrainLog) -> None:
    """Say when neither probability moved: the loss is flat where both are near 0, and then a larger step is needed."""
    forget, template = log.terms["forget_probability"], log.terms["template_probability"]
    if forget[-1] > 0.9 * forget[0] and template[-1] - template[0] < 0.05:
        logger.warning(
            "P_f went from %.3f to %.3f and P_e from %.3f to %.3f in %d steps: raise lr, num_epochs or min_steps",
            forget[0],
            forget[-1],
            template[0],
            template[-1],
            log.num_steps,
        )
