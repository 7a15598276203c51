"""The small networks: shapes, names, seeds, and building one again from its settings."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from temper.core.errors import ConfigError, ModelError
from temper.systems.names import check_base
from temper.systems.network_names import NETWORKS, parse_network
from temper.systems.networks import FEATURES, HEAD, build_from_settings, build_network

NAMES = [*NETWORKS, *(f"{name}-w4-bn" for name in NETWORKS)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 7, 5)])
def test_logits_are_the_head_of_the_features(name, shape):
    network = build_network(name, shape, 4).eval()
    pixels = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    features = network.get_submodule(FEATURES)(pixels)
    assert features.ndim == 2
    torch.testing.assert_close(network(pixels), network.get_submodule(HEAD)(features))
    assert network(pixels).shape == (2, 4)


@pytest.mark.parametrize("name", NAMES)
def test_batch_norm_follows_every_hidden_layer_or_none(name):
    layers = [m for m in build_network(name, (1, 8, 8), 4).modules() if not list(m.children())]
    hidden = [
        (layers[i], layers[i + 1]) for i, m in enumerate(layers) if isinstance(m, (nn.Conv2d, nn.Linear))
        if i + 1 < len(layers)
    ]  # fmt: skip
    follows = [isinstance(after, (nn.BatchNorm1d, nn.BatchNorm2d)) for _, after in hidden]
    assert follows == [name.endswith("-bn")] * len(hidden)


def test_the_published_cnn7():
    network = build_network("cnn7-bn", (3, 32, 32), 10)
    convs = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert [(m.out_channels, m.stride[0]) for m in convs] == [(64, 1), (64, 1), (128, 2), (128, 1), (128, 1)]
    linears = [(m.in_features, m.out_features) for m in network.modules() if isinstance(m, nn.Linear)]
    assert linears == [(128 * 16 * 16, 512), (512, 10)]


def test_seeds_decide_the_weights_and_leave_the_generator_alone():
    before = torch.get_rng_state()
    one, same, other = (build_network("cnn3-w2", (1, 8, 8), 3, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.head.weight, same.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)


def test_settings_are_json_and_build_it_again():
    network = build_network("resnet8-w4-bn", (3, 8, 8), 5, seed=3)
    again = build_from_settings(json.loads(json.dumps(network.settings)))
    again.load_state_dict(network.state_dict())
    pixels = torch.rand(2, 3, 8, 8)
    assert torch.equal(again.eval()(pixels), network.eval()(pixels))
    with pytest.raises(ModelError, match="no settings of a network"):
        build_from_settings({"model_type": "bert"})


def test_an_mlp_takes_a_table():
    assert build_network("mlp-w8", (30,), 2)(torch.rand(5, 30)).shape == (5, 2)


@pytest.mark.parametrize("name", ["cnn9", "cnn7-bn-w4", "cnn7-w0", "", "CNN7"])
def test_unknown_names_are_refused(name):
    with pytest.raises(ConfigError, match="There is no network"):
        parse_network(name)


@pytest.mark.parametrize("name", ["new:cnn9:1x28x28:10", "new:cnn3:1x0x28:10", "new:mlp:1x8x8:1"])
def test_wrong_names_stop_before_anything_loads(name):
    with pytest.raises(ConfigError, match="no network|no inputs|at least 2"):
        check_base(name)
    check_base("new:cnn3-w4-bn:1x28x28:10:7")


def test_impossible_shapes_and_classes_are_refused():
    with pytest.raises(ConfigError, match="no inputs of shape"):
        build_network("cnn7", (30,), 2)
    with pytest.raises(ConfigError, match="at least 2 classes"):
        build_network("mlp", (30,), 1)


def test_names_need_no_torch():
    code = "import sys, temper.systems.network_names; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
