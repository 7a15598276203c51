"""The paper's losses as pure functions: a one-step generator, its fake score, and the score-distillation loss.

B pictures of any shape behind B; `ab` is alpha-bar at a timestep, see `systems/noise.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from temper.ops.objectives import SumCount
from temper.systems.noise import x0_from_eps

__all__ = ["OMEGA_FLOOR", "esd_target", "one_step", "other_labels", "pseudo_labels", "sid_loss"]

OMEGA_FLOOR = 1e-5
"""Smallest divisor of a picture's loss."""


def one_step(eps: Callable[[Tensor], Tensor], noise_B: Tensor, ab_init: Tensor) -> Tensor:
    """x_g = (x_init - sqrt(1 - ab) eps(x_init)) / sqrt(ab) with x_init = sqrt(1 - ab) z: one call of the network."""
    x_init_B = (1 - ab_init).sqrt() * noise_B
    return x0_from_eps(x_init_B, eps(x_init_B), ab_init)


def sid_loss(teacher_x0_B: Tensor, fake_x0_B: Tensor, drawn_B: Tensor, alpha: float) -> SumCount:
    """Sum over pictures and their numbers of (p - s) ((p - x) - alpha (p - s)) / omega, in float32.

    p and s are the x_0 that teacher and fake score see in the noised x; omega = mean |p - x| of a picture, without
    gradient and at least 1e-5. alpha = 1 gives (p - s)(s - x) / omega.
    """
    p_B, s_B, x_B = teacher_x0_B.float(), fake_x0_B.float(), drawn_B.float()
    omega_B = (p_B - x_B).detach().abs().flatten(1).mean(1).clamp(min=OMEGA_FLOOR)
    gap_B = p_B - s_B
    sums_B = (gap_B * ((p_B - x_B) - alpha * gap_B)).flatten(1).sum(1)
    return SumCount((sums_B / omega_B).sum(), len(x_B))


def other_labels(num: int, num_labels: int, forget: int, generator: torch.Generator) -> Tensor:
    """`num` labels, uniform over all but `forget`."""
    drawn_B = torch.randint(0, num_labels - 1, (num,), generator=generator)
    return drawn_B + (drawn_B >= forget).long()


def pseudo_labels(logits_BC: Tensor, forget: int, is_drawn: bool, generator: torch.Generator) -> Tensor:
    """A classifier's label with the forgotten one shut out: the likeliest, or one drawn from what remains."""
    open_BC = logits_BC.detach().clone()
    open_BC[:, forget] = -torch.inf
    if not is_drawn:
        return open_BC.argmax(-1)
    probs_BC = open_BC.float().softmax(-1).cpu()
    return torch.multinomial(probs_BC, 1, generator=generator)[:, 0].to(logits_BC.device)


def esd_target(conditional_B: Tensor, unconditional_B: Tensor, eta: float) -> Tensor:
    """ESD's target for the forgotten condition: the unconditional eps, pushed on away from the conditional one."""
    return unconditional_B - eta * (conditional_B - unconditional_B)
