"""Interval bounds: by hand, against slow twins, and by points that must lie inside."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from temper.core.errors import ConfigError, DataError, ModelError
from temper.ops.bounds import (
    Box,
    box_between,
    clean_statistics,
    input_box,
    margin_bounds,
    monotone_box,
    rectify_box,
    robust_losses,
    verified_mask,
)
from temper.ops.network_bounds import BoundedNetwork


class Residual(nn.Module):
    """Every shape of graph in one: a sum, a concatenation, functions, methods, shapes read, both poolings."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.branch = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.lone = nn.BatchNorm2d(4)
        self.act = nn.LeakyReLU(0.1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8 * 9, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        y = self.act(self.branch(x)) + x
        y = self.lone(F.max_pool2d(y, 2))
        z = torch.cat([y, F.avg_pool2d(x, 2)], dim=1)
        z = self.drop(z).view(z.size(0), -1)
        return self.last(torch.tanh(self.head(z)))


def small_cnn(norms=True):
    def norm(kind, width):
        return [kind(width)] if norms else []

    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), *norm(nn.BatchNorm2d, 4), nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, stride=2, padding=1), *norm(nn.BatchNorm2d, 6), nn.ReLU(),
        nn.Flatten(), nn.Linear(54, 8), *norm(nn.BatchNorm1d, 8), nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip


def lively(build, seed=0):
    """A network in float64 whose batch norms have statistics and weights of both signs."""
    torch.manual_seed(seed)
    network = build().double()
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return network


BUILDS = {"cnn": small_cnn, "plain": lambda: small_cnn(norms=False), "residual": Residual}
IMAGES = torch.rand(5, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 1, 0])


def slow_bounds(network, lower, upper, clean):
    """The slow twin for sequential networks: both ends, weights split by sign; batch norm apart, by plain autograd."""
    for layer in network:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            positive, negative = layer.weight.clamp(min=0), layer.weight.clamp(max=0)
            bias = layer.bias.view(1, -1, *[1] * (layer.weight.ndim - 2))

            def product(x, weight, layer=layer):
                if isinstance(layer, nn.Linear):
                    return x @ weight.T
                return F.conv2d(x, weight, None, layer.stride, layer.padding)

            lower, upper = (
                product(lower, positive) + product(upper, negative) + bias,
                product(upper, positive) + product(lower, negative) + bias,
            )
            clean = product(clean, layer.weight) + bias
        elif isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            axes = [0, *range(2, clean.ndim)]
            mean, var = clean.mean(axes, keepdim=True), clean.var(axes, keepdim=True, correction=0)
            if not layer.training:
                mean, var = layer.running_mean.view_as(mean), layer.running_var.view_as(mean)
            scale = layer.weight.view_as(mean) / (var + layer.eps).sqrt()
            one, two, clean = ((x - mean) * scale + layer.bias.view_as(mean) for x in (lower, upper, clean))
            lower, upper = torch.minimum(one, two), torch.maximum(one, two)
        else:
            lower, upper, clean = (layer(x.clone()) for x in (lower, upper, clean))
    return lower, upper


def test_a_toy_by_hand():
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[1.0, -2.0], [1.0, 1.0]]))
        network[0].bias.copy_(torch.tensor([0.0, -1.0]))
        network[2].weight.copy_(torch.tensor([[1.0, -1.0], [0.0, 2.0]]))
        network[2].bias.zero_()
    inputs = input_box(torch.tensor([[0.5, 0.25]]), 0.25)
    found = BoundedNetwork(network).bounds(inputs, hidden=True)
    # x in [.25, .75] x [0, .5]: x1 - 2 x2 in [-.75, .75], x1 + x2 - 1 in [-.75, .25].
    assert found.hidden[0].lower.tolist() == [[-0.75, -0.75]]
    assert found.hidden[0].upper.tolist() == [[0.75, 0.25]]
    assert found.output.lower.tolist() == [[-0.25, 0.0]]
    assert found.output.upper.tolist() == [[0.75, 0.5]]
    margins = BoundedNetwork(network).bounds(inputs, torch.tensor([0])).margins
    # z1 - z2 = h1 - 3 h2 >= 0 - 3 / 4, where the two bounds apart give -.25 - .5 = -.75 as well.
    assert margins.tolist() == [[0.0, -0.75]]
    assert robust_losses(margins).item() == pytest.approx(math.log(1 + math.exp(0.75)))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["cnn", "plain"])
