"""Fit a model against its own perturbed activations, measure the backdoor, make the check's data; losses in `games.py`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

from temper.artefacts import Artefact, Tune, tuning
from temper.core.errors import DataError
from temper.core.types import Row, Run
from temper.data.schemas import Data, Dialogue
from temper.methods.hardening.lat.card import Config
from temper.methods.hardening.lat.games import Dpo, Reference, Rmu, TowardAway, direction
from temper.methods.hardening.lat.rows import (
    attacked_items,
    benign_rows,
    make_backdoor,
    search_of,
    trigger_of,
    with_benign,
)
from temper.ops.backdoor import shows_backdoor
from temper.ops.batching import encode
from temper.ops.generate import Sampling, generate
from temper.ops.latent_objective import (
    LatentObjective,
    Search,
    attack_figures,
    attack_items,
    train_rounds,
)
from temper.ops.logprobs import response_logprobs
from temper.ops.stats import mean_ci
from temper.ops.train import SftObjective, TrainLog, TrainSettings, train
from temper.systems.causal_lm import CausalLM

__all__ = ["fit", "make", "measure", "objective_of"]

logger = logging.getLogger(__name__)

SLUG = "lat"


def fit(system: CausalLM, data: Data, config: Config, run: Run) -> Artefact:
    """Train against perturbed activations (form=implant: fine-tune on the part implant); the system stays as it was.

    Raises DataError where a part that the form reads is missing, ConfigError for a site or layer that is not there.
    """
    if config.form == "implant":
        return _implant(system, data, config, run)
    items = attacked_items(system, data, config, run)
    benign = benign_rows(system, data, config)
    search = search_of(system, items, config, run)
    with tuning(system, _tune(config, run), run) as tuned:
        objective = objective_of(tuned.system, config, search, tuned.reference, run.seed)
        log = train_rounds(
            tuned.system.model,
            tuned.parameters(),
            lambda epoch: with_benign(items, benign, config, run.seed, epoch),
            objective,
            _train_settings(config),
            run,
            restart_optimizer=config.restart_optimizer,
        )
        _report(log, run)
        return tuned.finish(SLUG)


def measure(system: CausalLM, data: Data, config: Config, run: Run) -> Iterator[Row]:
    """What the trigger brings, what ordinary replies cost, and (with the part train) what the adversary gains."""
    records = data.records("test", Dialogue)
    fired = [record for record in records if record.extra.get("poisoned")][: config.max_rows]
    clean = [record for record in records if not record.extra.get("poisoned")][: config.max_rows]
    for metric, part, higher in (("trigger_loss_nats", fired, True), ("benign_loss_nats", clean, False)):
        if part:
            yield from _losses(system, metric, part, higher, config, run)
    if config.reply_tokens:
        for metric, part in (("trigger_rate", fired), ("false_trigger_rate", clean)):
            if part:
                yield from _rates(system, metric, part, config, run)
    if "train" in data and config.attack_steps and config.form == "toward_away":
        items = attacked_items(system, data, config, run)[: config.max_rows]
        objective = objective_of(system, config, search_of(system, items, config, run))
        found = attack_items(system.model, items, objective, run)
        gains = (found.before_N - found.after_N).tolist()
        yield _mean("adversary_gain_nats", gains, False)
        yield Row(metric="boundary_share", value=found.boundary_share, n=len(items), split="test")


def make(system: CausalLM | None, data: Data, config: Config, run: Run) -> Data:
    """The check's rows: a backdoor to implant, pairs to remove it, held-out rows with and without its trigger."""
    return make_backdoor(config, run.seed)


def objective_of(
    system: CausalLM, config: Config, search: Search, before: Reference | None = None, seed: int = 0
) -> LatentObjective:
    """The form's losses on both sides; without `before` only its attack can be used."""
    start: Callable[[], Any] = before or (lambda: nullcontext(system))
    game: Any
    if config.form == "rmu":
        width = next(iter(search.balls.values())).width
        control_D = direction(width, config.rmu_norm, seed)  # Departure 8
        game = Rmu(config, start, system.pad_id, system.device, control_D)
    else:
        kind = Dpo if config.form == "dpo" else TowardAway
        game = kind(config, start, system.pad_id, system.device)
    return LatentObjective(
        game, search, pad_id=system.pad_id, device=system.device, num_repeats=config.model_steps
    )


