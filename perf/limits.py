"""What the machine could do at most, measured now: matrix products at a small model's shapes, and memory bandwidth."""

from __future__ import annotations

import time
from functools import cache

__all__ = ["measure"]


@cache
def measure() -> dict[str, float]:
    """FLOP/s of bf16 and float32 products, (2048 x 576) by (576 x 1536) as in SmolLM2's MLP, and bytes/s of a copy."""
    import torch

    def rate(dtype: torch.dtype) -> float:
        left, right = torch.randn(2048, 576).to(dtype), torch.randn(1536, 576).to(dtype)
        return 2 * 2048 * 576 * 1536 / _fastest(lambda: torch.nn.functional.linear(left, right))

    block = torch.zeros(64 * 2**20)
    target = torch.empty_like(block)
    return {
        "flops_bf16": rate(torch.bfloat16),
        "flops_fp32": rate(torch.float32),
        "bytes": 2 * block.numel() * 4 / _fastest(lambda: target.copy_(block)),
    }


def _fastest(work: object, repeats: int = 15) -> float:
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        work()  # type: ignore[operator]
        best = min(best, time.perf_counter() - began)
    return best
