"""First weights: those of the paper, under which boxes keep their size, or torch's own, from a seed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx, nn

from temper.ops.network_bounds import ACTIVATIONS, AFFINE, SUMS, BoundedNetwork

__all__ = ["draw_weights", "fed_by_sums", "ibp_std"]


def ibp_std(num_inputs: int) -> float:
    """Standard deviation under which a ReLU layer of `num_inputs` inputs keeps the expected radius (Eq. 5)."""
    return math.sqrt(2 * math.pi) / num_inputs


@torch.no_grad()
def draw_weights(bounded: BoundedNetwork, how: str, seed: int) -> None:
    """Draw new weights in place; "default" all of torch's own, "ibp" then those of every affine layer but the last.

    Biases and batch norms get torch's own in either case; "keep" changes nothing.
    """
    if how == "keep":
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in bounded.network.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
        if how == "ibp":
            _draw_ibp(bounded)


def _draw_ibp(bounded: BoundedNetwork) -> None:
    halved = fed_by_sums(bounded)
    # Departure 3: the last layer is the one that the output comes from.
    last = bounded.module(bounded.nodes[-1].all_input_nodes[0])
    for module in dict.fromkeys(_affine_modules(bounded).values()):
        if module is not last:
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=ibp_std(fan_in) / (2 if module in halved else 1))


def fed_by_sums(bounded: BoundedNetwork) -> set[nn.Module]:
    """Affine modules whose input is a sum of two branches, as it is or through activations."""
    return {
        module
        for node, module in _affine_modules(bounded).items()
        if _is_sum(bounded, node.all_input_nodes[0])
    }


def _affine_modules(bounded: BoundedNetwork) -> dict[fx.Node, Any]:
    return {node: bounded.module(node) for node in bounded.nodes if bounded.rule(node) in AFFINE}


def _is_sum(bounded: BoundedNetwork, node: fx.Node) -> bool:
    while bounded.rule(node) in ACTIVATIONS:
        node = node.all_input_nodes[0]
    branches = [used for used in node.all_input_nodes if used.op != "get_attr"]
    return bounded.rule(node) in SUMS and len(branches) == 2
