"""Interval bounds of a whole network: its graph read once by torch.fx, then every layer's rule on a box.

Networks may branch and join (sums, concatenation), so residual ones work as written, and normalise their own inputs
(arithmetic with numbers and buffers). A layer without a rule is refused by name. Where batch norm uses the statistics of
the batch, a clean copy of the batch runs alongside and gives them.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from temper.core.errors import DataError, ModelError
from temper.ops.bounds import (
    Box,
    Inputs,
    add_boxes,
    affine_box,
    clean_statistics,
    margin_bounds,
    monotone_box,
    rectify_box,
)
from temper.ops.network_graph import read_graph, reads_shape

__all__ = [
    "ACTIVATIONS", "AFFINE", "AVERAGING", "DIFFERENCES", "JOINS", "NORMS", "NOTHING", "PRODUCTS", "QUOTIENTS", "RECTIFIERS",
    "SUMS", "BoundedNetwork", "Bounds",
]  # fmt: skip

AFFINE = (nn.Linear, nn.Conv2d)
FUNCTIONAL = (F.linear, F.conv2d)
"""The same with weights of the network as arguments."""
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
RECTIFIERS = (nn.ReLU, F.relu, torch.relu, "relu")
RISING = (
    nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.ReLU6, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.LogSigmoid,
    nn.Hardsigmoid, nn.Softsign, F.leaky_relu, F.relu6, F.elu, F.softplus, F.sigmoid, F.tanh, torch.sigmoid, torch.tanh,
    "sigmoid", "tanh",
)  # fmt: skip
"""Activations that never fall; those with a slope are checked for its sign."""
ACTIVATIONS = (*RECTIFIERS, *RISING)
POOLING = (nn.MaxPool2d, nn.AdaptiveMaxPool2d, F.max_pool2d, F.adaptive_max_pool2d)
AVERAGING = (
    nn.Flatten, nn.ZeroPad2d, F.pad, nn.AvgPool2d, nn.AdaptiveAvgPool2d, torch.flatten, F.avg_pool2d, F.adaptive_avg_pool2d,
    torch.mean, "mean", "flatten", "view", "reshape", "contiguous",
)  # fmt: skip
"""Linear maps with no negative weight: the same on centre and radius."""
NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, F.dropout, F.dropout1d, F.dropout2d)
"""Dropout is off while bounds are computed."""
SUMS = (operator.add, operator.iadd, torch.add, "add")
DIFFERENCES = (operator.sub, operator.isub, torch.sub, "sub")
PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul")
QUOTIENTS = (operator.truediv, operator.itruediv, torch.div, "div")
ARITHMETIC = (*SUMS, *DIFFERENCES, *PRODUCTS, *QUOTIENTS)
JOINS = (torch.cat, torch.concat)
RULES = (*AFFINE, *FUNCTIONAL, *NORMS, *ACTIVATIONS, *POOLING, *AVERAGING, *NOTHING, *ARITHMETIC, *JOINS)
IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)


class Bounds(NamedTuple):
    """What a walk gives."""

    output: Box
    """Of the network's output; with labels, of the last linear layer's input instead."""
    margins: Tensor | None
    """Lower bounds of z_y - z_j, (B, C), 0 for j = y; where labels were given."""
    hidden: tuple[Box, ...]
    """Boxes that enter an activation, in order; where they were asked for."""
    clean: Tensor | None
    """The network's output for the clean inputs; where it was asked for."""
    norms: Mapping[fx.Node, tuple[Tensor, Tensor]]
    """Scale and shift by channel that each batch norm was."""


