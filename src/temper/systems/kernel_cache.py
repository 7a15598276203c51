"""How many prepared products are remembered: on a CPU each new shape leaves one behind, half a megabyte and more.

Rows read end to end have a new shape in almost every step, and by default the libraries below torch keep a thousand.
"""

from __future__ import annotations

import os
from functools import cache

__all__ = ["remember_few_products"]

KEPT = {"LRU_CACHE_CAPACITY": "128", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}
"""Environment variables of torch's bridge to oneDNN and of oneDNN. The layers of one step share some forty shapes."""


@cache
def remember_few_products() -> None:
    """Once a process, before its first product: the libraries read this when they begin. What the user has set stays."""
    for name, value in KEPT.items():
        os.environ.setdefault(name, value)
