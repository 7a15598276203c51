"""What stands with every row: enough to get the number again."""

from __future__ import annotations

import os
import platform
import sys
from functools import cache
from typing import Any

from temper.core.types import Json
from temper.run.code import code_hash, commit, version
from temper.run.options import Options
from temper.run.plan import PlannedStep

__all__ = ["environment", "step_facts"]


@cache
def environment() -> dict[str, Json]:
    """The machine and the versions of what computes on it."""
    import importlib.metadata

    versions: dict[str, Json] = {}
    for name in ("torch", "transformers", "peft", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        **versions,
    }


def step_facts(planned: PlannedStep, options: Options, system: Any, data_fingerprint: str) -> dict[str, Json]:
    """The facts of a step's rows, apart from time and the machine's name."""
    facts: dict[str, Json] = {
        "method": planned.method,
        "verb": planned.verb,
        "step": planned.id,
        "settings": planned.settings_hash,
        "step_hash": planned.hash,
        "seed": planned.seed,
        "data": data_fingerprint,
        "device": options.device,
        "precision": options.precision,
        "batch_tokens": options.batch_tokens,
        "exact": options.exact,
        "version": version(),
        "commit": commit(),
        "code": code_hash(planned.method),
        **planned.label,
    }
    if system is not None:
        facts["system"] = str(planned.system)
        facts["fingerprint"] = system.fingerprint
        facts["dtype"] = _dtype(system)
        facts["template_sha256"] = getattr(getattr(system, "chat", None), "sha256", "")
    if (torch := sys.modules.get("torch")) is not None:
        facts["torch"] = str(torch.__version__)
    return facts


def _dtype(system: Any) -> str:
    try:
        return str(next(iter(system.model.parameters())).dtype).removeprefix("torch.")
    except (AttributeError, StopIteration):
        return ""
