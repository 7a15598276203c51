"""Weights as the system maps them from a file: memory that can be let go at any time and is read again when touched."""

from __future__ import annotations

import ctypes
import mmap
import re
from functools import cached_property
from pathlib import Path

from torch import Tensor

__all__ = ["MappedFiles"]

HEADER = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+)")
"""Of a mapping in `/proc/self/smaps`: first and last address, the file's number, 0 for memory without a file."""
WRITTEN = ("Anonymous:", "Swap:")
"""Lines that count kilobytes of a mapping which are no longer the file's."""


class MappedFiles:
    """What this process maps of files and has not written to, as it stands when first asked; nothing off Linux."""

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """First address and the one behind the last, of each mapping."""
        try:
            lines = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return []
        found: list[tuple[int, int]] = []
        is_clean = False
        for line in lines:
            if header := HEADER.match(line):
                if is_clean := header[3] != "0":
                    found.append((int(header[1], 16), int(header[2], 16)))
            elif is_clean and line.startswith(WRITTEN) and line.split()[1] != "0":
                found.pop()
                is_clean = False
        return found

    def let_go(self, tensor: Tensor) -> bool:
        """Take the tensor's pages out of memory if they are a file's, unchanged; gives whether they were.

        Its values stay what they are: whoever reads it gets the pages again, from the system's cache of files.
        """
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            return False
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        if not any(start <= first and last <= stop for start, stop in self.spans):
            return False
        first, last = first // mmap.PAGESIZE * mmap.PAGESIZE, -(-last // mmap.PAGESIZE) * mmap.PAGESIZE
        advise = ctypes.CDLL(None).madvise
        return not advise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
