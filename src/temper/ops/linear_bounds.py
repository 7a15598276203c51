"""Linear lower bounds of a whole network's margins (CROWN), with interval bounds inside: the backward pass of CROWN-IBP.

A margin is followed back from the last layer as one linear function of each layer's input. Where it meets a ReLU that may
be on or off, coefficients above 0 take a line below the ReLU and those below 0 the line above it, between the interval bounds.
What comes out is one linear function of the input below the margin, whose least value in the box is known.

Everything but that choice is what autograd does: the network runs on (value, one), its constants multiplied by `one`, so the
slope in `one` is the constant term.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from temper.core.errors import ModelError
from temper.ops.bounds import Box, Inputs
from temper.ops.network_bounds import (
    AVERAGING,
    DIFFERENCES,
    JOINS,
    NORMS,
    NOTHING,
    PRODUCTS,
    QUOTIENTS,
    RECTIFIERS,
    SUMS,
    BoundedNetwork,
    Bounds,
)
from temper.ops.network_graph import reads_shape

__all__ = ["linear_margins", "mixed_margins"]


def linear_margins(bounded: BoundedNetwork, inputs: Inputs, found: Bounds, labels_B: Tensor) -> Tensor:
    """Lower bounds of z_y - z_j for each class j, (B, C), 0 for j = y, with gradient in the weights where it is on.

    `found` is what `bounded.bounds(inputs, labels_B, hidden=True)` gave: the boxes between which a ReLU lies, and what batch
    norm was. They may be looser or tighter than interval bounds. Raises ModelError for layers other than affine ones, ReLU and
    averaging.
    """
    keeps_graph = torch.is_grad_enabled()
    box = inputs.box
    with torch.enable_grad(), torch.autocast(box.centre.device.type, enabled=False):
        points = box.centre.detach().requires_grad_()
        one_B = points.new_ones(len(points), requires_grad=True)
        logits_BC = _Homogeneous(bounded, found, one_B).run(points)
        margins_BC = logits_BC.gather(1, labels_B[:, None]) - logits_BC
        bounds = []
        for margin_B in margins_BC.unbind(1):
            slope, constant_B = torch.autograd.grad(
                margin_B.sum(),
                [points, one_B],
                create_graph=keeps_graph,
                retain_graph=True,
                materialize_grads=True,
            )
            least = slope * box.centre - slope.abs() * box.radius
            bounds.append(least.flatten(1).sum(1) + constant_B)
    lower_BC = torch.stack(bounds, dim=1)
    return lower_BC if keeps_graph else lower_BC.detach()


def mixed_margins(linear_BC: Tensor, interval_BC: Tensor, share: float) -> Tensor:
    """CROWN-IBP: `share` of the linear bounds and the rest of the interval bounds; sound, as both are."""
    return share * linear_BC + (1 - share) * interval_BC


class _Relaxed(torch.autograd.Function):
    """A ReLU between two bounds, known by its backward pass alone; the value that goes on means nothing."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, one_B: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        ctx.save_for_backward(lower, upper)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (grad,), (lower, upper) = grads, ctx.saved_tensors
        low, high = lower.clamp(max=0), upper.clamp(min=0)
        above = high / (high - low).clamp(min=1e-12)
        # The steeper of the two lines through 0 that leaves less between itself and the ReLU.
        below = (upper > -lower).to(grad.dtype)
        plus, minus = grad.clamp(min=0), grad.clamp(max=0)
        constant_B = (minus * above * -low).flatten(1).sum(1)
        return plus * below + minus * above, constant_B, None, None


class _Homogeneous:
    """The network's nodes as linear maps of (value, one)."""

    def __init__(self, bounded: BoundedNetwork, found: Bounds, one_B: Tensor) -> None:
        self.net, self.norms, self.one_B = bounded, found.norms, one_B
        self.hidden = iter(found.hidden)
        self.values: dict[fx.Node, Any] = {}

    def run(self, points: Tensor) -> Tensor:
        *nodes, output = self.net.nodes
        for node in nodes:
            if node.op == "placeholder":
                self.values[node] = points
            elif node.op == "get_attr":
                self.values[node] = self.net.constant(node)
            else:
                self.values[node] = self._value(node)
        logits_BC: Tensor = self.values[output.all_input_nodes[0]]
        return logits_BC

    def _value(self, node: fx.Node) -> Any:
        rule, module = self.net.rule(node), self.net.module(node)
        filled: Any = fx.node.map_arg((node.args, node.kwargs), lambda used: self.values[used])
        (value, *others), kwargs = filled
        if rule is nn.Linear:
            return self._plus(F.linear(value, module.weight), module.bias, -1)
        if rule is nn.Conv2d:
            conv = F.conv2d(
                value, module.weight, None, module.stride, module.padding, module.dilation, module.groups
            )
            return self._plus(conv, module.bias, 1)
        if rule in NORMS:
            scale_C, shift_C = self.norms[node]
            return self._plus(value * _along(scale_C, value, 1), shift_C, 1)
        if rule in RECTIFIERS:
            box: Box = next(self.hidden)
            return _Relaxed.apply(value, self.one_B, box.lower, box.upper)
        if rule in (*SUMS, *DIFFERENCES):
            return self._sum(node, value, others[0], -1.0 if rule in DIFFERENCES else 1.0)
        if rule in NOTHING:
            return value
        if reads_shape(node):
            return value.size(*others) if rule == "size" else rule(value, *others)
        if rule in (*PRODUCTS, *QUOTIENTS, *JOINS, *AVERAGING):
            if isinstance(rule, str):
                return getattr(value, rule)(*others, **kwargs)
            return module(value) if module is not None else rule(value, *others, **kwargs)
        name = getattr(rule, "__name__", rule)
        raise ModelError(
            f"No linear relaxation for {name}",
            where=f"{node.target}",
            cure="Take a network of linear and convolution layers, batch norm, ReLU and averages; or interval bounds.",
        )

    def _plus(self, value: Tensor, bias: Tensor | None, axis: int) -> Tensor:
        return value if bias is None else value + _along(bias, value, axis) * self._one(value)

    def _one(self, value: Tensor) -> Tensor:
        return self.one_B.view(-1, *[1] * (value.ndim - 1))

    def _sum(self, node: fx.Node, left: Any, right: Any, sign: float) -> Tensor:
        """Of two values, or of a value and a constant, which counts as many times as `one`."""
        is_value = [isinstance(part, fx.Node) and part.op != "get_attr" for part in node.args]
        like = left if is_value[0] else right
        left, right = (
            part if known else part * self._one(like)
            for part, known in zip((left, right), is_value, strict=True)
        )
        total: Tensor = left + sign * right
        return total


def _along(constant: Tensor, value: Tensor, axis: int) -> Tensor:
    shape = [1] * value.ndim
    shape[axis] = -1
    return constant.view(shape)
