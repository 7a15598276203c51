"""Attacks within a ball: projected gradient ascent, L-infinity or L2, with restarts.

Every item is attacked on its own: its random starts come from a generator of its own and its steps from the gradient of
its own score, so who shares its batch changes nothing (as long as the model treats items alone, as in eval mode).
Tensors without shape letters have any shape that begins with B.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from temper.core.errors import ConfigError, DataError, NumericsError

__all__ = ["Attacked", "Norm", "Objective", "Score", "pgd", "project", "untargeted"]

Norm = Literal["linf", "l2"]


class Score(NamedTuple):
    """What an attack learns of points: a number to raise, from each item alone, and whether it has reached its aim."""

    score_B: Tensor
    reached_B: Tensor


Objective = Callable[[Tensor, Tensor], Score]
"""The score of points, given them and which items of the batch they belong to, (B,) indices."""


class Attacked(NamedTuple):
    """The best point found for each item: one that reached the aim, or else the one with the highest score."""

    points: Tensor
    score_B: Tensor
    reached_B: Tensor


def untargeted(logits_of: Callable[[Tensor], Tensor], labels_B: Tensor) -> Objective:
    """Raise the best wrong logit over the label's; the aim is any wrong class."""

    def score(points: Tensor, rows_B: Tensor) -> Score:
        logits_BC, own_B1 = logits_of(points), labels_B[rows_B, None]
        others_BC = logits_BC.scatter(1, own_B1, float("-inf"))
        margin_B = others_BC.amax(dim=1) - logits_BC.gather(1, own_B1).squeeze(1)
        return Score(margin_B, margin_B > 0)

    return score


def project(points: Tensor, centres: Tensor, eps: float, norm: Norm, limits: tuple[float, float]) -> Tensor:
    """The points moved into the ball around `centres` and then into the limits, where the centres must lie.

    Clipping to the limits only brings a point closer to its centre, so the ball is not left again.
    """
    offsets = points - centres
    if norm == "linf":
        offsets = offsets.clamp(-eps, eps)
    else:
        lengths = _lengths(offsets)
        offsets = offsets * (eps / lengths.clamp(min=1e-30)).clamp(max=1)
    return (centres + offsets).clamp(*limits)


def pgd(
    objective: Objective,
    inputs: Tensor,
    eps: float,
    *,
    norm: Norm = "linf",
    num_steps: int = 40,
    step_size: float = 0.0,
    num_restarts: int = 1,
    seeds: Sequence[int] | None = None,
    random_start: bool = True,
    limits: tuple[float, float] = (0.0, 1.0),
) -> Attacked:
    """Steps that raise the score, each projected back; an item that reached its aim stops, here and in later restarts.

    The inputs themselves are tried first. Every restart begins at a random point of the ball, drawn from the item's
    entry of `seeds` (default: its place) and the number of the restart; without `random_start` the first begins at the
    inputs. `step_size` 0 stands for 2.5 eps / num_steps. No gradient is left on the model's parameters.
    Raises DataError for inputs outside the limits, ConfigError for settings that make no attack, NumericsError for a
    score that is not a number.
    """
    _require_valid(inputs, eps, num_steps, num_restarts, limits)
    if seeds is not None and len(seeds) != len(inputs):
        raise ConfigError(f"{len(seeds)} seeds for {len(inputs)} items", where="seeds")
    seeds = range(len(inputs)) if seeds is None else seeds
    size = step_size or 2.5 * eps / num_steps
    inputs = inputs.detach()
    best = _Best(inputs, objective)
    for restart in range(num_restarts if eps > 0 else 0):
        rows_B = best.open_rows()
        centres = inputs[rows_B]
        points = centres
        if restart or random_start:
            noise = _noise(inputs, [(seeds[row], restart) for row in rows_B.tolist()], norm)
            points = project(centres + eps * noise, centres, eps, norm, limits)
        for _ in range(num_steps):
            if not len(rows_B):
                break
            points = points.requires_grad_()
            score_B, reached_B = objective(points, rows_B)
            (grads,) = torch.autograd.grad(score_B.sum(), points)
            best.keep(points, rows_B, Score(score_B, reached_B))
            going_B = ~reached_B
            points, centres, grads = points.detach()[going_B], centres[going_B], grads[going_B]
            rows_B = rows_B[going_B]
            points = project(points + size * _direction(grads, norm), centres, eps, norm, limits)
        best.look(points, rows_B)
    return best.found()


