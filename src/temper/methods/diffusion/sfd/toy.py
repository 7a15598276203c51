"""Eight Gaussians on a circle: a conditional diffusion model small enough to train on the spot, and its measurement.

Points lie in the plane; their x_0 space is the plane itself, so there is nothing between the maths and the numbers.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import time
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from temper.core.errors import ConfigError
from temper.core.types import Row, Run
from temper.methods.diffusion.sfd.card import ONE_STEP, Config
from temper.methods.diffusion.sfd.distil import Log, Problem, init_level, train
from temper.methods.diffusion.sfd.losses import one_step, other_labels, pseudo_labels
from temper.methods.diffusion.sfd.quality import Wanted, rate_rows
from temper.ops.diffusion import counting, frechet_distance, noise_loss, rbf_mmd, sample_times
from temper.systems.diffusion import Condition
from temper.systems.noise import add_noise, alpha_bar, denoise, guided, item_generators, level

__all__ = [
    "NUM_CLASSES",
    "Points",
    "centres",
    "draw",
    "eps_of",
    "measure",
    "problem_of",
    "real",
    "schedule",
    "scores",
    "teach",
]

NUM_CLASSES, RADIUS, SPREAD = 8, 2.0, 0.2
NUM_LEVELS, WIDTH, FREQUENCIES = 200, 128, 16
NULL = NUM_CLASSES
NULL_SHARE = 0.1
TEACH_LR, TEACH_ROWS = 2e-3, 256


class Points(nn.Module):
    """eps of points in the plane: three hidden layers over the point, its time and its class (the last row: none)."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Embedding(NUM_CLASSES + 1, 2 * FREQUENCIES)
        sizes = [2 + 4 * FREQUENCIES, WIDTH, WIDTH, WIDTH]
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        self.hidden = nn.ModuleList(layers)
        self.out = nn.Linear(WIDTH, 2)

    def forward(self, x_B2: Tensor, t_B: Tensor, class_B: Tensor) -> Tensor:
        """eps, (B, 2)."""
        rates = torch.exp(torch.linspace(0, math.log(NUM_LEVELS), FREQUENCIES))
        angle_BF = t_B[:, None] / NUM_LEVELS * rates
        hidden_BD = torch.cat([x_B2, angle_BF.sin(), angle_BF.cos(), self.classes(class_B)], 1)
        for layer in self.hidden:
            hidden_BD = F.silu(layer(hidden_BD))
        return self.out(hidden_BD)


def schedule() -> Any:
    """The linear schedule of 1000 levels in 200: betas five times as large."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=NUM_LEVELS,
        beta_start=5e-4,
        beta_end=0.1,
        clip_sample=False,
        timestep_spacing="trailing",
    )


def centres() -> Tensor:
    """The middle of each class, (8, 2)."""
    angle_C = torch.arange(NUM_CLASSES) * (2 * math.pi / NUM_CLASSES)
    return RADIUS * torch.stack([angle_C.cos(), angle_C.sin()], 1)


def real(class_B: Tensor, rng: torch.Generator) -> Tensor:
    """True points of classes."""
    return centres()[class_B] + SPREAD * torch.randn(len(class_B), 2, generator=rng)


def scores(x_B2: Tensor) -> Tensor:
    """Log-likelihood of points under each class but for a constant: a detector that is right and was not trained."""
    return -torch.cdist(x_B2, centres()).square() / (2 * SPREAD**2)


def eps_of(model: nn.Module, x_B2: Tensor, t_B: Tensor, condition: Condition, guidance: float) -> Tensor:
    """Eps with guidance, as `Diffusion.eps`."""
    t_B = t_B.expand(len(x_B2))
    eps_B2 = model(x_B2, t_B, condition.values)
    if guidance == 1.0:
        return eps_B2
    return guided(eps_B2, model(x_B2, t_B, torch.full_like(condition.values, NULL)), guidance)


def teach(num_steps: int, seed: int) -> Points:
    """A teacher trained on true points, one in ten without its class; arms of one seed share it."""
    return copy.deepcopy(_taught(num_steps, seed))


@lru_cache(maxsize=1)
def _taught(num_steps: int, seed: int) -> Points:
    rng, table = torch.Generator().manual_seed(seed), alpha_bar(schedule())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Points()
    optimizer = torch.optim.Adam(model.parameters(), lr=TEACH_LR)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(num_steps):
        class_B = torch.randint(0, NUM_CLASSES, (TEACH_ROWS,), generator=rng)
        x0_B2, t_B = real(class_B, rng), sample_times(TEACH_ROWS, 0, NUM_LEVELS, rng)
        noise_B2 = torch.randn(TEACH_ROWS, 2, generator=rng)
        class_B[torch.rand(TEACH_ROWS, generator=rng) < NULL_SHARE] = NULL
        loss = noise_loss(model(add_noise(x0_B2, noise_B2, level(table, t_B, x0_B2)), t_B, class_B), noise_B2)
        optimizer.zero_grad(set_to_none=True)
        (loss.total / loss.count).backward()
        optimizer.step()
        decay.step()
    return model.eval()


def problem_of(model: Points, config: Config) -> Problem:
    """The toy as the training loops take it; amax and prob ask which centre is nearest."""
    forget, override = _classes(config)

    def labelled(class_B: Tensor) -> Condition:
        return Condition(labels_B=class_B)

    def pair(num: int, rng: torch.Generator) -> tuple[Condition, Condition | None]:
        other = {
            "fixed": lambda: labelled(torch.full((num,), override)),
            "rand": lambda: labelled(other_labels(num, NUM_CLASSES, forget, rng)),
        }.get(config.override_mode)
        return labelled(torch.full((num,), forget)), other() if other else None

    def pseudo(x_B2: Tensor, rng: torch.Generator) -> Condition:
        return labelled(pseudo_labels(scores(x_B2), forget, config.override_mode == "prob", rng))

    return Problem(
        model=model,
        eps=eps_of,
        alpha_bar_N=alpha_bar(schedule()),
        shape=(2,),
        remain=lambda num, rng: labelled(other_labels(num, NUM_CLASSES, forget, rng)),
        everything=lambda num, rng: labelled(torch.randint(0, NUM_CLASSES, (num,), generator=rng)),
        pair=pair,
        pseudo=pseudo,
        sample=lambda net, condition, seed: draw(net, condition, config, seed, is_one_step=False),
        nothing=lambda num: labelled(torch.full((num,), NULL)),
    )


def _classes(config: Config) -> tuple[int, int]:
    """The toy's forgotten class and its override; raises ConfigError for what is no class of it."""
    for name, value in (("forget", config.forget), ("override", config.override)):
        if str(value) not in map(str, range(NUM_CLASSES)):
            raise ConfigError(
                f"The toy has no class {value!r}: its classes are 0 to {NUM_CLASSES - 1}",
                where=name,
                cure="Leave the toy out: --recipe shapes.",
            )
    return int(config.forget), int(config.override)


