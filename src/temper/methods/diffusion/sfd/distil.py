"""Training: score forgetting distillation, and the fine-tuning that it is compared with; for systems and the toy alike."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from temper.core.errors import NumericsError
from temper.core.types import Run
from temper.methods.diffusion.sfd.card import Config
from temper.methods.diffusion.sfd.losses import esd_target, one_step, sid_loss
from temper.ops.diffusion import averaged, noise_loss, sample_times
from temper.ops.objectives import SumCount
from temper.systems.diffusion import Condition
from temper.systems.noise import add_noise, level, x0_from_eps

__all__ = ["Log", "Problem", "distil", "fine_tune", "init_level", "train"]

WARMUP_MARGIN = 0.02
"""Share of the noise levels that the wider range of the warm-up leaves out at either end."""

Draw = Callable[[int, torch.Generator], Condition]
Look = Callable[[dict[str, Tensor]], None]


@dataclass(frozen=True)
class Problem:
    """A teacher that becomes the generator, and the conditions to draw, to forget and to put in their place."""

    model: nn.Module
    """Trained in place."""
    eps: Callable[[nn.Module, Tensor, Tensor, Condition, float], Tensor]
    """(model, x_t, t, condition, guidance) -> eps."""
    alpha_bar_N: Tensor
    shape: tuple[int, ...]
    """Of one picture in the model's own space."""
    remain: Draw
    everything: Draw
    """As `remain` and what is to be forgotten: for the first of two stages."""
    pair: Callable[[int, torch.Generator], tuple[Condition, Condition | None]]
    """The forgotten condition, and what overrides it; None where that depends on the picture."""
    pseudo: Callable[[Tensor, torch.Generator], Condition] | None
    """The override of pictures (x_0 as the fake score sees it) by a classifier."""
    sample: Callable[[nn.Module, Condition, int], Tensor]
    """(model, condition, seed) -> x_0 by the usual sampler; for the baselines."""
    nothing: Callable[[int], Condition]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def noise(self, num: int, generator: torch.Generator) -> Tensor:
        """Unit noise of `num` pictures."""
        return torch.randn(num, *self.shape, generator=generator).to(self.device)

    def level(self, t_B: Tensor, like_B: Tensor) -> Tensor:
        """alpha-bar at timesteps, shaped to multiply pictures."""
        return level(self.alpha_bar_N, t_B, like_B)


