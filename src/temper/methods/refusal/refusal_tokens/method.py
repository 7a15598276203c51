"""Fit refusal tokens, calibrate them, and read them back; measuring is in `scoring.py`.

Shape letters: N rows, K control columns (refusal tokens, then [respond]), C refusal categories.
"""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from temper.artefacts import Artefact, Decoder, Stack, Tune, tuning
from temper.core.errors import DataError, ModelError
from temper.core.types import Row, Run
from temper.data.schemas import Data, Dialogue
from temper.methods.refusal.refusal_tokens import calibration, scoring
from temper.methods.refusal.refusal_tokens.card import RESPOND, Config
from temper.methods.refusal.refusal_tokens.control_tokens import controls_of, token_of, unused_specials
from temper.methods.refusal.refusal_tokens.gate import Controls, RefusalGate
from temper.ops.batching import Example
from temper.ops.optim import BuildOptimizer
from temper.ops.train import SftObjective, TrainSettings, train
from temper.systems.causal_lm import CausalLM
from temper.systems.chat import Rendered

__all__ = [
    "build_decoder",
    "category_of",
    "encode",
    "fit",
    "gate_of",
    "measure",
    "names_of",
    "recalibrate",
    "training_rows",
    "with_controls",
]

logger = logging.getLogger(__name__)

SLUG = "refusal-tokens"
FEW_ROWS = 30
"""Below this many rows a category's threshold is unreliable (the card's limit)."""


def with_controls(rendered: Rendered, control_ids: Sequence[int | None]) -> Example:
    """The dialogue's ids with one control id before each assistant turn, and the mask that scores it (Eq. y').

    `control_ids` has one id per assistant turn, None for none. Scored: control token, reply, end of turn.
    """
    turns = [span for span in rendered.spans if span.role == "assistant"]
    ids: list[int] = []
    scored: list[bool] = []
    at = 0
    for span, control in zip(turns, control_ids, strict=True):
        opening = [] if control is None else [control]
        ids += [*rendered.ids[at : span.start], *opening, *rendered.ids[span.start : span.end]]
        scored += [False] * (span.start - at) + [True] * (len(opening) + span.end - span.start)
        at = span.end
    ids += rendered.ids[at:]
    scored += [False] * (len(rendered.ids) - at)
    return Example(ids, scored)


def category_of(record: Dialogue) -> str | None:
    """The row's refusal category, None for a row that must be answered."""
    return record.extra.get("refusal_category")


def names_of(records: Sequence[Dialogue], config: Config) -> tuple[str, ...]:
    """The refusal tokens' names in column order; raises DataError where there is nothing to refuse or to answer."""
    found = sorted({name for record in records if (name := category_of(record)) is not None})
    answered = sum(category_of(record) is None for record in records)
    if not found or not answered:
        raise DataError(
            f"Training rows hold {len(found)} refusal categories and {answered} answered rows; both are needed",
            where="part train, column refusal_category",
            cure="Give each refusal row its category and each answered row null.",
        )
    if "respond" in found:
        raise DataError('"respond" is no name for a refusal category', where="column refusal_category")
    for name in found:
        count = sum(category_of(record) == name for record in records)
        if count < FEW_ROWS:
            logger.warning(
                "category %r has %d rows; its threshold is unreliable below %d", name, count, FEW_ROWS
            )
    return ("refuse",) if config.tokens == "single" else tuple(found)


def training_rows(records: Sequence[Dialogue], config: Config, seed: int) -> list[Dialogue]:
    """The rows to train on: contrast rows in or out, and a seeded subset that keeps each kind's share."""
    kept = [record for record in records if config.contrast or record.extra.get("kind") != "contrast"]
    if not config.max_train_rows or config.max_train_rows >= len(kept):
        return kept
    groups: dict[Any, list[Dialogue]] = defaultdict(list)
    for record in kept:
        groups[(category_of(record) or "", str(record.extra.get("kind")))].append(record)
    share = config.max_train_rows / len(kept)
    chosen: list[Dialogue] = []
    for _, group in sorted(groups.items()):
        random.Random(seed).shuffle(group)
        chosen += group[: max(1, round(share * len(group)))]
    return chosen


def fit(system: CausalLM, data: Data, config: Config, run: Run) -> Artefact:
    """Train the tokens and calibrate them: a Stack of Adapter (or Weights) and Decoder; without tokens, the first alone.

    Given calibration rows only, on a system that has the tokens, recalibrates and returns a Decoder.
    Raises DataError for rows without categories, ModelError for a template that already opens the reply.
    """
    system.chat.require_template()
    system.chat.require_closed_reply()
    held_out = data.records("calibration", Dialogue)
    if "train" not in data:
        return recalibrate(system, held_out, config, run)
    records = training_rows(data.records("train", Dialogue), config, run.seed)
    names = names_of(records, config)
    if config.tokens != "none":
        calibration.check_held_out(held_out, names, config)
    tokens = [] if config.tokens == "none" else [*(token_of(name) for name in names), RESPOND]
    with tuning(system, _tune(system, config, tokens, run), run) as tuned:
        controls = controls_of(tuned.system, names, tokens, config)
        examples = [encode(tuned.system, record, controls, config) for record in records]
        train(
            tuned.system.model,
            tuned.parameters(),
            lambda epoch: examples,
            SftObjective(tuned.system.pad_id, tuned.system.device),
            _train_settings(config),
            run,
            length=lambda example: len(example.ids),
            build_optimizer=_optimizer(tuned.row_parameters(), config),
        )
        weights = tuned.finish(SLUG)
        if controls is None:
            return weights
        settings = calibration.settings_for(tuned.system, held_out, controls, config, run)
    return Stack.of([weights, Decoder(system.fingerprint, SLUG, settings)], SLUG)


