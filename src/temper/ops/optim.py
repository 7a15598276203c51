"""The optimiser and the learning-rate curve of a training run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = ["SCHEDULES", "BuildOptimizer", "Lamb", "Schedule", "adamw", "lamb", "lr_factor", "set_lr"]

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
    return torch.optim.AdamW(_groups(parameters, weight_decay), lr=lr, betas=betas, eps=eps, fused=True)


def lamb(
    parameters: Sequence[nn.Parameter],
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
) -> torch.optim.Optimizer:
    """LAMB; weight decay spares vectors (norms and biases)."""
    return Lamb(_groups(parameters, weight_decay), lr, betas, eps)


def _groups(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class Lamb(torch.optim.Optimizer):
    """Adam whose step on each tensor is as long as the tensor itself, times the learning rate (arXiv:1904.00962, v3).

    Without bias correction; the length of a tensor counts as 10 at most, and a tensor of zeros takes Adam's own step.
    """

    LONGEST = 10.0

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter with a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        assert parameter.grad is not None
        fast, slow = group["betas"]
        state["mean"].lerp_(parameter.grad, 1 - fast)
        state["square"].mul_(slow).addcmul_(parameter.grad, parameter.grad, value=1 - slow)
        step = state["mean"] / (state["square"].sqrt() + group["eps"]) + group["weight_decay"] * parameter
        length, reach = parameter.norm().clamp(max=self.LONGEST), step.norm()
        trust = torch.where((length > 0) & (reach > 0), length / reach, 1.0)
        parameter.sub_(step * (group["lr"] * trust))


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
