"""Three ways to tamper with a model whose weights one holds; the arithmetic of two of them is in `ops/tamper.py`."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial

from torch import Tensor

from temper.artefacts import Artefact, Tune, Weights, tuning
from temper.artefacts.targets import ALL_LINEAR, target_modules
from temper.core.errors import DataError
from temper.core.types import Run
from temper.data.schemas import Data, Dialogue
from temper.methods.attacks.tampering.card import Config
from temper.ops.batching import encode
from temper.ops.tamper import pruned, rounded
from temper.ops.train import SftObjective, TrainSettings, train
from temper.systems.causal_lm import CausalLM

__all__ = ["fit"]

SLUG = "tampering"


def fit(system: CausalLM, data: Data, config: Config, run: Run) -> Artefact:
    """The change that the attack makes to the system, as an artefact that stands on it."""
    return ATTACKS[config.how](system, data, config, run)


def _finetune(system: CausalLM, data: Data, config: Config, run: Run) -> Artefact:
    records = data.records("train", Dialogue)
    if not records:
        raise DataError(
            "Fine-tuning needs rows",
            where=data.source,
            cure="Give them (--data train=FILE), or take how=quantise or prune.",
        )
    held = random.Random(f"{run.seed}/held").sample(records, max(1, math.ceil(config.share * len(records))))
    examples = [encode(system, record, max_tokens=config.max_tokens) for record in held]
    settings = TrainSettings(lr=config.lr, max_steps=config.num_steps, batch_rows=config.batch_rows)
    with tuning(system, Tune(mode=config.mode, r=config.rank, alpha=2.0 * config.rank), run) as tuned:
        train(
            tuned.system.model,
            tuned.parameters(),
            lambda epoch: examples,
            SftObjective(tuned.system.pad_id, tuned.system.device),
            settings,
            run,
            length=lambda example: len(example.ids),
        )
        return tuned.finish(SLUG)


def _changed(system: CausalLM, change: Callable[[Tensor], Tensor]) -> Artefact:
    """Every linear layer's weights but the vocabulary's, changed (Departure 2)."""
    names = [f"{name}.weight" for name in target_modules(system.model, ALL_LINEAR)]
    tensors = {name: change(system.model.get_parameter(name).data).cpu() for name in names}
    return Weights(system.fingerprint, SLUG, tensors)


def _quantise(system: CausalLM, data: Data, config: Config, run: Run) -> Artefact:
    return _changed(system, partial(rounded, bits=config.bits, group=config.group_size))


def _prune(system: CausalLM, data: Data, config: Config, run: Run) -> Artefact:
    return _changed(system, partial(pruned, share=config.sparsity))


ATTACKS: dict[str, Callable[[CausalLM, Data, Config, Run], Artefact]] = {
    "finetune": _finetune,
    "quantise": _quantise,
    "prune": _prune,
}
