"""Diffusion models: times to train at, the loss of denoising, samplers, weight averages, and how near drawings come.

The noise process itself (adding noise, what outputs mean, guidance) is in `systems/noise.py`. Shape letters: B pictures,
C, H, W as in `systems/diffusion.py`, N noise levels, M and K features' rows, D their width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from temper.core.errors import ConfigError, DataError, nearest
from temper.ops.objectives import SumCount
from temper.systems.diffusion import Condition, Diffusion
from temper.systems.noise import add_noise, item_generators, level, v_from

__all__ = [
    "SAMPLERS",
    "Calls",
    "DenoiseObjective",
    "averaged",
    "counting",
    "frechet_distance",
    "noise_loss",
    "rbf_mmd",
    "sample_times",
    "snr",
    "with_sampler",
]

SAMPLERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
}
"""Short names of diffusers' samplers."""


def with_sampler(system: Diffusion, name: str) -> Diffusion:
    """The system drawing by another sampler on the same noise levels; raises ConfigError for an unknown one."""
    if name not in SAMPLERS:
        raise ConfigError(f"There is no sampler {name!r}", cure=nearest(name, SAMPLERS))
    import diffusers

    return system.with_(scheduler=getattr(diffusers, SAMPLERS[name]).from_config(system.scheduler.config))


def snr(alpha_bar_N: Tensor) -> Tensor:
    """Signal over noise power at each level, alpha_bar / (1 - alpha_bar)."""
    return alpha_bar_N / (1 - alpha_bar_N)


def sample_times(num: int, low: int, high: int, generator: torch.Generator) -> Tensor:
    """`num` timesteps, uniform over low .. high - 1."""
    return torch.randint(low, high, (num,), generator=generator)


def noise_loss(predicted_B: Tensor, target_B: Tensor) -> SumCount:
    """Squared error summed over a picture's numbers, in float32, and the number of pictures."""
    return SumCount((predicted_B.float() - target_B.float()).square().sum(), len(target_B))


@dataclass(frozen=True)
class DenoiseObjective:
    """Predict what was added to pictures, at uniform times. Items are (row, draw): a picture and a seed for its noise.

    Noise, time and whether the condition is dropped depend on the item alone, so batches may be split anyhow.
    """

    system: Diffusion
    x0_NCHW: Tensor
    """Pictures in the model's own space."""
    condition: Condition
    """One of each picture."""
    null_share: float = 0.0
    """How often the condition is replaced by none, for guidance."""
    weights: Mapping[str, float] = field(default_factory=lambda: {"noise": 1.0})

    def counts(self, items: Sequence[tuple[int, int]]) -> dict[str, float]:
        """Pictures."""
        return {"noise": float(len(items))}

    def __call__(self, model: nn.Module, items: Sequence[tuple[int, int]]) -> dict[str, SumCount]:
        """The squared error of the model's own prediction type."""
        system = self.system.with_(model=model)
        rows_B = torch.tensor([row for row, _ in items], device=self.x0_NCHW.device)
        table = system.alpha_bar_N
        noise, times, drops = zip(*(self._drawn(row, draw, len(table)) for row, draw in items), strict=True)
        x0_BCHW, noise_BCHW = self.x0_NCHW[rows_B], torch.stack(noise).to(self.x0_NCHW)
        t_B = torch.tensor(times, device=x0_BCHW.device)
        ab_B = level(table, t_B, x0_BCHW)
        output_BCHW = system.predict(
            add_noise(x0_BCHW, noise_BCHW, ab_B), t_B, self._condition(rows_B, drops)
        )
        targets = {"epsilon": noise_BCHW, "sample": x0_BCHW}
        prediction = system.scheduler.config.prediction_type
        target_BCHW = (
            v_from(x0_BCHW, noise_BCHW, ab_B) if prediction == "v_prediction" else targets[prediction]
        )
        return {"noise": noise_loss(output_BCHW, target_BCHW)}

    def _drawn(self, row: int, draw: int, num_levels: int) -> tuple[Tensor, int, bool]:
        (generator,) = item_generators(draw, 1, row)
        noise_CHW = torch.randn(self.x0_NCHW.shape[1:], generator=generator)
        t = int(sample_times(1, 0, num_levels, generator))
        return noise_CHW, t, bool(torch.rand(1, generator=generator) < self.null_share)

    def _condition(self, rows_B: Tensor, drops: Sequence[bool]) -> Condition:
        picked = self.condition.take(rows_B)
        if not any(drops):
            return picked
        null, dropped_B = self.system.nothing(len(rows_B)), torch.tensor(drops, device=rows_B.device)
        dropped_B = dropped_B.reshape(-1, *[1] * (picked.values.ndim - 1))
        return picked.like(torch.where(dropped_B, null.values, picked.values))


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """A running average of the model's weights, by torch: call its `update_parameters(model)` after every step.

    The first update copies; later ones keep `decay` of the average.
    """
    if not 0 <= decay < 1:
        raise ConfigError(f"A decay of {decay:g}", cure="It must be at least 0 and below 1.")
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))


@dataclass
class Calls:
    """A count that grows while `counting` is open."""

    rows: int = 0
    """Pictures that went through the model."""


@contextmanager
def counting(model: nn.Module) -> Iterator[Calls]:
    """Count the pictures that go through a model: a picture drawn in 20 steps with guidance counts 40."""
    calls = Calls()

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        calls.rows += len(inputs[0])

    handle = model.register_forward_hook(count)
    try:
        yield calls
    finally:
        handle.remove()


def frechet_distance(features_MD: Tensor, other_KD: Tensor) -> float:
    """Frechet distance of two Gaussians fitted to features: |mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2)), float64.

    The trace of the root is the sum of the roots of the eigenvalues of S^(1/2) S' S^(1/2), which cannot be negative but
    for rounding. Covariances divide by rows - 1; few rows bias it upwards. Raises DataError for fewer than two rows.
    """
    for features in (features_MD, other_KD):
        if len(features) < 2:
            raise DataError(f"{len(features)} rows have no covariance", cure="Give at least two.")
    x, y = (features.detach().cpu().double().numpy() for features in (features_MD, other_KD))
    s_x, s_y = np.atleast_2d(np.cov(x, rowvar=False)), np.atleast_2d(np.cov(y, rowvar=False))
    values, vectors = np.linalg.eigh(s_x)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ s_y @ root).clip(min=0)).sum()
    return float(max(0.0, ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s_x) + np.trace(s_y) - 2 * cross))


def rbf_mmd(features_MD: Tensor, other_KD: Tensor, scale: float | None = None) -> float:
    """Squared maximum mean discrepancy, unbiased, under exp(-|x - y|^2 / (2 scale^2)); it may be a little below 0.

    Without a scale it is the median distance between different rows of both sets, taken together.
    """
    x, y = features_MD.detach().double(), other_KD.detach().double()
    if min(len(x), len(y)) < 2:
        raise DataError(f"{min(len(x), len(y))} rows have no discrepancy", cure="Give at least two.")
    both = torch.cat([x, y])
    if scale is None:
        scale = float(torch.pdist(both).median()) or 1.0
    kernel = torch.exp(-torch.cdist(both, both).square() / (2 * scale * scale))
    m, k = len(x), len(y)
    within_x = (kernel[:m, :m].sum() - m) / (m * (m - 1))
    within_y = (kernel[m:, m:].sum() - k) / (k * (k - 1))
    value = float(within_x + within_y - 2 * kernel[:m, m:].mean())
    return value if math.isfinite(value) else math.nan