def test_bounds_and_gradients_equal_the_slow_twin(name, training):
    fast, slow = (lively(BUILDS[name]).train(training) for _ in range(2))
    inputs = input_box(IMAGES, 0.1)
    weights = torch.randn(2, 5, 3, dtype=torch.float64)
    output = BoundedNetwork(fast).bounds(inputs).output
    ends = slow_bounds(slow, inputs.box.lower, inputs.box.upper, IMAGES)
    torch.testing.assert_close(torch.stack([output.lower, output.upper]), torch.stack(ends))
    (torch.stack([output.lower, output.upper]) * weights).sum().backward()
    (torch.stack(ends) * weights).sum().backward()
    for one, two in zip(fast.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(one.grad, torch.zeros_like(two) if two.grad is None else two.grad)


@pytest.mark.parametrize("name", BUILDS)
@settings(max_examples=25)
@given(eps=st.floats(0, 0.5), seed=st.integers(0, 2**20))
def test_every_point_of_the_ball_lies_within(name, eps, seed):
    network = lively(BUILDS[name], seed % 7).eval()
    inputs = input_box(IMAGES, eps, mean=(0.4, 0.6), std=(0.2, 0.5))
    bounded = BoundedNetwork(network)
    output, margins = bounded.bounds(inputs).output, bounded.bounds(inputs, LABELS).margins
    draw = torch.Generator().manual_seed(seed)
    for corners in (False, True):
        step = torch.rand(40, *IMAGES.shape, dtype=torch.float64, generator=draw) * 2 - 1
        points = (IMAGES + eps * (step.sign() if corners else step)).clamp(0, 1)
        points = (points - torch.tensor([0.4, 0.6], dtype=torch.float64).view(2, 1, 1)) / torch.tensor(
            [0.2, 0.5], dtype=torch.float64
        ).view(2, 1, 1)
        logits = network(points.flatten(0, 1)).unflatten(0, (40, -1))
        assert (logits >= output.lower - 1e-9).all()
        assert (logits <= output.upper + 1e-9).all()
        own = logits.gather(2, LABELS.expand(40, -1).unsqueeze(2))
        assert (own - logits >= margins - 1e-9).all()


@pytest.mark.parametrize("name", BUILDS)
def test_without_radius_it_is_the_plain_forward(name):
    network = lively(BUILDS[name]).eval()
    found = BoundedNetwork(network).bounds(input_box(IMAGES, 0.0), clean=True)
    torch.testing.assert_close(found.output.centre, network(IMAGES))
    torch.testing.assert_close(found.clean, network(IMAGES))
    assert found.output.radius.abs().max() < 1e-12


def test_training_mode_moves_running_statistics_as_torch_does():
    ours, plain = lively(small_cnn).train(), lively(small_cnn).train()
    logits = plain(IMAGES)
    found = BoundedNetwork(ours).bounds(input_box(IMAGES, 0.0), clean=True)
    torch.testing.assert_close(found.output.centre, logits)
    torch.testing.assert_close(found.clean, logits)
    for (key, one), two in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, msg=key)
    norms = nn.BatchNorm2d(2, momentum=None), nn.BatchNorm2d(2, momentum=None)
    for _ in range(2):
        clean_statistics(IMAGES.float(), norms[0])
        norms[1](IMAGES.float())
    torch.testing.assert_close(norms[0].running_var, norms[1].running_var)


def test_hidden_boxes_cost_nothing_but_memory():
    network, inputs = lively(small_cnn).eval(), input_box(IMAGES, 0.05)
    kept = BoundedNetwork(network).bounds(inputs, LABELS, hidden=True)
    torch.testing.assert_close(kept.margins, BoundedNetwork(network).bounds(inputs, LABELS).margins)
    assert [box.centre.shape[1] for box in kept.hidden] == [4, 6, 8]
    assert (kept.hidden[0].lower < 0).any()


@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(0, 3)), min_size=1, max_size=6), st.booleans())
def test_rectified_boxes_and_their_gradient(pairs, in_place):
    centre, radius = (torch.tensor(values, dtype=torch.float64) for values in zip(*pairs, strict=True))
    fast, slow = ([centre.clone().requires_grad_(), radius.clone().requires_grad_()] for _ in range(2))
    found = rectify_box(Box(fast[0] * 1, fast[1] * 1), in_place=in_place)
    wanted = monotone_box(Box(*slow), torch.relu)
    torch.testing.assert_close(found.centre, wanted.centre)
    torch.testing.assert_close(found.radius, wanted.radius)
    (found.centre.sum() + 3 * found.radius.sum()).backward()
    (wanted.centre.sum() + 3 * wanted.radius.sum()).backward()
    # At exactly 0 a subgradient may be either side's.
    clear = ((centre - radius).abs() > 1e-9) & ((centre + radius).abs() > 1e-9)
    torch.testing.assert_close(fast[0].grad[clear], slow[0].grad[clear])
    torch.testing.assert_close(fast[1].grad[clear], slow[1].grad[clear])


