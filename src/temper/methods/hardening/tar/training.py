"""The two stages as training runs: rows split and encoded, adversaries drawn, their gradients laid under the outer step."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from temper.artefacts import Tuning
from temper.core.errors import NumericsError
from temper.core.types import Run
from temper.methods.hardening.tar.card import Config, num_passes, step_weight
from temper.methods.hardening.tar.losses import MappingObjective, MappingPair, random_rows
from temper.ops.batching import Example
from temper.ops.inner_loop import Gradient, Grads, add_scaled, gradient, inner_loop
from temper.ops.objectives import Objective, SftObjective
from temper.ops.optim import adamw
from temper.ops.processes import processes
from temper.ops.retain import RetainObjective
from temper.ops.train import TrainLog, TrainSettings, train

__all__ = ["Adversary", "Resistance", "Rows", "TamperGradient", "draw_adversary", "map_randomly", "resist"]

logger = logging.getLogger(__name__)

SWITCH = "switch"


class Rows(NamedTuple):
    """What an adversary trains on, by source, what is kept, and what is read after the attack and never trained on."""

    sources: Mapping[str, Sequence[Example]]
    """"forget" and, where there is one, "second"."""
    retain: Sequence[Example]
    held_out: Sequence[Any]
    """Examples or PreferencePairs."""


class Resistance(NamedTuple):
    """L_TR: what is lowered on the held-out rows after an attack, and the length of one of them."""

    objective: Objective[Any]
    length: Any


@dataclass(frozen=True)
class Adversary:
    """One attack: the rows of its steps, its learning rate, and the rows on which it is judged."""

    source: str
    lr: float
    batches: tuple[tuple[Example, ...], ...]
    held_out: tuple[Any, ...]


def draw_adversary(rows: Rows, config: Config, draw: random.Random) -> Adversary:
    """An adversary from the mix; `switch` trains on retain rows for int(K Beta(a, b)) steps, then on forget rows."""
    weights = {"forget": config.forget_weight, "second": config.second_weight}
    kinds = {name: weights[name] for name in rows.sources if weights[name]}
    kinds |= {SWITCH: config.switch_weight} if config.switch_weight else {}
    source = draw.choices(list(kinds), list(kinds.values()))[0]
    lr = draw.choice(config.adversary_lrs)
    num_retain = 0
    if source == SWITCH:
        num_retain = int(config.inner_steps * draw.betavariate(config.switch_alpha, config.switch_beta))
    attacked = rows.sources["forget" if source == SWITCH else source]
    batches = tuple(
        _batch(rows.retain if step < num_retain else attacked, config.adversary_rows, draw)
        for step in range(config.inner_steps)
    )
    return Adversary(source, lr, batches, _batch(rows.held_out, config.batch_rows, draw))


def _batch(rows: Sequence[Any], size: int, draw: random.Random) -> tuple[Any, ...]:
    return tuple(draw.sample(rows, size) if size <= len(rows) else draw.choices(rows, k=size))


class TamperGradient:
    """Lays the tamper-resistance gradient of an outer step into `.grad`, where the retain gradient is added to it.

    `last` is the weighted tamper-resistance loss of the latest step, `last_plain` that at the end of its attacks.
    """

    def __init__(
        self,
        tuned: Tuning,
        rows: Rows,
        resistance: Resistance,
        config: Config,
        run: Run,
        *,
        lower_bound: float,
    ) -> None:
        self.model: nn.Module = tuned.system.model
        self.parameters = tuned.parameters()
        self.learning = SftObjective(tuned.system.pad_id, tuned.system.device)
        self.rows, self.resistance, self.config, self.run = rows, resistance, config, run
        self.lower_bound = lower_bound
        self.procs = processes(run)
        self.last = self.last_plain = 0.0

    def before_step(self, step: int) -> None:
        """The gradient of outer step `step`, a function of the weights, the seed and the step alone."""
        draw = random.Random(f"{self.run.seed}/tar/{step}/{self.procs.rank}")
        gathered: Grads = [None] * len(self.parameters)
        self.last = self.last_plain = 0.0
        if self.config.form == "max_entropy":
            self._gather(gathered, _batch(self.rows.held_out, self.config.batch_rows, draw), 1.0, step, 0)
        else:
            for _ in range(self.config.num_adversaries):
                self._attack(draw_adversary(self.rows, self.config, draw), gathered, step)
        if self.config.unbounded or self.last >= self.lower_bound:
            for parameter, grad in zip(self.parameters, gathered, strict=True):
                parameter.grad = grad

    def _attack(self, adversary: Adversary, gathered: Grads, step: int) -> None:
        """Run one attack and gather what its steps say; the weights come back as they were."""
        config = self.config

        def learn(at: int) -> Gradient:
            found = gradient(
                self.model, self.parameters, self.learning, adversary.batches[at], self.run,
                length=lambda row: len(row.ids),
            )  # fmt: skip
            self._require_finite(found.loss, "adversary's", step, at)
            return found

        def look(at: int, loss: Tensor) -> None:
            if (at + 1) % config.inner_every == 0:
                share = step_weight(at, config) / config.num_adversaries
                self._gather(gathered, adversary.held_out, share, step, at + 1)

        def fresh(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
            return adamw(parameters, adversary.lr, config.adversary_decay, (0.9, 0.999), 1e-8)

        inner_loop(self.parameters, config.inner_steps, learn, fresh, look)

    def _gather(self, gathered: Grads, items: Sequence[Any], share: float, step: int, at: int) -> None:
        objective, length = self.resistance
        found = gradient(self.model, self.parameters, objective, items, self.run, length=length)
        self._require_finite(found.loss, "tamper-resistance", step, at)
        scale = self.config.resist_weight * share
        add_scaled(gathered, found.grads, scale / self.procs.num)
        self.last += scale * float(found.loss)
        self.last_plain = float(found.loss)

    def _require_finite(self, loss: Tensor, whose: str, step: int, at: int) -> None:
        if not bool(torch.isfinite(loss)):
            raise NumericsError(
                f"The {whose} loss is {float(loss)}",
                where=f"outer step {step}, after {at} steps of the attack",
                cure="Lower adversary_lrs or lr, or train in float32.",
            )


def map_randomly(tuned: Tuning, rows: Rows, config: Config, run: Run) -> TrainLog:
    """Stage 1 of the knowledge safeguard, in place."""
    system = tuned.system
    width = system.model.get_input_embeddings().weight.shape[1]
    table_VD = random_rows(system.num_embeddings, width, run.seed).to(system.device)
    forget = [row for source in rows.sources.values() for row in source]

    def pairs(epoch: int) -> list[MappingPair]:
        draw = random.Random(f"{run.seed}/mapping/{epoch}")
        return [MappingPair(draw.choice(rows.retain), row) for row in forget]

    log = train(
        system.model,
        tuned.parameters(),
        pairs,
        MappingObjective(table_VD, system.pad_id, system.device, config.num_skipped),
        _settings(config, config.mapping_lr or config.lr, config.mapping_steps),
        # Each stage has its own checkpoints, and all leave with the run's.
        replace(run, folder=run.checkpoint / "mapping" if run.checkpoint else None),
        length=lambda pair: pair.num_tokens,
    )
    logger.info("random mapping: 1 - |cos| is %.3f after %d steps", log.terms["mapping"][-1], log.num_steps)
    return log


def resist(tuned: Tuning, rows: Rows, resistance: Resistance, config: Config, run: Run) -> TrainLog:
    """Stage 2, in place: `num_steps` outer steps; the log's curve has the tamper-resistance loss of each."""
    system = tuned.system
    bound = config.lower_bound or -float(torch.tensor(float(system.num_embeddings)).log())
    tamper = TamperGradient(tuned, rows, resistance, config, run, lower_bound=bound)
    logger.info(
        "%d outer steps of %d attack steps: %.0f forward and backward passes",
        config.num_steps,
        config.inner_steps,
        num_passes(config),
    )
    retain = RetainObjective(
        tuned.reference,
        system.pad_id,
        system.device,
        config.num_skipped,
        {"retain": config.retain_weight, "hidden": config.retain_weight},
    )
    return train(
        system.model,
        tuned.parameters(),
        lambda epoch: rows.retain,
        retain,
        _settings(config, config.lr, config.num_steps),
        run,
        length=lambda row: len(row.ids),
        before_step=tamper.before_step,
        every=1,
        callback=lambda step: {"tamper_loss": tamper.last, "after_attack": tamper.last_plain},
    )


def _settings(config: Config, lr: float, num_steps: int) -> TrainSettings:
    warmup = min(config.warmup_steps, num_steps)
    return TrainSettings(
        lr=lr,
        max_steps=num_steps,
        batch_rows=config.batch_rows,
        # Half a step less: rounding never adds one to ceil(ratio * steps).
        warmup_ratio=max(0.0, warmup - 0.5) / num_steps,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        gradient_checkpointing=config.gradient_checkpointing,
    )
