"""How many prepared products are remembered: on a CPU each new shape leaves one behind, half a megabyte and more.

Rows read end to end have a new shape in almost every step, and by default the libraries below torch keep a thousand.
"""

from __future__ import annotations

import os

__all__ = ["VARIABLES", "remember_products"]

VARIABLES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
"""Of torch's bridge to oneDNN and of oneDNN."""


def remember_products(num: int) -> None:
    """Limit both to `num` shapes, before this process's first product: they read it then. What is set already stays."""
    for name in VARIABLES:
        os.environ.setdefault(name, str(num))