@torch.no_grad()
def draw(model: nn.Module, condition: Condition, config: Config, seed: int, *, is_one_step: bool) -> Tensor:
    """Points under conditions: in one call, or by DDIM."""
    generators = item_generators(seed, len(condition))
    noise_B2 = torch.stack([torch.randn(2, generator=each) for each in generators])
    if is_one_step:
        t_B = torch.full((len(condition),), init_level(config, NUM_LEVELS))
        ab = level(alpha_bar(schedule()), t_B, noise_B2)
        return one_step(lambda x_B2: eps_of(model, x_B2, t_B, condition, 1.0), noise_B2, ab)
    return denoise(
        schedule(),
        lambda x_B2, t: eps_of(model, x_B2, t, condition, config.guidance),
        noise_B2,
        config.sample_steps,
        generators,
    )


def measure(config: Config, run: Run) -> tuple[list[Row], dict[str, Any]]:
    """Train teacher and objective, draw from every class, and see what was drawn; rows, and figures for the report."""
    teacher = teach(config.toy_steps, run.seed)
    began = time.perf_counter()
    log = Log() if config.objective == "untouched" else train(problem_of(teacher, config), config, run)
    fit_s = time.perf_counter() - began
    class_N = torch.arange(NUM_CLASSES).repeat_interleave(config.num_samples)
    began = time.perf_counter()
    with counting(teacher) as calls:
        is_one_step = config.objective in ONE_STEP
        x_N2 = draw(teacher, Condition(labels_B=class_N), config, run.seed + 1, is_one_step=is_one_step)
    sample_s = (time.perf_counter() - began) / len(class_N)
    rows = list(_rows(x_N2, class_N, config, run.seed))
    rows += [
        Row(
            metric="calls_per_sample", value=calls.rows / len(class_N), n=len(class_N), higher_is_better=False
        ),
        Row(metric="sample_s", value=sample_s, n=len(class_N), higher_is_better=False),
        Row(metric="fit_s", value=fit_s, higher_is_better=False),
    ]
    return [dataclasses.replace(row, metric=f"toy_{row.metric}", split="toy") for row in rows], log.figures(
        "Toy: losses"
    )


def _rows(x_N2: Tensor, class_N: Tensor, config: Config, seed: int) -> Iterator[Row]:
    names = tuple(map(str, range(NUM_CLASSES)))
    forget, override = _classes(config)
    shown = override if config.override_mode == "fixed" else None
    wanted = Wanted(tuple(class_N.tolist()), class_N, names, forget, shown)
    yield from rate_rows(scores(x_N2), wanted)
    kept_N = ~wanted.forgotten_N
    num = int(kept_N.sum())
    distance = float((x_N2 - centres()[class_N]).norm(dim=1)[kept_N].mean())
    yield Row(metric="retain_distance", value=distance, n=num, higher_is_better=False)
    true_N2 = real(class_N[kept_N], torch.Generator().manual_seed(seed + 2))
    frechet = _by_class(x_N2, true_N2, class_N, kept_N)
    yield Row(metric="frechet", value=frechet, n=num, higher_is_better=False)
    yield Row(metric="mmd", value=rbf_mmd(x_N2[kept_N], true_N2), n=num, higher_is_better=False)


def _by_class(x_N2: Tensor, true_K2: Tensor, class_N: Tensor, kept_N: Tensor) -> float:
    """Mean over the kept classes of the Frechet distance to true points of the class: one Gaussian fits a class, not all."""
    class_K = class_N[kept_N]
    found = [frechet_distance(x_N2[class_N == c], true_K2[class_K == c]) for c in class_K.unique()]
    return sum(found) / len(found)
