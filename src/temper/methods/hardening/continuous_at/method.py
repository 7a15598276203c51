"""Fit C-AdvUL or C-AdvIPO, measure what withstands the embedding attack, make the code-word game; losses in `games.py`."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from temper import judges
from temper.artefacts import Artefact, Tune, Tuning, tuning
from temper.core.errors import DataError
from temper.core.types import Row, Run
from temper.data.schemas import Data, Dialogue, Preference
from temper.methods.hardening.continuous_at.card import Config
from temper.methods.hardening.continuous_at.games import AdvIPO, AdvUL
from temper.methods.hardening.continuous_at.words import make_words
from temper.ops.batching import Example, encode
from temper.ops.generate import Sampling, generate
from temper.ops.latent import EMBEDDINGS, Ball, embedding_scale, shared_prompt
from temper.ops.latent_objective import (
    LatentItem,
    LatentObjective,
    Search,
    attack_figures,
    attack_items,
    train_rounds,
)
from temper.ops.logprobs import reference_logprobs, response_logprobs
from temper.ops.preference import encode_pair
from temper.ops.stats import mean_ci
from temper.ops.train import SftObjective, TrainLog, TrainSettings, train
from temper.systems.causal_lm import CausalLM

__all__ = ["adversarial_items", "fit", "make", "measure", "objective_of"]

logger = logging.getLogger(__name__)

SLUG = "continuous-at"


def fit(system: CausalLM, data: Data, config: Config, run: Run) -> Artefact:
    """Train against embedding attacks (variant=learn: to comply); the system stays as it was.

    Raises DataError for C-AdvUL without utility rows, and for a row whose two replies follow different prompt tokens.
    """
    if config.variant == "learn":
        return _learn(system, data, config, run)
    if system.chat.template is None:
        logger.warning(
            "the model has no chat template, so rows are put in temper's plain format: harden it in the format it will be "
            "asked in"
        )
    pairs = data.records("train", Preference)
    items = adversarial_items(system, pairs, config, run, reference=config.variant == "ipo")
    utility = _utility(system, data, config)
    with tuning(system, _tune(config, run), run) as tuned:
        _use_dropout(tuned.system.model)
        log = train_rounds(
            tuned.system.model,
            tuned.parameters(),
            lambda epoch: _with_utility(items, utility, config, run.seed, epoch),
            objective_of(tuned.system, config, tuned),
            _train_settings(config),
            run,
        )
        _report(log, config, run)
        return tuned.finish(SLUG)


def measure(system: CausalLM, data: Data, config: Config, run: Run) -> Iterator[Row]:
    """Loss of unwanted replies with and without the attack, of ordinary replies, and refusal rates."""
    pairs = data.records("test", Preference)[: config.max_rows]
    benign = data.records("benign", Dialogue)[: config.max_rows]
    items = adversarial_items(system, pairs, config, run)
    found = attack_items(system.model, items, objective_of(system, config), run)
    ids = [pair.id or str(number) for number, pair in enumerate(pairs)]
    yield from _means("clean_loss_nats", found.before_N.tolist(), ids, True)
    yield from _means("attacked_loss_nats", found.after_N.tolist(), ids, True)
    yield Row(metric="boundary_share", value=found.boundary_share, n=len(items), split="test")
    if benign:
        rows = [encode(system, record, train_on="last", max_tokens=config.max_tokens) for record in benign]
        losses = (-response_logprobs(system, rows, reduce="mean", run=run)).tolist()
        names = [record.id or str(number) for number, record in enumerate(benign)]
        yield from _means("benign_loss_nats", losses, names, False)
    if config.reply_tokens:
        yield _refusals(system, "refusal_rate", [pair.prompt for pair in pairs], True, config, run)
        if benign:
            prompts = [record.prompt for record in benign]
            yield _refusals(system, "refusal_rate_benign", prompts, False, config, run)


def make(system: CausalLM | None, data: Data, config: Config, run: Run) -> Data:
    """The code-word game: train, test, utility, benign and goals."""
    return make_words(config, run.seed)


def adversarial_items(
    system: CausalLM, pairs: Sequence[Preference], config: Config, run: Run, *, reference: bool = False
) -> list[LatentItem]:
    """Each pair's two rows, checked to begin with one prompt; with `reference` the system's mean log-probabilities."""
    items = []
    for number, record in enumerate(pairs):
        pair = encode_pair(system, record, max_tokens=config.max_tokens)
        shared_prompt([pair.rejected, pair.chosen], where=f"row {record.id or number}")
        items.append(LatentItem(bad=pair.rejected, good=pair.chosen, place=number))
    if not reference:
        return items
    good, bad = (
        reference_logprobs(system, [item.row(kind) for item in items], run).tolist()
        for kind in ("good", "bad")
    )  # Departure 2: every value stays with its row.
    return [
        LatentItem(
            bad=item.bad,
            good=item.good,
            ref_good=good[at] / sum(item.row("good").scored),
            ref_bad=bad[at] / sum(item.bad.scored),
            place=at,
        )
        for at, item in enumerate(items)
    ]


def objective_of(system: CausalLM, config: Config, tuned: Tuning | None = None) -> LatentObjective:
    """The attack with the variant's losses; without a tuning only the attack is used."""
    scale = embedding_scale(system.model)
    if config.eps > 1:
        logger.warning(
            "eps=%g is a share of the mean norm of embedding rows (%.3g here), not a radius in the units of another model: "
            "a perturbation may be longer than the row it stands on",
            config.eps,
            scale.norm,
        )
    # Departure 5: where the module scales its rows, radius and step are scaled with them.
    ball = Ball(config.eps * scale.norm, scale.width, config.attack_lr * scale.factor)
    search = Search({EMBEDDINGS: ball}, config.attack_steps, "sign")
    game: Any = AdvUL(config)
    if config.variant == "ipo" and tuned is not None:
        game = AdvIPO(config, tuned.reference, system.pad_id, system.device)
    return LatentObjective(game, search, pad_id=system.pad_id, device=system.device)