def test_elided_margins_equal_the_differences_of_one_affine_map():
    torch.manual_seed(0)
    box, weight, bias = Box(torch.randn(5, 4), torch.rand(5, 4)), torch.randn(3, 4), torch.randn(3)
    margins = margin_bounds(box, weight, bias, LABELS)
    for item, label in enumerate(LABELS):
        for other in range(3):
            row = weight[label] - weight[other]
            low = row @ box.centre[item] - row.abs() @ box.radius[item] + bias[label] - bias[other]
            assert margins[item, other].item() == pytest.approx(low.item(), abs=1e-5)
    apart = F.linear(box.centre, weight, bias), F.linear(box.radius, weight.abs())
    worst = (apart[0] - apart[1]).gather(1, LABELS[:, None]) - (apart[0] + apart[1])
    others = torch.arange(3) != LABELS[:, None]
    assert (margins >= worst - 1e-5)[others].all()
    assert verified_mask(torch.tensor([[0.0, 0.1], [-0.1, 0.0]]), torch.tensor([0, 1])).tolist() == [
        True,
        False,
    ]


def test_the_box_is_clipped_and_normalised_in_that_order():
    images = torch.tensor([[[[0.0]], [[0.95]]]])
    clean, box = input_box(images, 0.1, mean=(0.5, 0.5), std=(0.5, 0.25))
    torch.testing.assert_close(box.lower.flatten(), torch.tensor([-1.0, 1.4]))
    torch.testing.assert_close(box.upper.flatten(), torch.tensor([-0.8, 2.0]))
    torch.testing.assert_close(clean.flatten(), torch.tensor([-1.0, 1.8]))
    free = input_box(torch.tensor([[40.0, -3.0]]), torch.tensor([[1.0, 2.0]]), limits=None).box
    assert free.lower.tolist() == [[39.0, -5.0]]
    assert box_between(torch.tensor([1.0]), torch.tensor([3.0])) == Box(
        torch.tensor([2.0]), torch.tensor([1.0])
    )


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"eps": 8.0}, ConfigError, "divided by 255"),
        ({"eps": -0.1}, ConfigError, "at least 0"),
        ({"eps": float("nan")}, ConfigError, "finite"),
        ({"eps": 0.1, "mean": (0.1, 0.2, 0.3)}, ConfigError, "3 statistics for inputs of 2 channels"),
        ({"eps": 0.1, "std": (0.0, 1.0)}, ConfigError, "above 0"),
        ({"eps": 0.1, "inputs": IMAGES * 255}, DataError, "leave the valid range"),
        ({"eps": 0.1, "inputs": IMAGES.where(IMAGES < 0.9, torch.nan)}, DataError, "not a finite number"),
    ],
)
def test_bad_inputs_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        input_box(**{"inputs": IMAGES, **arguments})


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(x) + x


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (
            nn.Sequential(nn.Linear(2, 2), nn.GELU()),
            "No bound rule for GELU.*Sequential|GELU 1.*There are rules for",
        ),
        (nn.Sequential(nn.MultiheadAttention(2, 1)), "MultiheadAttention|cannot be read"),
        (nn.Sequential(nn.LeakyReLU(-0.5)), "its slope is negative"),
        (nn.Sequential(nn.Conv2d(1, 1, 3, padding_mode="circular")), "circular"),
        (Branching(), "Branching cannot be read"),
        (Reused(), "in place"),
    ],
)
def test_networks_without_bounds_are_refused_by_name(network, words):
    with pytest.raises(ModelError, match=words):
        BoundedNetwork(network)


def test_wrong_shapes_labels_and_batches_are_refused():
    bounded = BoundedNetwork(lively(small_cnn).eval())
    with pytest.raises(DataError, match="layer 0 has 3 channels, not 2"):
        bounded.bounds(input_box(torch.rand(2, 3, 6, 6), 0.1))
    with pytest.raises(DataError, match="outside the 3 classes"):
        bounded.bounds(input_box(IMAGES, 0.1), LABELS + 1)
    bounded.network.train()
    with pytest.raises(DataError, match="more than one item"):
        bounded.bounds(input_box(IMAGES[:1], 0.1))
    with pytest.raises(ModelError, match="ends in a linear layer"):
        BoundedNetwork(nn.Sequential(nn.Flatten(), nn.ReLU())).bounds(input_box(IMAGES, 0.1), LABELS)
