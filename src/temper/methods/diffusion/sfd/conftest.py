"""What the tests begin with: a tiny model of pictures and settings of few steps."""

from __future__ import annotations

from typing import Any

from temper.data.schemas import Data
from temper.systems.diffusion import Diffusion, load_diffusion
from temper.systems.wanted import Wanted

QUICK: dict[str, Any] = {
    "num_steps": 2,
    "batch_rows": 4,
    "lr": 1e-3,
    "fake_lr": 1e-3,
    "ema": 0.0,
    "bank_rows": 4,
}
EMPTY = Data({})


def tiny() -> Diffusion:
    return load_diffusion("tiny:unet", Wanted())
