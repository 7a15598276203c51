"""Memory: what is free on a device, and whether a model's weights fit, counted from their files' headers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from temper.core.errors import ModelError, NeedsError
from temper.systems.wanted import Wanted

__all__ = ["available_bytes", "check_memory", "header_count"]

HEADROOM = 1.15
"""Memory needed over the bare weights while loading and for a first forward pass."""


def available_bytes(device: torch.device) -> int | None:
    """Free memory of a device, within the limit of a container; None when it cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    free = [size for size in (_free_memory(), _free_in_group()) if size is not None]
    return min(free) if free else None


def header_count(path: Path) -> int:
    """Number of weights in a safetensors file; raises ModelError for a broken one."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 0 < size <= path.stat().st_size:
            raise ModelError("The weights file is broken", where=str(path), cure="Copy or download it again.")
        header = json.loads(file.read(size))
    return sum(math.prod(entry["shape"]) for key, entry in header.items() if key != "__metadata__")


def check_memory(num_weights: int | None, name: str, wanted: Wanted) -> None:
    """Raise NeedsError when so many weights do not fit; None is not checked."""
    free = available_bytes(wanted.device)
    if num_weights is None or free is None:
        return
    need = int(num_weights * wanted.dtype.itemsize * HEADROOM)
    if need > free:
        raise NeedsError(
            f"{name} needs about {need / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free",
            where=f"{num_weights / 1e6:.0f} M weights as {wanted.dtype} on {wanted.device}",
            cure="Use dtype bf16, a smaller model, or a machine with more memory.",
        )


def _free_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = {line.split(":")[0]: line.split()[1] for line in lines if ":" in line}
    return int(sizes["MemAvailable"]) * 1024 if "MemAvailable" in sizes else None


def _free_in_group(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container's memory limit leaves; its page cache counts as free."""
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    return max(0, int(limit) - used + int(stat.get("inactive_file", 0)))
