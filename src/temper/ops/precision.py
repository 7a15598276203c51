"""How a forward pass is run: the precision decided in `Run` as torch's autocast, and the modules' modes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from temper.core.types import Run

__all__ = ["autocast", "eval_mode", "short_attention"]

SHORT_ROW = 192
"""Tokens up to which a CPU trains faster on plain attention than on its flash kernel."""


def autocast(run: Run) -> AbstractContextManager[object]:
    """bfloat16 autocast when the run asks for it; off in float32 and in exact mode, whatever surrounds it."""
    on = run.precision == "bf16" and not run.exact
    return torch.autocast(torch.device(run.device).type, dtype=torch.bfloat16, enabled=on)


def short_attention(device: str | torch.device, longest: int) -> AbstractContextManager[object]:
    """Plain attention for short rows on a CPU, where the flash kernel's backward pass costs three times as much."""
    if torch.device(device).type == "cpu" and longest <= SHORT_ROW:
        return sdpa_kernel([SDPBackend.MATH])
    return nullcontext()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Inference without dropout; afterwards every module has its own mode again, mixed ones too."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
