"""Where and how a run computes: device, precision, exactness, processes. Decided once, here."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from temper.core.errors import ConfigError, NeedsError
from temper.core.types import Json

__all__ = ["Options", "resolve_options"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a run computes; every field is part of a step's hash."""

    device: str = "cpu"
    precision: str = "float32"
    exact: bool = False
    batch_tokens: int = 4096
    checkpoint_every: int = 50
    system_prompt: str = "default"
    base_url: str | None = None
    num_procs: int = 1

    def __post_init__(self) -> None:
        if self.precision not in ("float32", "bf16"):
            raise ConfigError(f"precision {self.precision!r} is unknown", cure="Use float32 or bf16.")
        if self.exact and (self.precision != "float32" or self.device != "cpu"):
            raise ConfigError("exact needs float32 on the CPU", cure="Add --precision float32 --device cpu.")
        if self.batch_tokens < 1 or self.num_procs < 1 or self.checkpoint_every < 0:
            raise ConfigError("batch_tokens and nproc are at least 1, checkpoint_every at least 0")

    def hashed(self) -> dict[str, Json]:
        """What can change a number; how often a checkpoint is written cannot."""
        values = dataclasses.asdict(self)
        del values["checkpoint_every"]
        return values


def resolve_options(recipe: Mapping[str, Json], given: Mapping[str, Json]) -> Options:
    """Defaults < recipe's `options` < command line; raises ConfigError and NeedsError."""
    values = {**recipe, **{k: v for k, v in given.items() if v is not None}}
    values["device"] = _device(str(values.get("device") or "auto"))
    if values.get("precision") == "auto":
        values["precision"] = "float32" if values["device"] == "cpu" else "bf16"
    return Options(**values)


def _device(name: str) -> str:
    if name == "auto":
        # torch costs a second to import; without a driver's device file there is nothing to ask it.
        return "cuda" if Path("/dev/nvidiactl").exists() and _has_cuda() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:[0-9]+)?", name):
        raise ConfigError(f"Device {name!r} is unknown", cure="Use cpu, cuda, cuda:N or mps.")
    if name.startswith("cuda") and not _has_cuda():
        raise NeedsError(f"Device {name!r} is not there", cure="Use --device cpu, or a CUDA build of torch.")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return name


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
