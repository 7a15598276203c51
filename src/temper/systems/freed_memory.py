"""Freed memory stays in the process: on a CPU, fresh pages cost a training step more than some of its arithmetic."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

__all__ = ["all_memory_kept", "keep_freed_memory", "trim_heap"]

MMAP_MAX, MMAP_THRESHOLD, TRIM_THRESHOLD = -4, -3, -1
"""Parameters of glibc's mallopt."""
LARGEST_KEPT, MOST_KEPT = 32 << 20, 256 << 20
"""Bytes. Blocks above the first, the most that glibc takes, go back at once, and so does what lies idle above the second
at the heap's end: without both bounds the demo's peak was 4.4 GB, with them 3.8 GB.
"""
MANY, NEVER = 65536, -1
"""glibc's own number of blocks that are mapped on their own; no trimming."""
USERS_OWN = (
    "GLIBC_TUNABLES",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "LD_PRELOAD",
)


@cache
def keep_freed_memory() -> bool:
    """Tell glibc's allocator, once a process; gives whether it did.

    Blocks are reused instead of being handed back and asked for again. Does nothing with another allocator, or where
    the environment already says how memory is kept.
    """
    if any(os.environ.get(name) for name in USERS_OWN):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(MMAP_THRESHOLD, LARGEST_KEPT)) and bool(mallopt(TRIM_THRESHOLD, MOST_KEPT))


@contextmanager
def all_memory_kept() -> Iterator[None]:
    """Inside, every block is kept, whatever its size: steps that ask for the same again and again. Then idle memory goes back."""
    if not keep_freed_memory():
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, NEVER)
    try:
        yield
    finally:
        libc.mallopt(MMAP_MAX, MANY)
        libc.mallopt(TRIM_THRESHOLD, MOST_KEPT)
        trim_heap()


def trim_heap() -> None:
    """Give idle memory back to the system, where glibc manages it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
