"""How fast this machine multiplies matrices, and what share of that models reach."""

from __future__ import annotations

import math
import time
from functools import cache

__all__ = ["DECODING", "READING", "STEPS_PER_S", "TRAINING", "flops_per_s"]

READING, TRAINING, DECODING = 0.5, 0.5, 0.15
"""Shares of a plain matrix product's speed: a forward pass, one with its backward pass, one token a row."""
STEPS_PER_S = 50.0
"""Decoding steps a second where arithmetic is no limit: what launching a model's layers costs."""
SHAPE = {"cpu": (128, 576, 1536), "accelerator": (4096, 4096, 4096)}
"""Rows, width in and width out of the product that is timed: a small model's layer, a large one's elsewhere."""
NUM_TRIES = 24
PARALLEL = 0.9
"""Share of a further thread that arrives in the result."""


@cache
def flops_per_s(device: str, precision: str) -> float:
    """Floating-point operations a second of a matrix product here.

    On a CPU one thread is timed and multiplied: with several, each product waits for the one that another program has
    just pushed aside, and a busy machine would look a hundred times slower than it is. The best of many short tries
    counts.
    """
    import torch

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    on_cpu = device == "cpu"
    num_rows, width_in, width_out = SHAPE["cpu" if on_cpu else "accelerator"]
    rows = torch.ones((num_rows, width_in), dtype=dtype, device=device)
    weight = torch.ones((width_out, width_in), dtype=dtype, device=device)
    num_threads = torch.get_num_threads()
    try:
        if on_cpu:
            torch.set_num_threads(1)
        best = min(_seconds(rows, weight) for _ in range(NUM_TRIES))
    finally:
        if on_cpu:
            torch.set_num_threads(num_threads)
    gain = 1 + PARALLEL * (num_threads - 1) if on_cpu else 1.0
    return 2.0 * math.prod((num_rows, width_in, width_out)) / best * gain


def _seconds(rows, weight) -> float:  # type: ignore[no-untyped-def]
    import torch

    start = time.perf_counter()
    product = torch.nn.functional.linear(rows, weight)
    if product.device.type != "cpu":
        product[0, 0].item()  # reading a number waits for the device
    return time.perf_counter() - start