def _utility(system: CausalLM, data: Data, config: Config) -> list[Example]:
    if config.variant == "ipo" or not config.utility_rows or not config.utility_weight:
        return []
    records = data.records("utility", Dialogue)
    if not records:
        raise DataError(
            "C-AdvUL keeps ordinary replies, and there are none",
            where=data.source,
            cure="Give a part utility, take --set variant=ipo, or --set utility_rows=0.",
        )
    return [encode(system, record, train_on="last", max_tokens=config.max_tokens) for record in records]


def _with_utility(
    items: Sequence[LatentItem], utility: Sequence[Example], config: Config, seed: int, epoch: int
) -> list[LatentItem]:
    """One epoch: every adversarial row with utility rows drawn beside it (Departure 7)."""
    if not utility:
        return list(items)
    draw = random.Random(f"{seed}/utility/{epoch}")
    count = config.utility_rows
    return [
        LatentItem(item.bad, item.good, tuple(draw.choices(utility, k=count)), item.ref_bad, item.ref_good)
        for item in items
    ]


def _learn(system: CausalLM, data: Data, config: Config, run: Run) -> Artefact:
    """Plain fine-tuning on unwanted and ordinary replies."""
    pairs = [*data.records("train", Preference), *data.records("test", Preference)]
    examples = [encode_pair(system, pair, max_tokens=config.max_tokens).rejected for pair in pairs]
    examples += [
        encode(system, record, train_on="last", max_tokens=config.max_tokens)
        for record in data.records("utility", Dialogue)
    ]
    with tuning(system, _tune(config, run), run) as tuned:
        log = train(
            tuned.system.model,
            tuned.parameters(),
            lambda epoch: examples,
            SftObjective(system.pad_id, system.device),
            _train_settings(config),
            run,
            length=lambda example: len(example.ids),
        )
        logger.info("learnt %d rows: %.3f nats a token at the end", len(examples), log.loss[-1])
        return tuned.finish(SLUG)


def _tune(config: Config, run: Run) -> Tune:
    low = run.precision == "bf16" and config.mode == "lora"
    return Tune(
        mode=config.mode,
        r=config.rank,
        alpha=config.alpha,
        dropout=config.dropout if config.mode == "lora" else 0.0,
        targets=config.targets,
        frozen_dtype="bf16" if low else "same",
    )


def _use_dropout(model: nn.Module) -> None:
    """Dropout on adapters while training; the tuning puts the modes back."""
    for name, part in model.named_modules():
        if "lora_dropout" in name:
            part.train()


def _train_settings(config: Config) -> TrainSettings:
    return TrainSettings(
        lr=config.lr,
        num_epochs=config.num_epochs,
        max_steps=config.max_steps,
        batch_rows=config.batch_rows,
        schedule=config.schedule,
        warmup_ratio=config.warmup_ratio,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        gradient_checkpointing=config.gradient_checkpointing,
    )


def _report(log: TrainLog, config: Config, run: Run) -> None:
    """The attack's curves for the report; a warning where the attack found nothing to move."""
    last = {name: values[-1] for name, values in log.terms.items()}
    gain = last["attack_before"] - last["attack_after"]
    logger.info(
        "attack at the last step: %.3f to %.3f nats a token, %.0f %% of tokens on the boundary",
        last["attack_before"],
        last["attack_after"],
        100 * last["boundary_share"],
    )
    if config.attack_steps and max(log.terms["boundary_share"]) == 0.0:
        logger.warning(
            "no perturbed token ever reached its radius and the attack gained %.3f nats a token at the end: raise "
            "attack_lr or attack_steps, or lower eps",
            gain,
        )
    if run.folder is not None:
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "figures.json").write_text(json.dumps(attack_figures(log)))


def _means(metric: str, values: Sequence[float], ids: Sequence[str], higher: bool) -> Iterator[Row]:
    """A row for each item, then their mean."""
    for name, value in zip(ids, values, strict=True):
        yield Row(metric=metric, value=value, item=name, split="test", higher_is_better=higher)
    mean = sum(values) / len(values)
    spread = mean_ci(values).stderr if len(values) > 1 else None
    yield Row(metric=metric, value=mean, n=len(values), stderr=spread, split="test", higher_is_better=higher)


def _refusals(
    system: CausalLM, metric: str, prompts: Sequence[Any], higher: bool, config: Config, run: Run
) -> Row:
    """How often the judge calls a greedy reply a refusal."""
    replies = generate(system, prompts, Sampling(max_new_tokens=config.reply_tokens), run)
    asked = [(prompt[-1].content, reply.text) for prompt, reply in zip(prompts, replies, strict=True)]
    counted = judges.tally(judges.load(config.judge, run=run).judge(asked))
    note = f"{counted.num_unscored} unscored" if counted.num_unscored else ""
    return Row(
        metric=metric,
        value=counted.rate,
        n=counted.num_scored,
        split="test",
        higher_is_better=higher,
        note=note,
    )
