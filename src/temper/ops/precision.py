"""Where a run's precision becomes torch's autocast; decided once in `Run`, applied here."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from temper.core.types import Run

__all__ = ["autocast"]


def autocast(run: Run) -> AbstractContextManager[object]:
    """bfloat16 autocast when the run asks for it; off in float32 and in exact mode, whatever surrounds it."""
    on = run.precision == "bf16" and not run.exact
    return torch.autocast(torch.device(run.device).type, dtype=torch.bfloat16, enabled=on)