class BoundedNetwork:
    """A network whose output can be bounded; it shares the network's weights and reads its modes at every call."""

    def __init__(self, network: nn.Module, shape: Sequence[int] | None = None) -> None:
        """Read the graph; `shape` is that of an input item, for networks that ask for sizes.

        Raises ModelError for a graph that cannot be read, and for a layer without a rule, by name.
        """
        self.network = network
        self.nodes, modules = read_graph(network, shape)
        self.modules: dict[str, Any] = modules
        for node in self.nodes:
            self._require_rule(node)

    def bounds(
        self, inputs: Inputs, labels_B: Tensor | None = None, *, hidden: bool = False, clean: bool = False
    ) -> Bounds:
        """Boxes of the output, or margins of the labels' logits through the last layer; never in reduced precision.

        `hidden` keeps the boxes that enter activations, for regularisers; `clean` also gives the clean output. In
        training mode batch norm takes the clean batch's statistics, moves its running ones, and passes gradients on
        through both; in eval mode it uses the running ones.
        """
        with torch.autocast(inputs.clean.device.type, enabled=False):
            return _Walk(self, hidden, self._clean_nodes(clean)).run(inputs, labels_B)

    def module(self, node: fx.Node) -> Any:
        """The module that a node calls, if it calls one."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def constant(self, node: fx.Node) -> Tensor:
        """The parameter or buffer that a node reads."""
        owner, _, name = str(node.target).rpartition(".")
        value: Tensor = getattr(self.modules[owner], name)
        return value

    def rule(self, node: fx.Node) -> Any:
        """What the rules know a node by: its module's class, its function, or its method's name."""
        return type(self.module(node)) if node.op == "call_module" else node.target

    def uses_batch(self, node: fx.Node) -> bool:
        """Whether a node is batch norm by the statistics of the batch."""
        return self.rule(node) in NORMS and (
            self.module(node).training or self.module(node).running_mean is None
        )

    def _clean_nodes(self, everything: bool) -> set[fx.Node]:
        """Nodes whose clean value somebody needs: all, or those that lead to batch statistics."""
        wanted = set(self.nodes) if everything else set()
        for node in reversed(self.nodes):
            if node in wanted or self.uses_batch(node):
                wanted.update(node.all_input_nodes)
        return wanted

    def _require_rule(self, node: fx.Node) -> None:
        if node.op in ("placeholder", "output", "get_attr") or reads_shape(node):
            return
        rule, module = self.rule(node), self.module(node)
        name = _name(rule)
        where = (
            f"{name} {node.target}"
            if node.op == "call_module"
            else f"{name} in {type(self.network).__name__}"
        )
        if rule not in RULES:
            known = ", ".join(sorted({_name(one) for one in RULES}))
            raise ModelError(f"No bound rule for {name}", where=where, cure=f"There are rules for {known}.")
        trouble = _trouble(node, rule, module)
        if trouble:
            raise ModelError(f"No bound rule for {name} here: {trouble}", where=where)


def _name(rule: Any) -> str:
    return str(getattr(rule, "__name__", rule))


def _trouble(node: fx.Node, rule: Any, module: Any) -> str:
    """Why a known layer has no rule as it is used here; empty if it has."""
    if rule in ARITHMETIC:
        return _trouble_of_arithmetic(node, rule)
    if not node.args or not node.all_input_nodes:
        return "its input is not its first argument"
    changes = getattr(module, "inplace", False) or node.kwargs.get("inplace", False)
    if changes and _is_needed(node.all_input_nodes[0]):
        return "it changes a value in place that is used again"
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return f"padding_mode is {module.padding_mode!r}, only zeros are supported"
    if getattr(module, "return_indices", False) or node.kwargs.get("return_indices", False):
        return "it returns indices"
    others = [part for part in (*node.args[1:], *node.kwargs.values()) if isinstance(part, fx.Node)]
    if rule in FUNCTIONAL and any(part.op != "get_attr" for part in others):
        return "its weights are values of the network"
    if rule is F.pad and (node.kwargs.get("value") or any(node.args[3:])):
        return "it pads with another value than 0"
    if rule in RISING:
        given = [getattr(module, name, 0.0) for name in ("negative_slope", "alpha", "beta")]
        if node.op == "call_function":
            given += [
                part for part in (*node.args[1:], *node.kwargs.values()) if isinstance(part, (int, float))
            ]
        return "its slope is negative" if min(given) < 0 else ""
    return ""


def _trouble_of_arithmetic(node: fx.Node, rule: Any) -> str:
    if node.kwargs or len(node.args) != 2:
        return "it has further arguments"
    if not all(isinstance(part, (int, float, fx.Node)) for part in node.args):
        return "one side is no value of the network, number or buffer"
    if rule in IN_PLACE and _is_needed(node.all_input_nodes[0]):
        return "it changes a value in place that is used again"
    values = [isinstance(part, fx.Node) and part.op != "get_attr" for part in node.args]
    if rule in QUOTIENTS and values[1]:
        return "it divides by a value of the network"
    if rule in PRODUCTS and all(values):
        return "both sides are values of the network"
    return ""


def _is_needed(node: fx.Node) -> bool:
    """Whether overwriting this node's value would change what somebody else reads."""
    return len(node.users) > 1 or node.op in ("placeholder", "get_attr")


