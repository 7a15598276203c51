"""A network's graph by torch.fx: one tensor in, one tensor out, with branches on the sizes of values decided."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from temper.core.errors import ModelError
from temper.ops.precision import eval_mode

__all__ = ["NetworkGraph", "read_graph", "reads_shape"]

SHAPES = ("size", getattr, operator.getitem)
"""What a network may read of its values' shapes."""
COMPARISONS = (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)


class NetworkGraph(NamedTuple):
    """Nodes that somebody reads, in order, the output last; and the modules they call, by their targets."""

    nodes: list[fx.Node]
    modules: dict[str, nn.Module]


def read_graph(network: nn.Module, shape: Sequence[int] | None = None) -> NetworkGraph:
    """The graph of a network that takes one tensor, or more with defaults, and returns one or an output with logits.

    `shape` is that of an input item; networks that ask for sizes before they go on need it. Raises ModelError for a
    network that cannot be read.
    """
    tracer = _Tracer(shape)
    takes_more = len(inspect.signature(network.forward).parameters) > 1
    try:
        graph = tracer.trace(_Logits(network) if takes_more else network)
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


class _Tracer(fx.Tracer):
    """Decides comparisons of sizes by running what was read so far on one item of zeros."""

    def __init__(self, shape: Sequence[int] | None) -> None:
        super().__init__()
        self.shape, self.values = shape, dict[fx.Node, Any]()

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Whether a comparison holds; refused for all that depends on values."""
        node = obj.node
        sources = node.all_input_nodes
        if self.shape is None or node.target not in COMPARISONS or not all(map(reads_shape, sources)):
            return bool(super().to_bool(obj))
        with eval_mode(self.root), torch.no_grad():
            for each in self.graph.nodes:
                if each not in self.values:
                    self.values[each] = self._value(each)
        return bool(self.values[node])

    def _value(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda used: self.values[used])
        target: Any = node.target
        if node.op == "placeholder":
            like = next(self.root.parameters(), torch.zeros(()))
            return like.new_zeros((1, *(self.shape or ())))
        if node.op == "get_attr":
            owner, _, name = target.rpartition(".")
            return getattr(self.root.get_submodule(owner), name)
        if node.op == "call_module":
            # Calling the module itself would be traced.
            return self.root.get_submodule(target).forward(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)
