"""How a model is to be loaded: the same for every kind of system, for folders and the hub."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from temper.systems.local import CPU

__all__ = ["Wanted"]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What `load_base` was told that does not depend on the kind."""

    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    attention: str = "sdpa"
    trust_remote_code: bool = False
    revision: str | None = None

    def common(self) -> dict[str, Any]:
        """What every `from_pretrained` is given."""
        return {"trust_remote_code": self.trust_remote_code, "revision": self.revision}
