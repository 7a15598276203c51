"""Two ways to the same bounds: the graph's rules and interval arithmetic through the forward pass; attacks stay inside."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from temper.core.errors import ModelError
from temper.ops.bounds import input_box, verified_mask
from temper.ops.intervals import Interval, recomputed_margins
from temper.ops.network_bounds import BoundedNetwork
from temper.ops.perturb import pgd, untargeted
from temper.systems.efficientnet import EfficientNetLite0
from temper.systems.loading import load_base
from temper.systems.networks import HEAD, build_network

MEAN, STD = (0.4, 0.6), (0.2, 0.5)
IMAGES = torch.rand(8, 2, 6, 6, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 1, 0, 2, 2, 1])
NETWORKS = ["mlp-w8", "mlp-w8-bn", "cnn3-w2", "cnn3-w2-bn", "cnn7-w2-bn", "resnet8-w2", "resnet8-w2-bn"]


class Normalising(nn.Module):
    """Normalises its own input with buffers, averages by method, and mixes in numbers and differences."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN).view(2, 1, 1))
        self.register_buffer("std", torch.tensor((0.2, -0.5)).view(2, 1, 1))
        self.conv = nn.Conv2d(2, 4, 3)
        self.other = nn.Conv2d(2, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = (x - self.mean) / self.std
        x = 1.0 - 2 * torch.relu(self.conv(x) - self.other(x) * 0.5)
        return self.head(x.mean((2, 3)))


def build(name, seed=0):
    """A network whose batch norms have statistics of their own."""
    torch.manual_seed(seed)
    network = Normalising() if name == "normalising" else build_network(name, (2, 6, 6), 3, seed)
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return network.eval()


@pytest.mark.parametrize("name", [*NETWORKS, "normalising"])
def test_both_ways_agree(name):
    network = build(name).double()
    inputs = input_box(IMAGES.double(), 0.1, mean=MEAN, std=STD)
    ends = Interval(inputs.box.lower, inputs.box.upper)
    bounded, found = BoundedNetwork(network), network(ends)
    output = bounded.bounds(inputs).output
    torch.testing.assert_close(found.lower, output.lower)
    torch.testing.assert_close(found.upper, output.upper)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    margins = recomputed_margins(network, HEAD, ends, LABELS)
    torch.testing.assert_close(margins, bounded.bounds(inputs, LABELS).margins)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("name", [*NETWORKS, "normalising"])
def test_attacks_stay_within_the_bounds_and_never_break_a_certificate(name):
    network, eps = build(name).requires_grad_(False), 0.02
    bounded = BoundedNetwork(network)
    labels = network(IMAGES).argmax(1)
    attacked = pgd(untargeted(network, labels), IMAGES, eps, num_steps=10, num_restarts=2)
    inputs = input_box(IMAGES, eps)
    output, margins = bounded.bounds(inputs).output, bounded.bounds(inputs, labels).margins
    with torch.no_grad():
        logits = network(attacked.points)
    slack = 1e-4 * float(output.upper.abs().max())
    assert (logits >= output.lower - slack).all()
    assert (logits <= output.upper + slack).all()
    assert not (attacked.reached_B & verified_mask(margins, labels)).any()
    assert (-attacked.score_B >= margins.scatter(1, labels[:, None], torch.inf).amin(1) - slack).all()


def test_a_table_with_its_own_scales():
    network = build_network("mlp-w8-bn", (5,), 2, seed=1).eval()
    table = torch.randn(6, 5, generator=torch.Generator().manual_seed(2)) * 10
    labels, scales = torch.tensor([0, 1, 0, 1, 0, 1]), (1.0, 2.0, 3.0, 4.0, 5.0)
    inputs = input_box(table, 0.5, limits=None, mean=(0.0,) * 5, std=scales)
    torch.testing.assert_close(inputs.box.radius, (0.5 / torch.tensor(scales)).expand(6, 5))
    margins = BoundedNetwork(network).bounds(inputs, labels).margins
    again = recomputed_margins(network, HEAD, Interval(inputs.box.lower, inputs.box.upper), labels)
    torch.testing.assert_close(margins.double(), again, atol=1e-5, rtol=1e-5)


class Choosy(nn.Module):
    """Asks for a size, and for a value, before it goes on."""

    def __init__(self, asks_values=False):
        super().__init__()
        self.head, self.asks_values = nn.Linear(4, 3), asks_values

    def forward(self, x):
        if x.shape[1] != 4:
            raise ValueError("4 columns")
        if self.asks_values and x[0, 0] > 0:
            x = x + 1
        return self.head(torch.relu(x) if x.size(-1) >= 1 else x)


def test_branches_on_sizes_are_decided_and_those_on_values_refused():
    box = input_box(torch.rand(2, 4), 0.1)
    assert BoundedNetwork(Choosy(), (4,)).bounds(box).output.centre.shape == (2, 3)
    with pytest.raises(ModelError, match="Choosy cannot be read: 4 columns"):
        BoundedNetwork(Choosy(), (5,))
    for network, shape in ((Choosy(), None), (Choosy(asks_values=True), (4,))):
        with pytest.raises(ModelError, match="Choosy cannot be read"):
            BoundedNetwork(network, shape)


def test_a_transformers_classifier_in_training_mode_keeps_its_statistics_while_it_is_read():
    system = load_base("tiny:resnet")
    before = {key: value.clone() for key, value in system.model.state_dict().items()}
    bounded = BoundedNetwork(system.model.train(), system.shape)
    assert all(torch.equal(value, before[key]) for key, value in system.model.state_dict().items())
    system.model.eval()
    pixels, labels = torch.rand(3, 3, 32, 32), torch.tensor([0, 1, 3])
    inputs = input_box(pixels, 0.001, mean=system.mean, std=system.std)
    found = bounded.bounds(inputs, labels, clean=True)
    torch.testing.assert_close(found.clean, system.logits(pixels))
    again = recomputed_margins(
        system.model, system.head, Interval(inputs.box.lower, inputs.box.upper), labels
    )
    torch.testing.assert_close(found.margins.double(), again, atol=1e-4, rtol=1e-4)


def test_a_network_that_computes_its_padding_from_sizes():
    torch.manual_seed(0)
    network = EfficientNetLite0(3, (2, 33, 32)).double().eval()
    inputs = input_box(torch.rand(2, 2, 33, 32, dtype=torch.float64), 1e-6)
    bounded, labels = BoundedNetwork(network, (2, 33, 32)), torch.tensor([0, 2])
    found = bounded.bounds(inputs, labels, clean=True)
    torch.testing.assert_close(found.clean, network(inputs.clean))
    again = recomputed_margins(network, "fc", Interval(inputs.box.lower, inputs.box.upper), labels)
    torch.testing.assert_close(found.margins, again)


class Padding(nn.Module):
    def forward(self, x):
        return nn.functional.pad(x, (1, 1), value=2.0)


class Mixing(nn.Module):
    def forward(self, x):
        return nn.functional.linear(x, x)


class Dividing(nn.Module):
    def forward(self, x):
        return 1.0 / x


class Squaring(nn.Module):
    def forward(self, x):
        return x * x


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (Dividing(), "divides by a value"),
        (Padding(), "another value than 0"),
        (Mixing(), "weights are values of the network"),
        (Squaring(), "both sides are values"),
        (nn.Sequential(nn.ReLU(inplace=True)), "in place that is used again"),
    ],
)
def test_arithmetic_without_a_rule_is_refused(network, words):
    with pytest.raises(ModelError, match=words):
        BoundedNetwork(network)


def test_interval_arithmetic_refuses_by_name():
    box = Interval(torch.zeros(2, 3), torch.ones(2, 3))
    with pytest.raises(ModelError, match="no rule for gelu"):
        nn.GELU()(box)
    with pytest.raises(ModelError, match="no batch statistics"):
        nn.BatchNorm1d(3).train()(box)
