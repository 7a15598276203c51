"""Interval arithmetic in place of tensors: a network's own forward pass run on both ends of a box.

A second, slow way to the bounds of `network_bounds.py`, which shares nothing with it: no graph, no centre and radius, no
folding of batch norm, weights split by their sign, in whatever precision the network and the ends are in. It checks
certificates; training on it would be several times slower.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from temper.core.errors import ModelError

__all__ = ["Interval", "recomputed_margins"]

RISING = {
    "relu", "relu_", "leaky_relu", "elu", "celu", "selu", "relu6", "hardtanh", "sigmoid", "tanh", "softplus",
    "logsigmoid", "hardsigmoid", "softsign", "max_pool2d", "max_pool2d_with_indices", "adaptive_max_pool2d",
    "avg_pool2d", "adaptive_avg_pool2d", "mean", "flatten", "view", "reshape", "contiguous",
    "pad",
}  # fmt: skip
"""Names of functions and methods that never fall in any entry, so both ends go through them as they are."""


class Interval:
    """Two tensors, `lower` <= `upper`, that a network takes for one."""

    def __init__(self, lower: Tensor, upper: Tensor) -> None:
        self.lower, self.upper = lower, upper

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Interval:
        """The rule of a torch function; raises ModelError for one without a rule, by name."""
        name = str(getattr(func, "__name__", func)).removeprefix("_")
        if name in RULES:
            return RULES[name](*args, **(kwargs or {}))
        if name not in RISING:
            raise ModelError(f"Interval arithmetic has no rule for {name}")
        box, *rest = args
        return Interval(func(box.lower, *rest, **(kwargs or {})), func(box.upper, *rest, **(kwargs or {})))

    def __getattr__(self, name: str) -> Any:
        """A method of tensors, e.g. `flatten`, or a fact about the shape."""
        if name in ("shape", "ndim", "dtype", "device", "size", "dim"):
            return getattr(self.lower, name)
        if name not in RISING:
            raise AttributeError(name)
        return lambda *args, **kwargs: Interval(
            getattr(self.lower, name)(*args, **kwargs), getattr(self.upper, name)(*args, **kwargs)
        )

    def __add__(self, other: Any) -> Interval:
        low, high = _ends(other)
        return Interval(self.lower + low, self.upper + high)

    def __sub__(self, other: Any) -> Interval:
        low, high = _ends(other)
        return Interval(self.lower - high, self.upper - low)

    def __mul__(self, factor: Any) -> Interval:
        one, two = self.lower * factor, self.upper * factor
        return Interval(torch.minimum(one, two), torch.maximum(one, two))

    def __truediv__(self, divisor: Any) -> Interval:
        return self * (1 / divisor)

    def __rsub__(self, other: Any) -> Interval:
        return self * -1.0 + other

    __radd__, __rmul__ = __add__, __mul__


def _ends(value: Any) -> tuple[Any, Any]:
    return (value.lower, value.upper) if isinstance(value, Interval) else (value, value)


def _signed(apply: Callable[..., Tensor], box: Interval, weight: Tensor, bias: Tensor | None) -> Interval:
    """An affine map: its positive weights keep the ends, its negative ones swap them."""
    positive, negative = weight.clamp(min=0), weight.clamp(max=0)
    lower = apply(box.lower, positive, bias) + apply(box.upper, negative, None)
    return Interval(lower, apply(box.upper, positive, bias) + apply(box.lower, negative, None))


def _linear(box: Interval, weight: Tensor, bias: Tensor | None = None) -> Interval:
    return _signed(F.linear, box, weight, bias)


def _conv2d(box: Interval, weight: Tensor, bias: Tensor | None = None, *rest: Any, **kwargs: Any) -> Interval:
    return _signed(lambda x, w, b: F.conv2d(x, w, b, *rest, **kwargs), box, weight, bias)


def _batch_norm(
    box: Interval,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Interval:
    if training or mean is None or var is None:
        raise ModelError(
            "Interval arithmetic has no batch statistics", cure="Put the network into eval mode."
        )

    def per_channel(value: Tensor) -> Tensor:
        return value.view(1, -1, *[1] * (box.lower.ndim - 2))

    normed = (box - per_channel(mean)) / per_channel((var + eps).sqrt())
    normed = normed if weight is None else normed * per_channel(weight)
    return normed if bias is None else normed + per_channel(bias)


def _joined(boxes: list[Interval], *rest: Any, **kwargs: Any) -> Interval:
    return Interval(
        torch.cat([box.lower for box in boxes], *rest, **kwargs),
        torch.cat([box.upper for box in boxes], *rest, **kwargs),
    )


def _unchanged(box: Interval, *rest: Any, **kwargs: Any) -> Interval:
    return box


RULES: dict[str, Callable[..., Interval]] = {
    "linear": _linear,
    "conv2d": _conv2d,
    "batch_norm": _batch_norm,
    "cat": _joined,
    "concat": _joined,
    "dropout": _unchanged,
    "add": lambda left, right: left + right if isinstance(left, Interval) else right + left,
    "sub": lambda left, right: left - right if isinstance(left, Interval) else right.__rsub__(left),
    "mul": lambda left, right: left * right if isinstance(left, Interval) else right * left,
    "div": lambda left, right: left / right,
}
RULES |= {f"{name}_": rule for name, rule in RULES.items() if name in ("add", "sub", "mul", "div")}


@torch.no_grad()
def recomputed_margins(network: nn.Module, head: str, box: Interval, labels_B: Tensor) -> Tensor:
    """Lower bounds of z_y - z_j in float64, (B, C), by interval arithmetic in eval mode; the network stays as it is.

    `head` names the linear module that ends the network; its rows are subtracted from the label's, so it gives the
    differences themselves. The ends of the box are as the network takes them.
    """
    twin = copy.deepcopy(network).double().eval()
    last: Any = twin.get_submodule(head)
    weight_CD, bias_C = last.weight.clone(), None if last.bias is None else last.bias.clone()
    lower, upper = box.lower.double(), box.upper.double()
    margins_BC = lower.new_empty(len(labels_B), len(weight_CD))
    for label in labels_B.unique().tolist():
        rows_B = labels_B == label
        last.weight.copy_(weight_CD[label] - weight_CD)
        if bias_C is not None:
            last.bias.copy_(bias_C[label] - bias_C)
        found = twin(Interval(lower[rows_B], upper[rows_B]))
        margins_BC[rows_B] = (found["logits"] if isinstance(found, dict) else found).lower
    return margins_BC
