"""Unlearning as a training run: rows paired and scored under the reference, steps counted, the way watched."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from temper.artefacts import Tune, Tuning
from temper.core.errors import DataError
from temper.core.types import Run
from temper.data.schemas import Data, Dialogue
from temper.methods.unlearning.npo.card import Config
from temper.methods.unlearning.npo.losses import Loss, parse
from temper.methods.unlearning.npo.objective import Pair, UnlearnObjective
from temper.ops.batching import Example, encode
from temper.ops.logprobs import reference_logprobs
from temper.ops.train import TrainLog, train
from temper.ops.unlearning import Watch, train_settings
from temper.systems.causal_lm import CausalLM

__all__ = [
    "Rows",
    "check_reference",
    "encode_answers",
    "idk_rows",
    "outcome",
    "pairs",
    "prepare",
    "tune",
    "unlearn",
    "watching",
]

logger = logging.getLogger(__name__)

REFERENCE_TOLERANCE = 0.05
"""Nats a token by which a model may differ from its own reference at step 0: rounding, not another model."""


class Rows(NamedTuple):
    """Everything a loss reads, as tokens, with the reference's log-probabilities of what it compares."""

    loss: Loss
    forget: list[Example]
    retain: list[Example]
    idk: list[Example]
    forget_ref: Tensor
    idk_ref: Tensor


def prepare(system: CausalLM, data: Data, config: Config, run: Run) -> Rows:
    """The rows of the loss; reference log-probabilities come from the system as it stands (Departure 2).

    Raises DataError for a loss with a retain term and no retain rows, and for a row whose answer is missing or cut away.
    """
    loss = parse(config.loss)
    if loss.needs_retain and "retain" not in data:
        raise DataError(
            f"The loss {config.loss!r} keeps a retain set, and there is none",
            where=data.source,
            cure="Give one (--data retain=FILE), or take a loss without: --set loss=npo.",
        )
    records: Sequence[Any] = data["forget"]
    forget = encode_answers(system, records, config)
    idk = idk_rows(system, records, config, run.seed) if "idk" in loss.forget.reads else []
    # Read also by the curve of a loss without a retain term.
    retain = encode_answers(system, data.get("retain"), config)
    refs = [torch.zeros(len(part)) for part in (forget, idk)]
    if loss.forget.uses_reference:
        refs = [reference_logprobs(system, part, run) if part else torch.zeros(0) for part in (forget, idk)]
    return Rows(loss, forget, retain, idk, *refs)


def encode_answers(system: CausalLM, records: Sequence[Any], config: Config) -> list[Example]:
    """The rows with their last answer scored, end-of-turn token included."""
    return [encode(system, record, train_on="last", max_tokens=config.max_tokens) for record in records]


def idk_rows(system: CausalLM, records: Sequence[Dialogue], config: Config, seed: int) -> list[Example]:
    """Each forget prompt with an "I don't know" reply, drawn once (Departure 5)."""
    if not config.idk_replies:
        raise DataError("There is no reply to learn in the forget answers' place", cure="Give idk_replies.")
    rows = []
    for number, record in enumerate(records):
        drawn = random.Random(f"{seed}/idk/{number}").choice(config.idk_replies)
        reply = str(record.extra.get("idk") or drawn)
        place = f"row {record.id}, its I-don't-know reply"
        rows.append(encode(system, (record.prompt, reply), max_tokens=config.max_tokens, where=place))
    return rows


def pairs(rows: Rows, seed: int, epoch: int) -> list[Pair]:
    """One epoch: every forget row once, with a retain row drawn at random (with replacement) for each."""
    draw = random.Random(f"{seed}/retain/{epoch}")
    forget_ref, idk_ref = rows.forget_ref.tolist(), rows.idk_ref.tolist()
    return [
        Pair(
            forget=row,
            forget_ref=forget_ref[number],
            idk=rows.idk[number] if rows.idk else None,
            idk_ref=idk_ref[number] if rows.idk else 0.0,
            retain=draw.choice(rows.retain) if rows.loss.needs_retain else None,
        )
        for number, row in enumerate(rows.forget)
    ]


def tune(config: Config, run: Run) -> Tune:
    """What is trained; weights that stay frozen are held in the run's precision."""
    low = run.precision == "bf16" and config.mode == "lora"
    return Tune(
        mode=config.mode, r=config.rank, alpha=2.0 * config.rank, frozen_dtype="bf16" if low else "same"
    )


def unlearn(tuned: Tuning, rows: Rows, config: Config, run: Run) -> tuple[TrainLog, list[dict[str, float]]]:
    """Train in place; gives the log and the looks, the first one before the first step."""
    system = tuned.system
    objective = UnlearnObjective(
        rows.loss,
        config,
        pad_id=system.pad_id,
        device=system.device,
        reference=tuned.reference,
        width=max(len(row.ids) for row in (*rows.forget, *rows.retain)),
    )
    watched = {"forget": rows.forget[: config.watch_rows], "retain": rows.retain[: config.watch_rows]}
    watch = Watch(system, watched, run)
    looks = [{"step": 0.0, **watch.look(0)}] if config.watch_every else []
    log = train(
        system.model,
        tuned.parameters(),
        lambda epoch: pairs(rows, run.seed, epoch),
        objective,
        train_settings(len(rows.forget), config, log_every=1),
        run,
        length=lambda pair: pair.num_tokens,
        every=config.watch_every,
        callback=watch.look if config.watch_every else None,
        stop_when=watching(config),
    )
    if said := outcome(log, config):
        logger.warning("%s", said)
    return log, [*looks, *log.curve]


def watching(config: Config) -> Callable[[TrainLog], bool]:
    """Asked after every step: whether the forget answers' cross-entropy has passed its bound (Departure 9).

    After the first step it warns about a reference that is not the model that unlearning starts from.
    """

    def stop(log: TrainLog) -> bool:
        if log.num_steps == 1:
            check_reference(log)
        watched = log.terms.get("forget_nll")
        return bool(config.max_forget_nll and watched) and watched[-1] > config.max_forget_nll  # type: ignore[index]

    return stop


def check_reference(log: TrainLog) -> None:
    """Warn unless the first step's answers, scored before any update, have the reference's log-probabilities."""
    ratios = log.terms.get("log_ratio")
    if ratios and not abs(ratios[0]) <= REFERENCE_TOLERANCE:
        logger.warning(
            "the reference is not the model that unlearning starts from: log-probabilities differ by %.3f nats a token "
            "at the first step; npo, dpo and kto need the fine-tuned target as reference",
            ratios[0],
        )


def outcome(log: TrainLog, config: Config) -> str:
    """What a user should know of how training ended: stopped as diverged, or hardly moved; "" for neither."""
    watched = log.terms.get("forget_nll")
    if not watched:
        return ""
    if log.stopped_early:
        return (
            f"stopped as diverged at step {log.num_steps}: the forget answers cost {watched[-1]:.1f} nats a token, "
            f"more than max_forget_nll={config.max_forget_nll:g}. "
            "Gradient ascent has no floor: lower lr or num_epochs, or use npo."
        )
    if watched[-1] - watched[0] < 0.1:
        return (
            f"the forget answers hardly moved in {log.num_steps} steps ({watched[0]:.2f} to {watched[-1]:.2f} nats a "
            "token): raise lr, num_epochs or min_steps"
        )
    return ""
