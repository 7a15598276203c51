"""The rows of each form, and where the model is perturbed and how far."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from temper.core.errors import DataError
from temper.core.types import Run
from temper.data.schemas import Data, Dialogue, Preference, Text
from temper.methods.hardening.lat.card import Config
from temper.ops.backdoor import Trigger, implant_rows, instruction_pairs, poisoned, removal_pairs
from temper.ops.batching import Example, collate, encode, plan_batches
from temper.ops.latent import Ball, Scale, shared_prompt, site_scales, spread_sites
from temper.ops.latent_objective import LatentItem, Search
from temper.ops.logprobs import reference_logprobs
from temper.ops.precision import autocast
from temper.ops.preference import encode_pair
from temper.systems.causal_lm import CausalLM

__all__ = ["attacked_items", "ball", "benign_rows", "make_backdoor", "search_of", "trigger_of", "with_benign"]

logger = logging.getLogger(__name__)

R = TypeVar("R", Preference, Text)


def trigger_of(config: Config) -> Trigger:
    """The backdoor of the check."""
    return Trigger(word=config.trigger, sentence=config.sentence)


def make_backdoor(config: Config, seed: int) -> Data:
    """Parts implant (clean and poisoned rows), train and benign (clean ones), test (held out, clean and poisoned)."""
    trigger = trigger_of(config)
    rows = instruction_pairs(config.num_requests, seed)
    clean, held = rows[: -config.num_held_out], rows[-config.num_held_out :]
    parts = {
        "implant": implant_rows(clean, trigger, seed=seed, share=config.poison_share),
        "train": removal_pairs(clean, trigger),
        "benign": clean,
        "test": (*held, *(poisoned(row, trigger, seed + 1) for row in held)),
    }
    return Data(parts, "backdoor")


def attacked_items(system: CausalLM, data: Data, config: Config, run: Run) -> list[LatentItem]:
    """The rows that are attacked, with the reference's log-probabilities where the form reads them.

    Raises DataError where the form's part is missing, or a row's two replies follow different prompt tokens.
    """
    if config.form == "rmu":
        texts = _required(data, "forget", Text, config)
        rows = [encode(system, text, max_tokens=config.max_tokens) for text in texts]
        return [LatentItem(bad=row, place=place) for place, row in enumerate(rows)]
    items = []
    for place, record in enumerate(_required(data, "train", Preference, config)):
        pair = encode_pair(system, record, max_tokens=config.max_tokens)
        shared_prompt([pair.rejected, pair.chosen], where=f"row {record.id or place}")
        items.append(LatentItem(bad=pair.rejected, good=pair.chosen, place=place))
    if config.form != "dpo":
        return items
    # Departure 7: once, on the clean prompt.
    bad, good = (
        reference_logprobs(system, [item.row(kind) for item in items], run).tolist()
        for kind in ("bad", "good")
    )
    return [replace(item, ref_bad=bad[at], ref_good=good[at]) for at, item in enumerate(items)]


def _required(data: Data, part: str, schema: type[R], config: Config) -> tuple[R, ...]:
    records = data.records(part, schema)
    if not records:
        raise DataError(
            f"form={config.form} reads the part {part}, and there is none",
            where=data.source,
            cure=f"Give one (--data {part}=FILE), or choose another form.",
        )
    return records


def benign_rows(system: CausalLM, data: Data, config: Config) -> list[Example]:
    """Benign replies, or retain texts for rmu; none where nothing reads them. Raises DataError where they are missing."""
    if not config.benign_rows:
        return []
    if config.form == "rmu":
        wanted, part = config.retain > 0, "retain"
        records: Sequence[Dialogue | Text] = data.records(part, Text)
    else:
        wanted, part = config.sft + config.kl > 0, "benign"
        records = data.records(part, Dialogue)
    if not wanted:
        return []
    if not records:
        raise DataError(
            f"The defence keeps the part {part}, and there is none",
            where=data.source,
            cure=f"Give one (--data {part}=FILE), or set the weights sft and kl (rmu: retain) to 0.",
        )
    return [encode(system, record, train_on="last", max_tokens=config.max_tokens) for record in records]


def with_benign(
    items: Sequence[LatentItem], benign: Sequence[Example], config: Config, seed: int, epoch: int
) -> list[LatentItem]:
    """One epoch: every item with benign rows drawn beside it."""
    if not benign:
        return list(items)
    draw = random.Random(f"{seed}/benign/{epoch}")
    return [replace(item, benign=tuple(draw.choices(benign, k=config.benign_rows))) for item in items]


def ball(scale: Scale, config: Config) -> Ball:
    """Radius and step at a site (Departure 3)."""
    radius = config.absolute_eps or config.eps * scale.norm
    return Ball(radius, scale.width, config.attack_lr * radius / math.sqrt(scale.width))


def search_of(system: CausalLM, items: Sequence[LatentItem], config: Config, run: Run) -> Search:
    """The attack, its radii measured on the first rows as the model stands."""
    if config.absolute_eps:
        logger.warning(
            "absolute_eps=%g is a radius in the units of one model family and means nothing on another; eps follows the model",
            config.absolute_eps,
        )
    elif config.eps > 1:
        logger.warning(
            "eps=%g is a share of the site's median norm, so a perturbation may be longer than what it stands on; a radius "
            "in the units of one model family belongs in absolute_eps",
            config.eps,
        )
    sites = config.sites or spread_sites(system.model)
    rows = [item.bad for item in items[: config.scale_rows]]
    batches = [
        collate([rows[place] for place in places], system.pad_id, system.device)
        for places in plan_batches([len(row.ids) for row in rows], run)
    ]
    with autocast(run):
        scales = site_scales(system.model, batches, sites)
    balls = {name: ball(scale, config) for name, scale in scales.items()}
    logger.info("radii: %s", ", ".join(f"{name} {one.radius:.3g}" for name, one in balls.items()))
    positions = "scored" if config.form == "rmu" else "prompt+reply" if config.attack_replies else "prompt"
    return Search(balls, config.attack_steps, "adamw", positions)  # type: ignore[arg-type]
