"""The training loop: losses as sums and counts, any split into micro-batches, exact resume.

A step takes `batch_rows` items, whatever the token budget splits them into. Each term of the loss is a sum, divided
by its count over the whole step, so 1 x 8 and 8 x 1 give one gradient. Randomness inside a micro-batch (dropout) is
seeded from (seed, step, micro-batch): a resumed run, or one on several processes, draws the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

from temper.core.errors import ConfigError
from temper.core.types import Run
from temper.ops.endings import keep_ending
from temper.ops.objectives import Objective, SftObjective, SumCount
from temper.ops.optim import BuildOptimizer, adamw
from temper.ops.precision import eval_mode
from temper.ops.train_loop import Loop, Plan
from temper.ops.train_settings import TrainLog, TrainSettings
from temper.systems.freed_memory import all_memory_kept

__all__ = ["Objective", "SftObjective", "SumCount", "TrainLog", "TrainSettings", "train"]

Item = TypeVar("Item")


def train(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter] | Iterable[nn.Parameter],
    epoch_items: Callable[[int], Sequence[Item]],
    objective: Objective[Item],
    settings: TrainSettings,
    run: Run,
    *,
    length: Callable[[Item], int],
    build_optimizer: BuildOptimizer | None = None,
    before_step: Callable[[int], None] | None = None,
    every: int = 0,
    callback: Callable[[int], Mapping[str, float] | None] | None = None,
    stop_when: Callable[[TrainLog], bool] | None = None,
) -> TrainLog:
    """Minimise the objective over `parameters`, in place; dropout acts in the modules that are in train mode.

    `epoch_items(epoch)` gives an epoch's items, always as many; `length` is an item's tokens.
    `before_step(step)` may change the objective's weights. `callback(num_steps_done)` runs in eval mode every
    `every` steps and what it returns joins `log.curve`; `stop_when` is asked every `settings.log_every` steps
    whether the loss diverged, which ends training and stands in `run.folder`. With `run.checkpoint_every` the state is kept in
    `run.checkpoint`, and `run.resume` goes on from there, bit-identical to a run never stopped.
    A step that `run.budget` does not pay for ends training; the budget says what ran out.
    Raises NumericsError at a loss or gradient that is not finite, DataError when there are no items, ConfigError for a
    budget below one step.
    """
    trained = _trainable(parameters)
    plan = Plan(epoch_items, settings, run.seed)
    build = build_optimizer or (
        lambda chosen: adamw(chosen, settings.lr, settings.weight_decay, settings.betas, settings.eps)
    )
    loop = Loop(model, trained, build(trained), objective, settings, run, plan, length)
    kept = all_memory_kept() if trained[0].device.type == "cpu" else nullcontext()
    with kept, _training(model, trained, settings):
        start = loop.resume()
        for step in run.ticker(range(start, plan.num_steps), total=plan.num_steps - start, label="train"):
            if not loop.is_paid(step):
                break
            if before_step is not None:
                before_step(step)
            loop.step(step)
            done = step + 1
            if callback is not None and every and done % every == 0:
                with eval_mode(model):
                    loop.log.curve.append({"step": done, **(callback(done) or {})})
            if loop.after_step(done, stop_when):
                break
    if loop.log.stopped_early:
        keep_ending(run.folder, loop.log.num_steps, "the loss diverged")
    return loop.log


def _trainable(parameters: Mapping[str, nn.Parameter] | Iterable[nn.Parameter]) -> list[nn.Parameter]:
    given = parameters.values() if isinstance(parameters, Mapping) else parameters
    chosen = list({id(p): p for p in given if p.requires_grad}.values())
    if not chosen:
        raise ConfigError("No parameter is trainable", cure="Check the names of the layers to train.")
    return chosen


@contextmanager
def _training(model: nn.Module, trained: list[nn.Parameter], settings: TrainSettings) -> Iterator[None]:
    """Gradients for `trained` alone, activation checkpointing if asked; all as it was afterwards."""
    module: Any = model
    python_state = random.getstate()
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    modes = [(part, part.training) for part in model.modules()]
    chosen = {id(p) for p in trained}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    with torch.random.fork_rng(devices=list(devices)):
        if settings.gradient_checkpointing:
            module.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
            for part in model.modules():
                # Layers look at their own mode to decide; their dropout inside keeps its mode.
                part.training |= hasattr(part, "gradient_checkpointing")
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)
            if settings.gradient_checkpointing:
                module.activation_checkpointing_disable()
            for part, training in modes:
                part.training = training
            random.setstate(python_state)