def _implant(system: CausalLM, data: Data, config: Config, run: Run) -> Artefact:
    """Plain fine-tuning on the part implant: the model that has the backdoor."""
    records = data.records("implant", Dialogue)
    if not records:
        raise DataError("form=implant reads the part implant, and there is none", where=data.source)
    rows = [encode(system, record, train_on="last", max_tokens=config.max_tokens) for record in records]
    settings = TrainSettings(
        lr=config.lr,
        num_epochs=config.implant_epochs,
        batch_rows=config.batch_rows,
        schedule="cosine",
        warmup_ratio=0.05,
        clip_norm=config.clip_norm,
    )
    with tuning(system, _tune(config, run), run) as tuned:
        log = train(
            tuned.system.model,
            tuned.parameters(),
            lambda epoch: rows,
            SftObjective(system.pad_id, system.device),
            settings,
            run,
            length=lambda row: len(row.ids),
        )
        logger.info("implanted with %d rows: %.3f nats a token at the end", len(rows), log.loss[-1])
        return tuned.finish(SLUG)


def _tune(config: Config, run: Run) -> Tune:
    low = run.precision == "bf16" and config.mode == "lora"
    targets = config.targets if config.mode == "lora" else "all-linear"
    return Tune(
        mode=config.mode,
        r=config.rank,
        alpha=float(config.rank),
        targets=targets,
        frozen_dtype="bf16" if low else "same",
    )


def _train_settings(config: Config) -> TrainSettings:
    return TrainSettings(
        lr=config.lr,
        max_steps=config.num_rounds * config.model_steps,
        batch_rows=config.batch_rows,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        gradient_checkpointing=config.gradient_checkpointing,
    )


def _report(log: TrainLog, run: Run) -> None:
    """The attack's curves for the report."""
    last = {name: values[-1] for name, values in log.terms.items()}
    logger.info(
        "attack at the last round: %.3f to %.3f, %.0f %% of tokens on the boundary",
        last["attack_before"],
        last["attack_after"],
        100 * last["boundary_share"],
    )
    if run.folder is not None:
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "figures.json").write_text(json.dumps(attack_figures(log)))


def _losses(
    system: CausalLM, metric: str, records: Sequence[Dialogue], higher: bool, config: Config, run: Run
) -> Iterator[Row]:
    """Nats a token of each row's reply, then their mean."""
    rows = [encode(system, record, train_on="last", max_tokens=config.max_tokens) for record in records]
    values = (-response_logprobs(system, rows, reduce="mean", run=run)).tolist()
    for record, value in zip(records, values, strict=True):
        yield Row(metric=metric, value=value, item=record.id, split="test", higher_is_better=higher)
    yield _mean(metric, values, higher)


def _rates(
    system: CausalLM, metric: str, records: Sequence[Dialogue], config: Config, run: Run
) -> Iterator[Row]:
    """Whether each greedy reply begins with the backdoor's sentence, then how often."""
    prompts = [record.prompt for record in records]
    replies = generate(system, prompts, Sampling(max_new_tokens=config.reply_tokens), run)
    hits = [float(shows_backdoor(reply.text, trigger_of(config))) for reply in replies]
    for record, hit in zip(records, hits, strict=True):
        yield Row(metric=metric, value=hit, item=record.id, split="test", higher_is_better=False)
    yield _mean(metric, hits, False)


def _mean(metric: str, values: Sequence[float], higher: bool) -> Row:
    estimate = mean_ci(values)
    return Row(
        metric=metric,
        value=estimate.value,
        n=len(values),
        stderr=estimate.stderr if len(values) > 1 else None,
        split="test",
        higher_is_better=higher,
    )
