"""A model's layers working in bfloat16 for a while, their weights laid out once: inference on a CPU.

Autocast converts every weight again in every forward pass and runs norms in float32. Here linear layers multiply by
weights that oneDNN has laid out in blocks, embeddings give bfloat16, and norms take and give it, summing in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["bf16_modules"]

ROWS = 512
"""Rows that the layout of weights is chosen for."""


@contextmanager
def bf16_modules(model: nn.Module) -> Iterator[int]:
    """Inside the block linear layers, norms and embeddings compute in bfloat16; gives how many do. No gradient.

    Only plain modules with float32 weights on the CPU, and without a forward pass of their own. Hooks see what they
    always see, in bfloat16.
    """
    chosen = [(module, PLAIN[type(module)]) for module in model.modules() if _fits(module)]
    try:
        for module, build in chosen:
            module.forward = build(module)
        yield len(chosen)
    finally:
        for module, _ in chosen:
            module.__dict__.pop("forward", None)


def _fits(module: Any) -> bool:
    if type(module) not in PLAIN or "forward" in module.__dict__ or module.weight is None:
        return False
    return module.weight.device.type == "cpu" and module.weight.dtype == torch.float32


def _linear(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    weight = module.weight.detach().bfloat16()
    bias = None if module.bias is None else module.bias.detach().bfloat16()
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return lambda input: nn.functional.linear(input.bfloat16(), weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
    multiply = torch.ops.mkldnn._linear_pointwise
    return lambda input: multiply(input.bfloat16(), packed, bias, "none", [], "")


def _norm(module: nn.LayerNorm) -> Callable[[Tensor], Tensor]:
    weight = module.weight.detach().bfloat16()
    bias = None if module.bias is None else module.bias.detach().bfloat16()
    shape, eps = module.normalized_shape, module.eps
    return lambda input: nn.functional.layer_norm(input.bfloat16(), shape, weight, bias, eps)


def _embedding(module: nn.Embedding) -> Callable[[Tensor], Tensor]:
    return lambda input: nn.functional.embedding(input, module.weight.detach()).bfloat16()


PLAIN: dict[type[nn.Module], Callable[[Any], Callable[[Tensor], Tensor]]] = {
    nn.Linear: _linear,
    nn.LayerNorm: _norm,
    nn.Embedding: _embedding,
}
