"""Training steps that leave no trace: a model trained for a while by somebody imagined, looked at on the way, put back.

The gradients of both go through `torch.autograd.grad`, so nothing gathers in `.grad`; the optimiser lives for one loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from temper.core.types import Run
from temper.ops.micro_batch import part_loss, split
from temper.ops.objectives import Objective
from temper.ops.optim import BuildOptimizer

__all__ = ["Gradient", "Grads", "add_scaled", "gradient", "inner_loop", "restored"]

Item = TypeVar("Item")
Grads = list[Tensor | None]
"""A gradient for each parameter, or None."""


class Gradient(NamedTuple):
    """A loss and its gradient; None for a parameter that the loss does not reach."""

    loss: Tensor
    grads: Grads


def gradient(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    objective: Objective[Item],
    items: Sequence[Item],
    run: Run,
    *,
    length: Callable[[Item], int],
) -> Gradient:
    """The loss of one step over `items` and its gradient, as the training loop has them; no `.grad` is touched.

    Rows are split by the run's token budget; sums are divided by the whole step's counts.
    """
    counts = {name: float(count) for name, count in objective.counts(items).items()}
    lengths = [length(item) for item in items]
    device = parameters[0].device
    total = torch.zeros((), device=device)
    grads: Grads = [None] * len(parameters)
    for places in split(model, objective, lengths, run, device):
        part = [items[place] for place in places]
        with part_loss(model, objective, part, counts, run, length=length, device=device) as (_, loss):
            if loss.requires_grad:
                add_scaled(grads, torch.autograd.grad(loss, parameters, allow_unused=True), 1.0)
        total = total + loss.detach()
    return Gradient(total, grads)


def add_scaled(into: Grads, grads: Sequence[Tensor | None], scale: float) -> None:
    """Add `scale` times gradients to gathered ones, in place; None counts as 0."""
    for place, grad in enumerate(grads):
        if grad is None:
            continue
        gathered = into[place]
        if gathered is None:
            into[place] = grad.clone() if scale == 1.0 else grad * scale
        else:
            gathered.add_(grad, alpha=scale)


@contextmanager
def restored(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Afterwards, also after an error, every parameter has its value and its `.grad` again, bit for bit.

    The copies lie in ordinary memory, not on the accelerator.
    """
    values = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    grads = [parameter.grad for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value, grad in zip(parameters, values, grads, strict=True):
                parameter.copy_(value)
                parameter.grad = grad


def inner_loop(
    parameters: Sequence[nn.Parameter],
    num_steps: int,
    gradient_of: Callable[[int], Gradient],
    build_optimizer: BuildOptimizer,
    after_step: Callable[[int, Tensor], None],
) -> None:
    """`num_steps` steps of a fresh optimiser, then everything as it was; `after_step(k, loss)` sees the model after step k.

    `gradient_of(k)` is the gradient of step k = 0, 1, ... at the parameters as they stand.
    """
    with restored(parameters):
        optimizer = build_optimizer(parameters)
        for step in range(num_steps):
            loss, grads = gradient_of(step)
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad
            optimizer.step()
            for parameter in parameters:
                parameter.grad = None
            after_step(step, loss)