class _Walk:
    """One pass over the graph: the box of every node, and the clean value of those in `clean_nodes`."""

    def __init__(self, net: BoundedNetwork, keeps_hidden: bool, clean_nodes: set[fx.Node]) -> None:
        self.net, self.keeps_hidden, self.clean_nodes = net, keeps_hidden, clean_nodes
        self.boxes: dict[fx.Node, Any] = {}
        self.clean: dict[fx.Node, Any] = {}
        self.hidden: list[Box] = []
        self.norms: dict[fx.Node, tuple[Tensor, Tensor]] = {}

    def run(self, inputs: Inputs, labels_B: Tensor | None) -> Bounds:
        output = self.net.nodes[-1].args[0]
        if not isinstance(output, fx.Node):
            raise ModelError("A network with several outputs has no bounds here", cure="Return one tensor.")
        last = None if labels_B is None else self._require_linear(output)
        for node in self.net.nodes[:-1]:
            if node.op == "placeholder":
                self.boxes[node], self.clean[node] = inputs.box, inputs.clean
                continue
            if node.op == "get_attr":
                self.boxes[node] = self.clean[node] = self.net.constant(node)
                continue
            scale_shift = self._norm(node) if self.net.rule(node) in NORMS else None
            self.norms |= {node: scale_shift} if scale_shift else {}
            if scale_shift is None and node in self.clean_nodes:
                self.clean[node] = self._clean_value(node)
            if node is not last and not self._is_folded(node):
                self.boxes[node] = self._box(node, scale_shift)
        kept, clean = tuple(self.hidden), self.clean.get(output)
        if last is None or labels_B is None:
            return Bounds(self.boxes[output], None, kept, clean, self.norms)
        before, linear = self.boxes[last.all_input_nodes[0]], self.net.module(last)
        _require_width(linear, before.centre, last)
        margins_BC = margin_bounds(before, linear.weight, linear.bias, labels_B)
        return Bounds(before, margins_BC, kept, clean, self.norms)

    def _require_linear(self, output: fx.Node) -> fx.Node:
        if self.net.rule(output) is not nn.Linear:
            raise ModelError(
                "Margins need a network that ends in a linear layer",
                where=f"it ends in {_name(self.net.rule(output))}",
            )
        return output

    def _is_folded(self, node: fx.Node) -> bool:
        """Whether batch norm alone reads this affine layer, and takes it into its own affine map."""
        if self.net.rule(node) not in AFFINE or [self.net.rule(user) in NORMS for user in node.users] != [
            True
        ]:
            return False
        return self.net.rule(node) is nn.Conv2d or self.boxes[node.all_input_nodes[0]].centre.ndim == 2

    def _is_fresh(self, node: fx.Node) -> bool:
        """Whether a node's value is memory of its own that one activation reads and nobody else."""
        return self.net.rule(node) in (*AFFINE, *NORMS) and len(node.users) == 1 and not self.keeps_hidden

    def _clean_value(self, node: fx.Node) -> Any:
        args, kwargs = _arguments(node, self.clean)
        rule = self.net.rule(node)
        if rule in NOTHING:
            return args[0]
        if rule in AFFINE:
            _require_width(self.net.module(node), args[0], node)
        if (
            rule in RECTIFIERS
            and self.net.uses_batch(node.all_input_nodes[0])
            and self._is_fresh(node.all_input_nodes[0])
        ):
            return args[0].relu_()
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        call: Any = self.net.module(node) if node.op == "call_module" else node.target
        return call(*args, **kwargs)

    def _norm(self, node: fx.Node) -> tuple[Tensor, Tensor]:
        """Scale and shift by channel of batch norm, (C channels) each; sets the node's clean value where needed."""
        norm, used = self.net.module(node), node.all_input_nodes[0]
        if self.net.uses_batch(node):
            found = clean_statistics(self.clean[used], norm)
            self.clean[node] = found.normed
            return found.scale, found.shift
        if node in self.clean_nodes:
            self.clean[node] = norm(self.clean[used])
        scale_C = torch.rsqrt(norm.running_var + norm.eps)
        scale_C = scale_C if norm.weight is None else scale_C * norm.weight
        shift_C = -norm.running_mean * scale_C
        return scale_C, shift_C if norm.bias is None else shift_C + norm.bias

    def _box(self, node: fx.Node, scale_shift: tuple[Tensor, Tensor] | None) -> Any:
        rule, module = self.net.rule(node), self.net.module(node)
        if scale_shift is not None:
            return self._normed_box(node, *scale_shift)
        (box, *others), kwargs = _arguments(node, self.boxes)
        if rule in JOINS:
            return Box(*(rule([part[side] for part in box], *others, **kwargs) for side in (0, 1)))
        if rule in AFFINE:
            return _affine(module, box, node, module.weight, module.bias)
        if rule in (*FUNCTIONAL, *ARITHMETIC):
            return (_functional if rule in FUNCTIONAL else _combine)(rule, box, *others, **kwargs)
        if rule in NOTHING:
            return box
        if reads_shape(node):
            source = box.centre if isinstance(box, Box) else box
            return source.size(*others) if rule == "size" else rule(source, *others)

        def call(part: Tensor) -> Tensor:
            if isinstance(rule, str):
                return getattr(part, rule)(*others, **kwargs)
            return module(part) if module is not None else rule(part, *others, **kwargs)

        if rule in AVERAGING:
            return Box(call(box.centre), call(box.radius))
        if rule in POOLING:
            return monotone_box(box, call)
        self.hidden += [box] if self.keeps_hidden else []
        if rule in RECTIFIERS:
            return rectify_box(box, in_place=self._is_fresh(node.all_input_nodes[0]))
        return monotone_box(box, call)

    def _normed_box(self, node: fx.Node, scale_C: Tensor, shift_C: Tensor) -> Box:
        """Batch norm as the affine map it is, folded into the layer before it where nobody else reads that one."""
        used = node.all_input_nodes[0]
        if self._is_folded(used):
            layer, source = self.net.module(used), self.boxes[used.all_input_nodes[0]]
            weight = layer.weight * scale_C.view(-1, *[1] * (layer.weight.ndim - 1))
            bias_C = shift_C if layer.bias is None else torch.addcmul(shift_C, layer.bias, scale_C)
            return _affine(layer, source, used, weight, bias_C)
        box = self.boxes[used]
        shape = (1, -1, *[1] * (box.centre.ndim - 2))
        scale, shift = scale_C.view(shape), shift_C.view(shape)
        return Box(torch.addcmul(shift, box.centre, scale), box.radius * scale.abs())


