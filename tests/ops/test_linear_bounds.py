"""Linear bounds of margins: by hand, against explicit matrices, against points of the box, and through gradients."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from temper.core.errors import ModelError
from temper.ops.bounds import Box, Inputs
from temper.ops.linear_bounds import linear_margins, mixed_margins
from temper.ops.network_bounds import BoundedNetwork


class Residual(nn.Module):
    """Two branches, batch norm, a constant and an average."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4 * 9, 3)
        self.register_buffer("shift", torch.tensor(0.1))

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = self.first(pixels - self.shift)
        hidden = torch.relu(hidden + 0.5 * self.branch(hidden) - 0.2)
        logits: Tensor = self.head(torch.flatten(nn.functional.avg_pool2d(hidden, 2), 1))
        return logits


def both(network: nn.Module, inputs: Inputs, labels_B: Tensor) -> tuple[Tensor, Tensor]:
    """Linear and interval bounds."""
    bounded = BoundedNetwork(network)
    found = bounded.bounds(inputs, labels_B, hidden=True)
    assert found.margins is not None
    return linear_margins(bounded, inputs, found, labels_B), found.margins


def mlp(*widths: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


def boxed(shape: tuple[int, ...], eps: float, seed: int = 1) -> Inputs:
    points = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Inputs(points, Box(points, torch.full_like(points, eps)))


def test_a_toy_by_hand() -> None:
    """f = relu(x1 - x2) - relu(2 x1 - x2) over [-1, 2] x [-2, 1].

    The first unit lies in [-2, 4] and counts +1: its lower line is z1. The second lies in [-3, 6] and counts -1: its upper line
    is 2/3 (z2 + 3). So f >= -x1/3 - x2/3 - 2, which is -3 at (2, 1); intervals give 0 - 6.
    """
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    weights = ([[1.0, -1.0], [2.0, -1.0]], [[1.0, -1.0], [0.0, 0.0]])
    for layer, weight in zip((network[0], network[2]), weights, strict=True):
        layer.weight.data = torch.tensor(weight)
        nn.init.zeros_(layer.bias)
    centre = torch.tensor([[0.5, -0.5]])
    linear_BC, interval_BC = both(
        network, Inputs(centre, Box(centre, torch.full((1, 2), 1.5))), torch.tensor([0])
    )
    assert linear_BC.tolist() == [[0.0, pytest.approx(-3.0)]]
    assert interval_BC.tolist() == [[0.0, pytest.approx(-6.0)]]
    assert mixed_margins(linear_BC, interval_BC, 0.25)[0, 1].item() == pytest.approx(-5.25)


@torch.no_grad()
def by_matrices(network: nn.Sequential, hidden: tuple[Box, ...], box: Box, label: int, other: int) -> float:
    """The same for one item of an MLP, row by row with explicit matrices."""
    layers = [layer for layer in network if isinstance(layer, nn.Linear)]
    row, constant = (
        layers[-1].weight[label] - layers[-1].weight[other],
        layers[-1].bias[label] - layers[-1].bias[other],
    )
    for layer, bounds in zip(reversed(layers[:-1]), reversed(hidden), strict=True):
        new = torch.zeros_like(row)
        for at, value in enumerate(row.tolist()):
            low, high = bounds.lower[0, at].item(), bounds.upper[0, at].item()
            if high <= 0:
                continue
            if low >= 0:
                new[at] = value
            elif value > 0:
                new[at] = value if high > -low else 0.0
            else:
                new[at] = value * high / (high - low)
                constant = constant - value * high * low / (high - low)
        row, constant = new @ layer.weight, constant + new @ layer.bias
    return float((row * box.centre[0] - row.abs() * box.radius[0]).sum() + constant)


@pytest.mark.parametrize("eps", [0.0, 0.05, 0.3, 2.0])
def test_they_are_those_of_explicit_matrices(eps: float) -> None:
    network, inputs = mlp(4, 7, 6, 5, 3).requires_grad_(False), boxed((1, 4), eps)
    hidden = BoundedNetwork(network).bounds(inputs, hidden=True).hidden
    linear_BC, interval_BC = both(network, inputs, torch.tensor([1]))
    for other in (0, 2):
        assert linear_BC[0, other].item() == pytest.approx(by_matrices(network, hidden, inputs.box, 1, other))
    if not eps:
        assert torch.allclose(linear_BC, interval_BC)
        logits_C = network(inputs.clean)[0]
        assert torch.allclose(linear_BC[0], logits_C[1] - logits_C)


@pytest.mark.parametrize("training", [True, False])
def test_no_point_of_a_box_lies_below(training: bool) -> None:
    """Conv, batch norm in both modes, a residual sum, a constant, an average: 300 points of every box, half of them corners."""
    torch.manual_seed(2)
    network = Residual().double().train(training)
    inputs, labels_B = boxed((5, 1, 6, 6), 0.06), torch.arange(5) % 3
    network(torch.rand(20, 1, 6, 6, dtype=torch.float64))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    bounded = BoundedNetwork(network)
    found = bounded.bounds(inputs, labels_B, hidden=True)
    moved = {name: value.clone() for name, value in network.state_dict().items()}
    linear_BC = linear_margins(bounded, inputs, found, labels_B)
    assert all(torch.equal(value, moved[name]) for name, value in network.state_dict().items()), (
        "statistics move once"
    )
    assert training == any(not torch.equal(value, before[name]) for name, value in moved.items())
    assert found.margins is not None
    assert (linear_BC - found.margins).max() > 0, "tighter somewhere"
    network.eval()
    if training:  # the batch's statistics as running ones, so that points go through the map that was bounded
        network.load_state_dict(before)
        for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.train()
            norm.momentum = 1.0
        network(inputs.clean)
        network.eval()
        _biased(network, inputs.clean)
    draw = torch.Generator().manual_seed(3)
    for place in range(300):
        noise = torch.rand(inputs.clean.shape, generator=draw, dtype=torch.float64) * 2 - 1
        points = inputs.clean + 0.06 * (noise.sign() if place % 2 else noise)
        logits_BC = network(points)
        margins_BC = logits_BC.gather(1, labels_B[:, None]) - logits_BC
        assert (margins_BC >= linear_BC - 1e-9).all()


@torch.no_grad()
def _biased(network: nn.Module, clean: Tensor) -> None:
    """Running variances as a batch takes them itself, without Bessel's correction."""
    count = clean.numel()
    for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_var *= (count - 1) / count


def test_gradients_reach_weights_and_boxes() -> None:
    """By finite differences in every weight of the first layer, whose boxes change with it."""
    network, inputs, labels_B = mlp(3, 5, 4, 3, seed=4), boxed((2, 3), 0.2), torch.tensor([0, 2])
    both(network, inputs, labels_B)[0].sum().backward()
    weight = network[0].weight
    assert weight.grad is not None
    found = torch.zeros_like(weight)
    with torch.no_grad():
        for at in range(weight.numel()):
            ends = []
            for step in (1e-6, -1e-6):
                weight.view(-1)[at] += step
                ends.append(both(network, inputs, labels_B)[0].sum())
                weight.view(-1)[at] -= step
            found.view(-1)[at] = (ends[0] - ends[1]) / 2e-6
    assert torch.allclose(weight.grad, found, atol=1e-6)


def test_a_linear_network_is_exact() -> None:
    network, inputs = nn.Sequential(nn.Linear(3, 2, bias=False)).double(), boxed((4, 3), 0.5)
    linear_BC, interval_BC = both(network, inputs, torch.zeros(4, dtype=torch.int64))
    assert torch.allclose(linear_BC, interval_BC)


def test_other_layers_are_refused_by_name() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    with pytest.raises(ModelError, match=r"No linear relaxation for Tanh.*or interval bounds"):
        both(network, boxed((1, 2), 0.1), torch.tensor([0]))
