"""How a diffusion model's inputs are noised, what its outputs mean, and the loop that takes noise away again.

Shape letters: N noise levels of the schedule (timesteps 0..N-1). alpha_bar_N is the share of signal power that is left:
x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps. Tensors of pictures may have any shape that begins with B.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from temper.core.errors import ConfigError, ModelError

__all__ = [
    "PREDICTIONS",
    "add_noise",
    "alpha_bar",
    "denoise",
    "eps_from_v",
    "eps_from_x0",
    "guided",
    "item_generators",
    "level",
    "to_eps",
    "v_from",
    "x0_from_eps",
]

PREDICTIONS = ("epsilon", "sample", "v_prediction")
"""What a model's output can be, in diffusers' words: eps, x_0, or v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0."""

Predict = Callable[[Tensor, Tensor], Tensor]
"""A model's raw output from x_t and one timestep."""


def alpha_bar(scheduler: Any) -> Tensor:
    """The schedule's alpha_bar_N in float64, decreasing; raises ModelError for a scheduler without one."""
    table = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(table, Tensor):
        raise ModelError(
            f"{type(scheduler).__name__} has no table of noise levels",
            where="alphas_cumprod",
            cure="Use a DDPM-like scheduler: DDPM, DDIM, DPM-Solver, Euler; flow matching is another process.",
        )
    return table.double()


def level(alpha_bar_N: Tensor, t_B: Tensor, like_B: Tensor) -> Tensor:
    """alpha_bar at each timestep, in the dtype of `like_B` and shaped to multiply it."""
    picked_B = alpha_bar_N.to(like_B.device)[t_B]
    return picked_B.to(like_B.dtype).reshape(-1, *[1] * (like_B.ndim - 1))


def add_noise(x0_B: Tensor, eps_B: Tensor, ab_B: Tensor) -> Tensor:
    """x_t = sqrt(ab) x_0 + sqrt(1 - ab) eps; `ab_B` comes from `level`."""
    return ab_B.sqrt() * x0_B + (1 - ab_B).sqrt() * eps_B


def x0_from_eps(x_t_B: Tensor, eps_B: Tensor, ab_B: Tensor) -> Tensor:
    """x_0 = (x_t - sqrt(1 - ab) eps) / sqrt(ab)."""
    return (x_t_B - (1 - ab_B).sqrt() * eps_B) / ab_B.sqrt()


def eps_from_x0(x_t_B: Tensor, x0_B: Tensor, ab_B: Tensor) -> Tensor:
    """Eps = (x_t - sqrt(ab) x_0) / sqrt(1 - ab)."""
    return (x_t_B - ab_B.sqrt() * x0_B) / (1 - ab_B).sqrt()


def v_from(x0_B: Tensor, eps_B: Tensor, ab_B: Tensor) -> Tensor:
    """V = sqrt(ab) eps - sqrt(1 - ab) x_0."""
    return ab_B.sqrt() * eps_B - (1 - ab_B).sqrt() * x0_B


def eps_from_v(x_t_B: Tensor, v_B: Tensor, ab_B: Tensor) -> Tensor:
    """Eps = sqrt(ab) v + sqrt(1 - ab) x_t."""
    return ab_B.sqrt() * v_B + (1 - ab_B).sqrt() * x_t_B


def to_eps(output_B: Tensor, x_t_B: Tensor, ab_B: Tensor, prediction: str) -> Tensor:
    """A model's output of one of `PREDICTIONS` as eps."""
    if prediction == "sample":
        return eps_from_x0(x_t_B, output_B, ab_B)
    return eps_from_v(x_t_B, output_B, ab_B) if prediction == "v_prediction" else output_B


def guided(conditional_B: Tensor, unconditional_B: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, u + scale (c - u): 1 is the conditional model, 0 the unconditional one."""
    return unconditional_B + scale * (conditional_B - unconditional_B)


def item_generators(seed: int, num: int, first: int = 0) -> list[torch.Generator]:
    """One generator an item, from the seed and the item's place: however items are batched, each gets its own noise."""
    out = []
    for place in range(first, first + num):
        digest = hashlib.sha256(f"{seed}/{place}".encode()).digest()
        out.append(torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")))
    return out


def denoise(
    scheduler: Any, predict: Predict, noise_B: Tensor, num_steps: int, generators: Sequence[torch.Generator]
) -> Tensor:
    """From unit noise to x_0 by the scheduler's own steps, on a copy: schedulers remember where they are.

    Raises ConfigError for more steps than the schedule has levels.
    """
    num_levels = int(scheduler.config.num_train_timesteps)
    if not 1 <= num_steps <= num_levels:
        raise ConfigError(
            f"{num_steps} sampling steps",
            where=f"a schedule of {num_levels} levels",
            cure="Take 1 to that many.",
        )
    stepper = copy.deepcopy(scheduler)
    stepper.set_timesteps(num_steps)
    extra = (
        {"generator": list(generators)} if "generator" in inspect.signature(stepper.step).parameters else {}
    )
    x_B = noise_B * stepper.init_noise_sigma
    for t in stepper.timesteps:
        output_B = predict(stepper.scale_model_input(x_B, t), t)
        x_B = stepper.step(output_B, t, x_B, **extra).prev_sample
    return x_B
