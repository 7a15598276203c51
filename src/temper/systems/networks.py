"""Small networks to train from scratch: plain modules over pixels in [0, 1], without normalisation.

Every one is `head(features(pixels))`: `features` ends in the penultimate vector, (B, D), and `head` is linear. The
names are in `network_names.py`; `settings` is all that is needed to build one again, as JSON.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from temper.core.errors import ModelError
from temper.systems.network_names import MODEL_TYPE, Architecture, check_network

__all__ = ["FEATURES", "HEAD", "Network", "Residual", "build_from_settings", "build_network"]

FEATURES = "features"
"""The module whose output is the penultimate feature, in every network here."""
HEAD = "head"
"""The linear module behind it."""


class Network(nn.Module):
    """Logits, (B, C), of pixels; reads a fixed input shape."""

    def __init__(self, features: nn.Sequential, head: nn.Linear, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.features, self.head = features, head
        self.settings = dict(settings)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Logits from pixels in [0, 1]."""
        logits_BC: Tensor = self.head(self.features(pixels_BCHW))
        return logits_BC


class Residual(nn.Module):
    """Two convolutions beside a shortcut, added, then ReLU."""

    def __init__(self, num_in: int, num_out: int, stride: int, has_norms: bool) -> None:
        super().__init__()
        first, second = _conv(num_in, num_out, stride, has_norms), _conv(num_out, num_out, 1, has_norms)
        self.branch = nn.Sequential(*first, *second[:-1])
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or num_in != num_out:
            self.shortcut = nn.Sequential(*_conv(num_in, num_out, stride, has_norms, kernel=1)[:-1])
        self.relu = nn.ReLU()

    def forward(self, hidden_BCHW: Tensor) -> Tensor:
        """Same height and width divided by the stride, rounded up."""
        out: Tensor = self.relu(self.branch(hidden_BCHW) + self.shortcut(hidden_BCHW))
        return out


def build_network(name: str, shape: Sequence[int], num_classes: int, seed: int = 0) -> Network:
    """A fresh network in float32 and training mode for inputs of `shape`; torch's own first weights, by the seed.

    Raises ConfigError for an unknown name, a shape that it cannot take, or fewer than 2 classes.
    """
    parsed = check_network(name, shape, num_classes)
    settings = {"model_type": MODEL_TYPE, "network": name, "shape": list(shape), "num_classes": num_classes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers, width = BUILDERS[parsed.base](parsed, shape)
        return Network(nn.Sequential(*layers), nn.Linear(width, num_classes), settings)


def build_from_settings(settings: Mapping[str, Any]) -> Network:
    """The network of `settings`, with fresh weights to be overwritten; raises ModelError for settings of another kind."""
    try:
        if settings["model_type"] != MODEL_TYPE:
            raise ValueError(f"model_type is {settings['model_type']!r}")
        name, shape, num_classes = settings["network"], settings["shape"], settings["num_classes"]
        return build_network(str(name), [int(size) for size in shape], int(num_classes))
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"These are no settings of a network: {error}",
            where="config.json",
            cure=f"They hold model_type {MODEL_TYPE}, network, shape and num_classes.",
        ) from None


def _conv(num_in: int, num_out: int, stride: int, has_norms: bool, kernel: int = 3) -> list[nn.Module]:
    norm = [nn.BatchNorm2d(num_out)] if has_norms else []
    return [nn.Conv2d(num_in, num_out, kernel, stride, padding=kernel // 2), *norm, nn.ReLU()]


def _linear(num_in: int, num_out: int, has_norms: bool) -> list[nn.Module]:
    norm = [nn.BatchNorm1d(num_out)] if has_norms else []
    return [nn.Linear(num_in, num_out), *norm, nn.ReLU()]


def _mlp(net: Architecture, shape: Sequence[int]) -> tuple[list[nn.Module], int]:
    first = _linear(math.prod(shape), net.width, net.has_norms)
    return [nn.Flatten(), *first, *_linear(net.width, net.width, net.has_norms)], net.width


def _convolutions(
    net: Architecture, shape: Sequence[int], plan: Sequence[tuple[int, int]], hidden: int
) -> tuple[list[nn.Module], int]:
    """Convolutions of (multiple of the width, stride), then one linear layer of `hidden`."""
    channels, height, width = shape
    layers: list[nn.Module] = []
    for multiple, stride in plan:
        layers += _conv(channels, net.width * multiple, stride, net.has_norms)
        channels, height, width = net.width * multiple, math.ceil(height / stride), math.ceil(width / stride)
    return [*layers, nn.Flatten(), *_linear(channels * height * width, hidden, net.has_norms)], hidden


def _cnn3(net: Architecture, shape: Sequence[int]) -> tuple[list[nn.Module], int]:
    return _convolutions(net, shape, ((1, 1), (2, 2), (2, 2)), 100)


def _cnn7(net: Architecture, shape: Sequence[int]) -> tuple[list[nn.Module], int]:
    return _convolutions(net, shape, ((1, 1), (1, 1), (2, 2), (2, 1), (2, 1)), 8 * net.width)


def _resnet8(net: Architecture, shape: Sequence[int]) -> tuple[list[nn.Module], int]:
    width, norms = net.width, net.has_norms
    blocks = [
        Residual(width, width, 1, norms),
        Residual(width, 2 * width, 2, norms),
        Residual(2 * width, 4 * width, 2, norms),
    ]
    return [*_conv(shape[0], width, 1, norms), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten()], 4 * width


BUILDERS = {"mlp": _mlp, "cnn3": _cnn3, "cnn7": _cnn7, "resnet8": _resnet8}
