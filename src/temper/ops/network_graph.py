"""A network's graph by torch.fx: one tensor in, one tensor out; sizes of values are numbers, but for the batch's."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from temper.core.errors import ModelError

__all__ = ["NetworkGraph", "read_graph", "reads_shape"]

SHAPES = ("size", getattr, operator.getitem)
"""What a network may read of its values' shapes."""


class NetworkGraph(NamedTuple):
    """Nodes that somebody reads, in order, the output last; and the modules they call, by their targets."""

    nodes: list[fx.Node]
    modules: dict[str, nn.Module]


def read_graph(network: nn.Module, shape: Sequence[int] | None = None) -> NetworkGraph:
    """The graph of a network that takes one tensor, or more with defaults, and returns one or an output with logits.

    `shape` is that of an input item; networks that compute with sizes, or ask for them before they go on, need it.
    Raises ModelError for a network that cannot be read.
    """
    takes_more = len(inspect.signature(network.forward).parameters) > 1
    root = _Logits(network) if takes_more else network
    tracer = _Tracer(root, shape)
    try:
        graph = tracer.trace(root)
    except (fx.proxy.TraceError, TypeError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(
            f"The graph of {type(network).__name__} cannot be read: {error}",
            where="torch.fx",
            cure="Write its forward pass without branches and loops that depend on values.",
        ) from None
    nodes = [node for node in graph.nodes if node.users or node.op == "output"]
    return NetworkGraph(nodes, dict(tracer.root.named_modules(remove_duplicate=False)))


def reads_shape(node: fx.Node) -> bool:
    """Whether a node's value is a size, or sizes, of another's."""
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target is getattr:
        return node.args[1] == "shape"
    source = node.args[0] if node.args else None
    is_part = node.target is operator.getitem and isinstance(source, fx.Node) and source.target in SHAPES
    return node.target == "size" or is_part


class _Logits(nn.Module):
    """A network whose further arguments keep their defaults and whose output, if a mapping, is its logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Any:
        out = self.network(inputs)
        return out["logits"] if isinstance(out, dict) else out


class _Sized(fx.Proxy):
    """A value whose sizes are known, all but the first, which is the batch's and stays part of the graph."""

    tracer: _Tracer

    @property
    def shape(self) -> Any:
        """Sizes; a value that is no tensor has none."""
        value = self.tracer.value_of(self.node)
        batch: Any = fx.proxy.Attribute(self, "shape")
        return (batch[0], *value.shape[1:]) if isinstance(value, Tensor) and value.ndim else batch

    def size(self, dim: int | None = None) -> Any:
        """The same, or one of them."""
        return self.shape if dim is None else self.shape[dim]


class _Tracer(fx.Tracer):
    """Knows the sizes of values by running what was read so far on a copy of the network without content."""

    def __init__(self, root: nn.Module, shape: Sequence[int] | None) -> None:
        super().__init__()
        self.shape, self.values = shape, dict[fx.Node, Any]()
        # Of the network itself, modules in the middle of tracing give stand-ins for weights.
        self.twin = root if shape is None else copy.deepcopy(root).to("meta").eval()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """What stands for a node's value while the network is read."""
        return super().proxy(node) if self.shape is None else _Sized(node, self)

    @torch.no_grad()
    def value_of(self, node: fx.Node) -> Any:
        """A node's value for one item, of which only sizes are real."""
        for each in self.graph.nodes:
            if each not in self.values:
                self.values[each] = self._value(each)
        return self.values[node]

    def _value(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda used: self.values[used])
        target: Any = node.target
        if node.op == "placeholder":
            return torch.empty((1, *(self.shape or ())), device="meta")
        if node.op == "get_attr":
            owner, _, name = target.rpartition(".")
            return getattr(self.twin.get_submodule(owner), name)
        if node.op == "call_module":
            # Calling the module itself would be traced.
            return self.twin.get_submodule(target).forward(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)
