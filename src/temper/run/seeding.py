"""Every generator a step may draw from, seeded from its seed and its id."""

from __future__ import annotations

import hashlib
import random
import sys

__all__ = ["seed_everything", "step_seed"]


def step_seed(seed: int, step_id: str) -> int:
    """A number below 2**32 that depends on the seed and the step's id only."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step_id}".encode()).digest()[:4], "big")


def seed_everything(seed: int, step_id: str) -> None:
    """Seed Python's, NumPy's and torch's global generators, the latter two where loaded."""
    value = step_seed(seed, step_id)
    random.seed(value)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(value)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(value)
