"""One micro-batch of a training step: how a step is split, and its loss with the kernels its gradient needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from temper.core.errors import ConfigError
from temper.core.types import Run
from temper.ops.batching import CPU_TOKENS, plan_batches
from temper.ops.objectives import Objective, SumCount
from temper.ops.packed import can_pack
from temper.ops.precision import autocast, float32_products, short_attention

__all__ = ["Part", "part_loss", "split"]

Item = TypeVar("Item")


class Part(NamedTuple):
    """A micro-batch's terms and its share of the step's loss."""

    terms: Mapping[str, SumCount]
    loss: Tensor


def split(
    model: nn.Module, objective: Objective[Item], lengths: Sequence[int], run: Run, device: torch.device
) -> list[list[int]]:
    """A step's micro-batches as places in `lengths`, by the token budget; end to end where objective and model allow it.

    Raises ConfigError where a loss that cannot be split does not fit.
    """
    if getattr(objective, "unsplittable", False):
        _check_whole(objective, lengths, run)
        return [list(range(len(lengths)))]
    if getattr(objective, "packs", False) and device.type == "cpu" and can_pack(model):
        most = min(run.batch_tokens, CPU_TOKENS)
        return plan_batches(lengths, replace(run, batch_tokens=most), packed=True)
    return plan_batches(lengths, run)


@contextmanager
def part_loss(
    model: nn.Module,
    objective: Objective[Item],
    part: Sequence[Item],
    counts: Mapping[str, float],
    run: Run,
    *,
    length: Callable[[Item], int],
    device: torch.device,
) -> Iterator[Part]:
    """The loss of a step's `part`, its sums divided by the whole step's `counts`; the backward pass belongs inside.

    Activations computed again for it must take the same kernels. Raises ConfigError for a term without weight or count.
    """
    longest = max(map(getattr(objective, "longest", length), part))
    with short_attention(device, longest), float32_products(run):
        with autocast(run):
            terms = objective(model, part)
        weights = objective.weights
        _check_terms(terms, weights, counts)
        losses = (weights[name] * term.total / counts[name] for name, term in terms.items() if counts[name])
        yield Part(terms, sum(losses, torch.zeros((), device=device)))


def _check_whole(objective: Objective[Item], lengths: Sequence[int], run: Run) -> None:
    needed = len(lengths) * max(lengths)
    fits = needed <= run.batch_tokens or getattr(objective, "bounds_memory", False)
    if not fits or run.num_procs > 1:
        raise ConfigError(
            f"The loss compares the items of a step and cannot be split: {len(lengths)} items need {needed} "
            f"tokens, the budget is {run.batch_tokens}, the processes are {run.num_procs}",
            cure="Raise batch_tokens, lower batch_rows, and use one process.",
        )


def _check_terms(
    terms: Mapping[str, SumCount], weights: Mapping[str, float], counts: Mapping[str, float]
) -> None:
    for name in terms:
        if name not in weights or name not in counts:
            raise ConfigError(
                f"The loss term {name!r} has no {'weight' if name not in weights else 'count'}",
                where="the objective's call",
                cure="Name every term in `weights` and in `counts`.",
            )
