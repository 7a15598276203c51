"""Projected gradient attacks: never out of the ball, the known optimum of a linear model, and items apart."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from temper.core.errors import ConfigError, DataError, NumericsError
from temper.ops.perturb import Score, pgd, project, untargeted

IMAGES = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
NORMS = ("linf", "l2")


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 3)).eval()


def distance(points, centres, norm):
    offsets = (points - centres).flatten(1)
    return offsets.abs().amax(1) if norm == "linf" else offsets.norm(dim=1)


@pytest.mark.parametrize("norm", NORMS)
def test_every_point_that_is_scored_lies_in_the_ball_and_the_limits(norm):
    seen = []

    def spying(points, rows_B):
        seen.append((points.detach().clone(), rows_B))
        return untargeted(network(), LABELS)(points, rows_B)

    eps = 0.1 if norm == "linf" else 0.5
    pgd(spying, IMAGES, eps, norm=norm, num_steps=6, num_restarts=3, step_size=eps)
    assert len(seen) > 6
    for points, rows_B in seen:
        assert (distance(points, IMAGES[rows_B], norm) <= eps * (1 + 1e-5)).all()
        assert points.min() >= 0
        assert points.max() <= 1


@pytest.mark.parametrize("norm", NORMS)
def test_the_optimum_of_a_linear_model(norm):
    torch.manual_seed(0)
    weight, eps = torch.randn(16), 0.05
    centres = torch.rand(4, 16) * 0.5 + 0.25

    def linear(points, rows_B):
        score_B = points @ weight
        return Score(score_B, torch.zeros(len(points), dtype=torch.bool))

    found = pgd(linear, centres, eps, norm=norm, num_steps=50, step_size=4 * eps)
    gain = weight.abs().sum() if norm == "linf" else weight.norm()
    torch.testing.assert_close(found.score_B, centres @ weight + eps * gain, atol=1e-4, rtol=1e-4)
    assert not found.reached_B.any()


@pytest.mark.parametrize("norm", NORMS)
def test_more_restarts_are_never_worse(norm):
    objective = untargeted(network(), LABELS)
    clean = objective(IMAGES, torch.arange(6))
    scores = [clean.score_B] + [
        pgd(objective, IMAGES, 0.04, norm=norm, num_steps=4, num_restarts=n).score_B for n in (1, 2, 4)
    ]
    reached = [score > 0 for score in scores]
    for before, after, was, now in zip(scores, scores[1:], reached, reached[1:], strict=False):
        assert (after >= before).all()
        assert (now | ~was).all()


@pytest.mark.parametrize("norm", NORMS)
def test_an_item_is_attacked_the_same_in_any_company(norm):
    together = pgd(untargeted(network(), LABELS), IMAGES, 0.1, norm=norm, num_steps=5, num_restarts=2)
    for row in range(6):
        alone = pgd(
            untargeted(network(), LABELS[row : row + 1]), IMAGES[row : row + 1], 0.1, norm=norm, num_steps=5,
            num_restarts=2, seeds=[row],
        )  # fmt: skip
        torch.testing.assert_close(alone.points[0], together.points[row])
        assert alone.reached_B[0] == together.reached_B[row]


def test_items_that_reached_the_aim_are_left_alone():
    calls = []
    objective = untargeted(network(), LABELS)

    def counting(points, rows_B):
        calls.append(rows_B.tolist())
        return objective(points, rows_B)

    wrong = objective(IMAGES, torch.arange(6)).reached_B
    assert wrong.any()
    assert not wrong.all()
    found = pgd(counting, IMAGES, 0.02, num_steps=3, num_restarts=2)
    assert all(set(rows).isdisjoint(wrong.nonzero().squeeze(1).tolist()) for rows in calls[1:])
    assert torch.equal(found.points[wrong], IMAGES[wrong])
    logits = network()(found.points)
    assert torch.equal(logits.argmax(1) != LABELS, found.reached_B)


def test_nothing_is_left_on_the_model_and_no_radius_changes_nothing():
    model = network()
    objective = untargeted(model, LABELS)
    assert torch.equal(pgd(objective, IMAGES, 0.0).points, IMAGES)
    pgd(objective, IMAGES, 0.1, num_steps=2, random_start=False)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(pgd(objective, IMAGES[:0], 0.1).points) == 0


def test_a_projection_by_hand():
    centre = torch.tensor([[0.5, 0.95]])
    far = centre + torch.tensor([[3.0, 4.0]])
    torch.testing.assert_close(project(far, centre, 0.1, "linf", (0.0, 1.0)), torch.tensor([[0.6, 1.0]]))
    torch.testing.assert_close(
        project(far, centre, 0.1, "l2", (0.0, 9.0)), centre + torch.tensor([[0.06, 0.08]])
    )
    torch.testing.assert_close(project(centre, centre, 0.1, "l2", (0.0, 1.0)), centre)


def test_bad_input_is_refused():
    objective = untargeted(network(), LABELS)
    with pytest.raises(DataError, match="leave the valid range"):
        pgd(objective, IMAGES * 255, 0.1)
    with pytest.raises(ConfigError, match="finite number of at least 0"):
        pgd(objective, IMAGES, -1.0)
    with pytest.raises(ConfigError, match="a step and a start"):
        pgd(objective, IMAGES, 0.1, num_steps=0)
    with pytest.raises(ConfigError, match="2 seeds for 6 items"):
        pgd(objective, IMAGES, 0.1, seeds=[1, 2])
    with pytest.raises(NumericsError, match="not a number"):
        pgd(untargeted(lambda points: points.flatten(1)[:, :3] * torch.nan, LABELS), IMAGES, 0.1)
