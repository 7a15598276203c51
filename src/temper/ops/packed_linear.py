"""Linear layers that multiply by weights laid out in blocks, for decoding on a CPU in float32.

A decoding step multiplies few rows by every weight of the model, and the default library lays the
weights out anew at each product. Laid out once by oneDNN the same product takes from 0.9 (64
rows) down to 0.45 (5 rows) of the time (one core, AVX-512), in float32 with float32 sums. Weights
that are mapped from a file leave memory when they are laid out, and come back when somebody reads
them; of others there are two copies while the block lasts, so larger models go without.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from temper.systems.mapped_files import MappedFiles

__all__ = ["packed_linears"]

MAX_BYTES = 1 << 30
"""Weights above this size are not copied."""
MIN_WEIGHTS = 1 << 14


@contextmanager
def packed_linears(model: nn.Module, num_rows: int, but: nn.Module | None = None) -> Iterator[int]:
    """Inside the block the model's linear layers, `but` one, use packed weights; gives how many do.

    Nothing is packed off the CPU, in other types than float32, or above `MAX_BYTES`. For inference
    only: packed products have no gradient. Hooks see what they always see.
    """
    chosen: list[Any] = [module for module in model.modules() if module is not but and _fits(module)]
    if not torch.backends.mkldnn.is_available() or sum(m.weight.nbytes for m in chosen) > MAX_BYTES:
        chosen = []
    files = MappedFiles()
    try:
        # All leave first: laid out one by one, no more than one is in memory twice.
        for module in chosen:
            files.let_go(module.weight)
        for module in chosen:
            module.forward = _packed_forward(module, num_rows)
            files.let_go(module.weight)
        yield len(chosen)
    finally:
        for module in chosen:
            module.__dict__.pop("forward", None)


def _fits(module: Any) -> bool:
    """Only plain linear layers, not subclasses with a forward pass of their own, nor ones already packed."""
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    weight = module.weight
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.layout == torch.strided
    return plain and weight.numel() >= MIN_WEIGHTS


def _packed_forward(module: nn.Linear, num_rows: int) -> Any:
    packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), num_rows)
    bias = None if module.bias is None else module.bias.detach()
    multiply = torch.ops.mkldnn._linear_pointwise

    def forward(input: Tensor) -> Tensor:
        if input.dtype != torch.float32 or input.numel() == 0:
            return nn.functional.linear(input, module.weight, module.bias)
        return multiply(input, packed, bias, "none", [], "")

    return forward
