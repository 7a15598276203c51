"""The optimiser and the learning-rate curve of a training run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import nn

__all__ = ["SCHEDULES", "BuildOptimizer", "Schedule", "adamw", "lr_factor", "set_lr"]

Schedule = Literal["constant", "linear", "cosine"]
BuildOptimizer = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}
"""Factor on the learning rate after warm-up, as a function of progress in [0, 1)."""


def adamw(
    parameters: Sequence[nn.Parameter], lr: float, weight_decay: float, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """Fused AdamW; weight decay spares vectors (norms and biases)."""
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=eps, fused=True)


def lr_factor(step: int, num_steps: int, schedule: Schedule, warmup_ratio: float) -> float:
    """Factor on the learning rate of step 0, 1, ...; rises to 1 over the first `warmup_ratio` of the steps."""
    num_warmup = math.ceil(warmup_ratio * num_steps)
    if step < num_warmup:
        return (step + 1) / num_warmup
    return SCHEDULES[schedule]((step - num_warmup) / max(1, num_steps - num_warmup))


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every group its first learning rate times `factor`."""
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"] * factor
