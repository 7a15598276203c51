"""How a forward pass is run: the precision decided in `Run` as torch's autocast, and the modules' modes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from temper.core.types import Run

__all__ = ["autocast", "eval_mode", "float32_products", "short_attention"]

SHORT_ROW = 192
"""Tokens up to which a CPU trains faster on plain attention than on its flash kernel."""
ROUNDING = 1e-5
"""Largest error of a product of standard normal factors, over the square root of their number: float32 leaves 1e-6, bf16 1e-2."""


@contextmanager
def autocast(run: Run) -> Iterator[None]:
    """bfloat16 autocast when the run asks for it; off in float32 and in exact mode, whatever surrounds it."""
    on = run.precision == "bf16" and not run.exact
    with torch.autocast(torch.device(run.device).type, dtype=torch.bfloat16, enabled=on):
        yield


@contextmanager
def float32_products(run: Run) -> Iterator[None]:
    """On a CPU, float32 products by oneDNN where that is float32 in its results; by the default library in exact mode.

    oneDNN is asked by allowing it bf16. Without matrix units it does not make use of that, and is faster: the
    vocabulary's product by two to three times, others by a quarter. For steps that train or search: decoding, whose
    shapes change with every token, was a fifth slower and 400 MB larger.
    """
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16" if not run.exact and _onednn_keeps_float32() else "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


@cache
def _onednn_keeps_float32() -> bool:
    """Whether products do not round when they are allowed to; a processor with bf16 matrix units does."""
    if not torch.backends.mkldnn.is_available():
        return False
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, generator = settings.fp32_precision, torch.Generator().manual_seed(0)
    one, two = torch.randn(256, 512, generator=generator), torch.randn(512, 256, generator=generator)
    settings.fp32_precision = "bf16"
    try:
        gap = (one @ two).double() - one.double() @ two.double()
    finally:
        settings.fp32_precision = before
    return float(gap.abs().max()) < ROUNDING * float(gap.new_tensor(one.shape[1]).sqrt())


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