def _arguments(node: fx.Node, values: dict[fx.Node, Any]) -> tuple[Any, dict[str, Any]]:
    """What a node is called with, the values of other nodes filled in."""
    filled: Any = fx.node.map_arg((node.args, node.kwargs), lambda used: values[used])
    return filled


def _functional(
    rule: Any, box: Box, weight: Tensor, bias: Tensor | None = None, *rest: Any, **kwargs: Any
) -> Box:
    return affine_box(box, lambda x, w, b: rule(x, w, b, *rest, **kwargs), weight, bias)


def _combine(rule: Any, left: Any, right: Any) -> Box:
    """Sum, difference, product or quotient of two values, of which at least one is a box."""
    if rule in DIFFERENCES:
        right = Box(-right.centre, right.radius) if isinstance(right, Box) else -right
    if rule in (*SUMS, *DIFFERENCES):
        if isinstance(left, Box) and isinstance(right, Box):
            return add_boxes(left, right)
        box, constant = (left, right) if isinstance(left, Box) else (right, left)
        centre = box.centre + constant
        return Box(centre, box.radius.expand_as(centre))
    box, factor = (left, right) if isinstance(left, Box) else (right, left)
    factor = 1 / factor if rule in QUOTIENTS else factor
    return Box(box.centre * factor, box.radius * abs(factor))


def _affine(layer: Any, box: Box, node: fx.Node, weight: Tensor, bias: Tensor | None) -> Box:
    _require_width(layer, box.centre, node)
    if isinstance(layer, nn.Linear):
        return affine_box(box, F.linear, weight, bias)

    def convolve(part: Tensor, kernel: Tensor, offset: Tensor | None) -> Tensor:
        if kernel.shape[1] == 1:
            # Elementwise work forgets which layout one channel was in; centre and radius must come out in the same.
            kernel = kernel.as_strided(kernel.shape, layer.weight.stride())
        return F.conv2d(part, kernel, offset, layer.stride, layer.padding, layer.dilation, layer.groups)

    return affine_box(box, convolve, weight, bias)


def _require_width(layer: Any, value: Tensor, node: fx.Node) -> None:
    is_linear = isinstance(layer, nn.Linear)
    given, wanted = (value.shape[-1], layer.in_features) if is_linear else (value.shape[1], layer.in_channels)
    if given != wanted:
        raise DataError(
            f"The input of layer {node.target} has {given} channels, not {wanted}",
            where=f"{type(layer).__name__}, input of shape {tuple(value.shape)}",
            cure="Pass inputs of the shape the network was built for, (B, channels, ...).",
        )