class _Best:
    """The best point of every item so far."""

    def __init__(self, inputs: Tensor, objective: Objective) -> None:
        self.objective = objective
        self.points = inputs.clone()
        rows_B = torch.arange(len(inputs), device=inputs.device)
        self.score_B = torch.full((len(inputs),), float("-inf"), device=inputs.device)
        self.reached_B = torch.zeros(len(inputs), dtype=torch.bool, device=inputs.device)
        self.look(inputs, rows_B)

    def look(self, points: Tensor, rows_B: Tensor) -> None:
        """Score points without gradient and keep the better ones."""
        if len(rows_B):
            with torch.no_grad():
                self.keep(points, rows_B, self.objective(points, rows_B))

    def keep(self, points: Tensor, rows_B: Tensor, score: Score) -> None:
        """Keep the points that reached their aim or have a higher score than those before."""
        score_B = score.score_B.detach().to(self.score_B.dtype)
        if bool(score_B.isnan().any()):
            raise NumericsError(
                "The score of an attack is not a number",
                where=f"item {int(rows_B[score_B.isnan()][0])}",
                cure="Look at the model's outputs: they hold NaN for this input or one near it.",
            )
        better_B = (score_B > self.score_B[rows_B]) | score.reached_B
        rows_B = rows_B[better_B]
        self.points[rows_B] = points.detach()[better_B]
        self.score_B[rows_B] = score_B[better_B]
        self.reached_B[rows_B] |= score.reached_B[better_B]

    def open_rows(self) -> Tensor:
        """Items that have not reached their aim."""
        return (~self.reached_B).nonzero().squeeze(1)

    def found(self) -> Attacked:
        return Attacked(self.points, self.score_B, self.reached_B)


def _lengths(offsets: Tensor) -> Tensor:
    """L2 norm of each item, in a shape that broadcasts."""
    return offsets.flatten(1).norm(dim=1).view(-1, *[1] * (offsets.ndim - 1))


def _direction(grads: Tensor, norm: Norm) -> Tensor:
    """The steepest step of length 1 in the norm; 0 where the gradient vanishes."""
    return grads.sign() if norm == "linf" else grads / _lengths(grads).clamp(min=1e-30)


def _noise(inputs: Tensor, seeds: Sequence[tuple[int, int]], norm: Norm) -> Tensor:
    """A uniform point of the unit ball for each (item's seed, restart)."""
    drawn = [_draw(inputs[0], seed, restart, norm) for seed, restart in seeds]
    return torch.stack(drawn).to(inputs) if drawn else inputs[:0]


def _draw(like: Tensor, seed: int, restart: int, norm: Norm) -> Tensor:
    draw = torch.Generator().manual_seed((seed * 1_000_003 + restart) % 2**63)
    if norm == "linf":
        return torch.rand(like.shape, generator=draw) * 2 - 1
    gauss = torch.randn(like.shape, generator=draw)
    radius = float(torch.rand((), generator=draw)) ** (1 / like.numel())
    return gauss * (radius / gauss.norm())


def _require_valid(
    inputs: Tensor, eps: float, num_steps: int, num_restarts: int, limits: tuple[float, float]
) -> None:
    if not 0 <= eps < float("inf"):
        raise ConfigError(f"eps must be a finite number of at least 0; got {eps}", where="eps")
    if num_steps < 1 or num_restarts < 1:
        raise ConfigError(f"An attack needs a step and a start; got {num_steps} and {num_restarts}")
    low, high = (float(end) for end in inputs.aminmax()) if inputs.numel() else limits
    if not (limits[0] <= low and high <= limits[1]):
        raise DataError(
            f"Inputs between {low:g} and {high:g} leave the valid range, {limits[0]:g} to {limits[1]:g}",
            where="inputs",
            cure="Pass inputs before normalisation, or set the limits.",
        )