def recalibrate(system: CausalLM, held_out: Sequence[Dialogue], config: Config, run: Run) -> Decoder:
    """New thresholds for a system that already has the tokens, e.g. for another system prompt or language."""
    gate = gate_of(system)
    if gate is None:
        raise DataError(
            "There are no train rows, and the system has no refusal tokens to recalibrate",
            where="part train",
            cure="Give train rows, or a system with a refusal-tokens artefact and a part calibration.",
        )
    if not held_out:
        raise DataError(
            "There are neither train nor calibration rows", cure="Give part calibration, part train or both."
        )
    calibration.check_held_out(held_out, gate.controls.names, config)
    settings = calibration.settings_for(system, held_out, gate.controls, config, run)
    return Decoder(system.fingerprint, SLUG, settings)


def gate_of(system: CausalLM) -> RefusalGate | None:
    """The refusal gate in force on a system: the last one applied, or None."""
    gates = [rule for rule in system.step_rules if isinstance(rule, RefusalGate)]
    return gates[-1] if gates else None


def build_decoder(system: CausalLM, artefact: Decoder) -> RefusalGate:
    """The gate of a saved calibration; raises ModelError when the template is not the one it was calibrated with."""
    settings = artefact.settings
    if settings["template_sha256"] != system.chat.sha256:
        raise ModelError(
            "These thresholds were calibrated with another chat template or system prompt",
            where=f"template {settings['template_sha256'][:12]}, now {system.chat.sha256[:12]}",
            cure="Use the template of the fit, or recalibrate: fit refusal-tokens with a part calibration and no train.",
        )
    gate = RefusalGate(settings)
    for name, token_id in gate.controls.to_json().items():
        if token_id >= system.num_embeddings:
            raise ModelError(
                f"Control id {token_id} of {name!r} is beyond the model's {system.num_embeddings} embedding rows",
                cure="Apply the adapter of the same fit first.",
            )
    return gate


def measure(system: CausalLM, data: Data, config: Config, run: Run) -> Iterator[Row]:
    """Refusals on the part test, by token and by the judge on the text; writes curves and examples for the report."""
    records: Sequence[Dialogue] = [
        replace(record, messages=record.prompt) for record in data.records("test", Dialogue)
    ]
    gate = gate_of(system)
    if gate is None:
        yield from scoring.text_rows(scoring.grade(system, records, config, run), records)
        return
    read = calibration.read_out(system, records, gate, run)
    yield from scoring.token_rows(read, gate, records)
    scoring.write_figures(run.folder, read, gate, records)
    if not config.reply_tokens:
        return
    by_default = scoring.grade(scoring.untuned(system, gate), records, config, run)
    yield from scoring.text_rows(by_default, records)
    tuned = scoring.regrade(system, by_default, read, gate, records, config, run)
    yield from scoring.text_rows(tuned, records, "_calibrated")
    scoring.write_examples(run.folder, records, by_default, tuned)


def _tune(system: CausalLM, config: Config, tokens: Sequence[str], run: Run) -> Tune:
    add = config.placement == "add"
    return Tune(
        mode=config.mode,
        r=config.rank,
        alpha=2.0 * config.rank,
        new_tokens=tuple(tokens) if add else (),
        reuse_ids=() if add else tuple(unused_specials(system, len(tokens))),
        frozen_dtype="bf16" if run.precision == "bf16" and config.mode == "lora" else "same",
    )


def encode(system: CausalLM, record: Dialogue, controls: Controls | None, config: Config) -> Example:
    """A training row; raises DataError, naming it, for a row without a reply or longer than `max_tokens`."""
    where = f"row {record.id or '(without id)'}"
    if record.reply is None:
        raise DataError(
            "The row has no reply to learn from", where=where, cure="End it with an assistant message."
        )
    rendered = system.chat.dialogue(record.messages)
    num_turns = sum(span.role == "assistant" for span in rendered.spans)
    if controls is None:
        example = with_controls(rendered, [None] * num_turns)
    else:
        last = controls.ids[controls.column(category_of(record))]
        example = with_controls(rendered, [controls.respond] * (num_turns - 1) + [last])
    if len(example.ids) > config.max_tokens:
        raise DataError(
            f"The row has {len(example.ids)} tokens; its reply would be truncated at {config.max_tokens}",
            where=where,
            cure="Raise max_tokens, or shorten or drop the row.",
        )
    return example


def _optimizer(rows: Sequence[nn.Parameter], config: Config) -> BuildOptimizer | None:
    """AdamW with a learning rate of their own for the control rows (Departure 9), or None for the usual one."""
    if not config.token_lr or not rows:
        return None
    own = {id(row) for row in rows}

    def build(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        others = [parameter for parameter in parameters if id(parameter) not in own]
        groups = [{"params": others, "lr": config.lr}, {"params": list(rows), "lr": config.token_lr}]
        return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)

    return build


def _train_settings(config: Config) -> TrainSettings:
    return TrainSettings(
        lr=config.lr,
        num_epochs=config.num_epochs,
        batch_rows=config.batch_rows,
        schedule=config.schedule,
        warmup_ratio=config.warmup_ratio,
    )