@dataclass
class Log:
    """Losses of every `every`-th step and the last: a term's sum over a picture's numbers, mean over pictures."""

    every: int = 50
    lines: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Term -> {"x": steps, "y": values}."""
    last: dict[str, float] = field(default_factory=dict)
    """Term -> the last value that was looked at."""
    pending: list[tuple[int, str, Tensor]] = field(default_factory=list)
    """(step, term, value) of what was not looked at yet, still on the device."""

    def add(self, step: int, terms: dict[str, Tensor], num_steps: int) -> None:
        """Take the terms of an update before it is made, and keep them if the step is one of those kept.

        Raises NumericsError at the first that is not finite: on a CPU in its own step, elsewhere at the next one kept.
        """
        is_kept = step % self.every == 0 or step + 1 == num_steps
        self.pending += [(step, name, value.detach().float()) for name, value in terms.items()]
        if is_kept or all(value.device.type == "cpu" for value in terms.values()):
            self._fetch()
        for name in terms if is_kept else ():
            line = self.lines.setdefault(name, {"x": [], "y": []})
            line["x"].append(step)
            line["y"].append(self.last[name])

    def _fetch(self) -> None:
        numbers = torch.stack([value for *_, value in self.pending]).tolist()
        for (step, name, _), number in zip(self.pending, numbers, strict=True):
            if not math.isfinite(number):
                last = self.last.get(name, "none")
                raise NumericsError(
                    f"The loss {name!r} is {number}; its last finite value was {last}",
                    where=f"step {step}",
                    cure="Lower lr and fake_lr, or train in float32.",
                )
            self.last[name] = number
        self.pending.clear()

    def figures(self, title: str) -> dict[str, Any]:
        """The losses as curves for the report."""
        curve = {"x": "step", "y": "loss", "lines": self.lines}
        return {"curves": {title: curve}} if self.lines else {}


def train(problem: Problem, config: Config, run: Run) -> Log:
    """Train `problem.model` in place by the objective of the config."""
    if config.objective in ("sfd", "sid"):
        return distil(problem, config, run)
    return fine_tune(problem, config, run)


def init_level(config: Config, num_levels: int) -> int:
    """The timestep at which the generator is asked."""
    return min(num_levels - 1, round(config.t_init * num_levels))


def _pass(terms: dict[str, Tensor]) -> None:
    pass


class _Distiller:
    """Teacher, fake score and generator with their optimisers."""

    def __init__(self, problem: Problem, config: Config, seed: int) -> None:
        self.problem, self.config = problem, config
        self.generator = problem.model.train()
        self.teacher = copy.deepcopy(problem.model).eval().requires_grad_(False)
        self.fake = copy.deepcopy(problem.model).train().requires_grad_(True)
        self.rng = torch.Generator().manual_seed(seed)
        num_levels = len(problem.alpha_bar_N)
        self.t_init = init_level(config, num_levels)
        self.range = (round(config.t_min * num_levels), max(1, round(config.t_max * num_levels)))
        edge = round(WARMUP_MARGIN * num_levels)
        self.wide = (edge, num_levels - edge)
        self.optimizers = (self._adam(self.fake, config.fake_lr), self._adam(self.generator, config.lr))

    def _adam(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(
            [p for p in model.parameters() if p.requires_grad], lr=lr, betas=self.config.betas
        )

    def draw(self, condition: Condition) -> Tensor:
        """Pictures by the generator as it stands, in one call and without guidance."""
        problem = self.problem
        t_B = torch.full((len(condition),), self.t_init, device=problem.device)
        noise_B = problem.noise(len(condition), self.rng)
        ab = problem.level(t_B, noise_B)
        return one_step(lambda x_B: problem.eps(self.generator, x_B, t_B, condition, 1.0), noise_B, ab)

    def noised(self, x_B: Tensor, is_wide: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x_t, t, alpha-bar and the noise that was added."""
        problem, (low, high) = self.problem, self.wide if is_wide else self.range
        t_B = sample_times(len(x_B), low, max(high, low + 1), self.rng).to(problem.device)
        noise_B, ab_B = problem.noise(len(x_B), self.rng), problem.level(t_B, x_B)
        return add_noise(x_B, noise_B, ab_B), t_B, ab_B, noise_B

    def fake_term(self, condition: Condition, is_wide: bool) -> Tensor:
        """The fake score learns what the generator draws under a condition."""
        with torch.no_grad():
            drawn_B = self.draw(condition)
        x_t_B, t_B, _, noise_B = self.noised(drawn_B, is_wide)
        guess_B = self.problem.eps(self.fake, x_t_B, t_B, condition, self.config.guidance_fake_train)
        return _mean(noise_loss(guess_B, noise_B))

    def generator_term(self, drawn_for: Condition, override: Condition | None, is_wide: bool) -> Tensor:
        """What is drawn under one condition moves to where the teacher sees `override` (None: the classifier says)."""
        config, problem = self.config, self.problem
        drawn_B = self.draw(drawn_for)
        x_t_B, t_B, ab_B, _ = self.noised(drawn_B, is_wide)
        with torch.set_grad_enabled(not config.diff_instruct):
            seen_B = problem.eps(self.fake, x_t_B, t_B, drawn_for, config.guidance_fake_eval)
            fake_B = x0_from_eps(x_t_B, seen_B, ab_B)
            if override is None:
                assert problem.pseudo is not None
                override = problem.pseudo(fake_B.detach(), self.rng)
            seen_B = problem.eps(self.teacher, x_t_B, t_B, override, config.guidance_teacher)
            teacher_B = x0_from_eps(x_t_B, seen_B, ab_B)
        return _mean(sid_loss(teacher_B, fake_B, drawn_B, 1.0 if config.diff_instruct else config.alpha))

    def step(self, forgets: bool, is_wide: bool, look: Look = _pass) -> dict[str, Tensor]:
        """One step of the fake score, then one of the generator; `look` gets the terms of each before it is made."""
        config, num = self.config, self.config.batch_rows
        drawn = (self.problem.remain if forgets else self.problem.everything)(num, self.rng)
        pair = self.problem.pair(num, self.rng) if forgets else None
        fake = {"fake": self.fake_term(drawn, False)}
        loss = config.fake_remain_weight * fake["fake"]
        if pair is not None and config.fake_forget_weight:
            fake["fake forget"] = self.fake_term(pair[0], is_wide)
            loss = loss + config.fake_forget_weight * fake["fake forget"]
        look(fake)
        self._update(self.optimizers[0], self.fake, loss)
        self.fake.eval().requires_grad_(False)
        generator = {"generator": self.generator_term(drawn, drawn, False)}
        loss = config.remain_weight * generator["generator"]
        if pair is not None and config.forget_weight:
            generator["generator forget"] = self.generator_term(*pair, is_wide)
            loss = loss + config.forget_weight * generator["generator forget"]
        look(generator)
        self._update(self.optimizers[1], self.generator, loss)
        self.fake.train().requires_grad_(True)
        return fake | generator

    def _update(self, optimizer: torch.optim.Optimizer, model: nn.Module, loss: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.config.clip_value:
            nn.utils.clip_grad_value_(model.parameters(), self.config.clip_value)
        optimizer.step()


def distil(problem: Problem, config: Config, run: Run) -> Log:
    """Make the model a one-step generator in place; `sid` forgets nothing, `sfd` does after `distil_steps`.

    Raises NumericsError at a loss that is not finite.
    """
    both, log = _Distiller(problem, config, run.seed), Log()
    total = config.distil_steps + config.num_steps
    average = averaged(problem.model, config.ema) if config.ema else None
    warm = config.distil_steps + config.forget_warmup * config.num_steps
    for step in run.ticker(range(total), total=total, label="distil"):
        forgets = config.objective == "sfd" and step >= config.distil_steps
        both.step(forgets, step < warm, look=partial(log.add, step, num_steps=total))
        if average is not None:
            average.update_parameters(problem.model)
    if average is not None:
        _copy(average.module, problem.model)
    problem.model.eval()
    return log


def fine_tune(problem: Problem, config: Config, run: Run) -> Log:
    """The baselines, which keep the sampler: eps learns the override's pictures under the forgotten condition, or ESD."""
    rng, log = torch.Generator().manual_seed(run.seed), Log()
    teacher = copy.deepcopy(problem.model).eval().requires_grad_(False)
    bank = _Bank(problem, teacher, config, rng)
    optimizer = torch.optim.Adam([p for p in problem.model.parameters() if p.requires_grad], lr=config.lr)
    problem.model.train()
    for step in run.ticker(range(config.num_steps), total=config.num_steps, label=config.objective):
        terms = bank.relabel(rng) if config.objective == "relabel" else bank.esd(rng)
        log.add(step, terms, config.num_steps)
        loss = torch.stack([bank.weights[name] * value for name, value in terms.items()]).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(problem.model.parameters(), 1.0)
        optimizer.step()
    problem.model.eval()
    return log


class _Bank:
    """Pictures that the teacher drew once, to train on without data."""

    def __init__(self, problem: Problem, teacher: nn.Module, config: Config, rng: torch.Generator) -> None:
        self.problem, self.teacher, self.config = problem, teacher, config
        self.weights = {"remain": config.remain_weight, "forget": config.forget_weight, "erase": 1.0}
        self.remain = problem.remain(config.bank_rows, rng)
        self.forget, override = problem.pair(config.bank_rows, rng)
        shown = self.forget
        if config.objective == "relabel":
            assert override is not None
            shown = override
        seeds = torch.randint(2**31, (2,), generator=rng).tolist()
        self.remain_x0 = problem.sample(teacher, self.remain, seeds[0])
        self.forget_x0 = problem.sample(teacher, shown, seeds[1])

    def relabel(self, rng: torch.Generator) -> dict[str, Tensor]:
        """Plain denoising: the override's pictures under the forgotten condition, others under their own."""
        return {
            "remain": self._denoise(self.remain_x0, self.remain, rng),
            "forget": self._denoise(self.forget_x0, self.forget, rng),
        }

    def esd(self, rng: torch.Generator) -> dict[str, Tensor]:
        """Under the forgotten condition eps goes where the unconditional one is, and beyond."""
        problem, (x_t_B, t_B, _, condition) = self.problem, self._noised(self.forget_x0, self.forget, rng)
        with torch.no_grad():
            with_B = problem.eps(self.teacher, x_t_B, t_B, condition, 1.0)
            without_B = problem.eps(self.teacher, x_t_B, t_B, problem.nothing(len(t_B)), 1.0)
        guess_B = problem.eps(problem.model, x_t_B, t_B, condition, 1.0)
        return {"erase": _mean(noise_loss(guess_B, esd_target(with_B, without_B, self.config.esd_eta)))}

    def _denoise(self, x0_B: Tensor, conditions: Condition, rng: torch.Generator) -> Tensor:
        x_t_B, t_B, noise_B, condition = self._noised(x0_B, conditions, rng)
        return _mean(noise_loss(self.problem.eps(self.problem.model, x_t_B, t_B, condition, 1.0), noise_B))

    def _noised(self, x0_N: Tensor, conditions: Condition, rng: torch.Generator) -> tuple[Any, ...]:
        problem = self.problem
        rows_B = torch.randint(0, len(x0_N), (self.config.batch_rows,), generator=rng).to(problem.device)
        t_B = sample_times(len(rows_B), 0, len(problem.alpha_bar_N), rng).to(problem.device)
        noise_B = problem.noise(len(rows_B), rng)
        x_t_B = add_noise(x0_N[rows_B], noise_B, problem.level(t_B, noise_B))
        return x_t_B, t_B, noise_B, conditions.take(rows_B)


def _mean(loss: SumCount) -> Tensor:
    return loss.total / loss.count


@torch.no_grad()
def _copy(source: nn.Module, target: nn.Module) -> None:
    pairs: Iterable[tuple[Tensor, Tensor]] = zip(source.parameters(), target.parameters(), strict=True)
    for old, new in pairs:
        new.copy_(old)
