"""What a plan will cost: memory, time and disk, guessed from sizes before anything is loaded."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from temper.core.errors import NeedsError
from temper.core.registry import load_card, load_method
from temper.core.types import Json, Message
from temper.run.inputs import wanted_parts
from temper.run.options import Options
from temper.run.plan import Plan, PlannedStep

__all__ = ["Cost", "check_cost", "count_parameters", "estimate", "free_memory"]

CHARS_A_TOKEN = 4.0
REPLY_TOKENS = 64
"""Tokens guessed for a reply where a method generates and says nothing of its length."""
EFFICIENCY = 0.4
"""Share of a plain matrix product's speed that a whole forward pass reaches."""
KNOWN_PARAMETERS = {"smollm2-135m": 134_515_008}
ADAPTER_SHARE = 0.04
FLOAT_BYTES = 4
LOAD_S = 2.0
"""Seconds guessed to load a model."""


class Cost(NamedTuple):
    """A guess; `parameters` is None where the base's size is not known, and then so are time and memory."""

    step: str
    label: str
    parameters: int | None
    tokens: int
    seconds: float | None
    memory_bytes: int | None
    disk_bytes: int


def estimate(plan: Plan) -> list[Cost]:
    """One cost for each different step, in the order they run."""
    return [_step_cost(step, plan.options) for step in plan.steps]


def _step_cost(step: PlannedStep, options: Options) -> Cost:
    parameters = count_parameters(step.system.base) if step.system else 0
    tokens = _tokens(step)
    speed = _flops_per_s(options.device, options.precision) * EFFICIENCY if parameters else math.inf
    said = _own_estimate(step, parameters, speed, options.device)
    tokens = int(said.get("tokens", tokens))
    seconds, memory = said.get("seconds"), said.get("memory_bytes")
    if parameters is not None:
        flops = (6 if step.verb == "fit" else 2) * parameters * tokens
        seconds = seconds if seconds is not None else flops / speed + (LOAD_S if parameters else 0)
        memory = memory if memory is not None else _memory(step, parameters)
    disk = int(said.get("disk_bytes", _disk(step, parameters or 0)))
    label = f"{step.id}: {step.verb} {step.method}"
    return Cost(step.name, label, parameters, tokens, seconds, memory, disk)


def _own_estimate(step: PlannedStep, parameters: int | None, speed: float, device: str) -> Mapping[str, Any]:
    """What the method's own `estimate(system_facts, data, config)` says, if it has one."""
    if "def estimate(" not in _source(step.method):
        return {}
    facts: dict[str, Json] = {"parameters": parameters, "flops_per_s": speed, "device": device}
    said = load_method(step.method).estimate(facts, step.loaded, step.config)
    return dict(said)


def _source(slug: str) -> str:
    from temper.core.registry import find

    path = find(slug).file("method.py")
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _tokens(step: PlannedStep) -> int:
    """Tokens that pass through the model: those of the data, once an epoch, and of the replies."""
    if step.loaded is None or step.system is None:
        return 0
    wanted = [name.removesuffix("?") for name in wanted_parts(load_card(step.method), step.verb)]
    records = [record for part in wanted for record in step.loaded.get(part)]
    chars = sum(
        _chars(value) for record in records for name, value in vars(record).items() if name != "extra"
    )
    epochs = float(getattr(step.config, "num_epochs", 1) or 1) if step.verb == "fit" else 1.0
    replies = len(records) * REPLY_TOKENS if "generate" in load_card(step.method).needs else 0
    return int(chars / CHARS_A_TOKEN * epochs) + replies


def _chars(value: Any) -> int:
    """Characters of the texts in a value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Message):
        return len(value.content)
    return sum(_chars(item) for item in value) if isinstance(value, tuple) else 0


def _memory(step: PlannedStep, parameters: int) -> int:
    """Weights; for a full fit also their gradients and two moments; and room for activations."""
    produces = load_card(step.method).produces
    copies = 4.0 if step.verb == "fit" and "weights" in produces and "adapter" not in produces else 1.3
    return int(parameters * FLOAT_BYTES * copies + 0.3e9) if parameters else 0


def _disk(step: PlannedStep, parameters: int) -> int:
    base = 1_000_000
    if step.verb != "fit":
        return base
    produces = load_card(step.method).produces
    if "weights" in produces and "adapter" not in produces:
        return base + parameters * FLOAT_BYTES * 4  # the weights, and a checkpoint with two moments
    return base + int(parameters * FLOAT_BYTES * ADAPTER_SHARE * 4)


def count_parameters(base: str) -> int | None:
    """How many weights a base has: from its files, a table, or its name; None when none of them says."""
    folder = Path(base)
    if folder.is_dir():
        return sum(_header_count(path) for path in folder.glob("*.safetensors")) or None
    if base.startswith("tiny:"):
        return 200_000
    if base.startswith("openai:"):
        return 0
    if base in KNOWN_PARAMETERS:
        return KNOWN_PARAMETERS[base]
    match = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)\s*([bm])(?![a-z])", base.lower().replace("_", "-"))
    return int(float(match[1]) * (1e9 if match[2] == "b" else 1e6)) if match else None


def _header_count(path: Path) -> int:
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, 100_000_000)))
    except (OSError, ValueError):
        return 0
    return sum(math.prod(entry["shape"]) for key, entry in header.items() if key != "__metadata__")


@cache
def _flops_per_s(device: str, precision: str) -> float:
    """Floating-point operations a second of a matrix product here, the best of sixteen."""
    import torch

    n = 512 if device == "cpu" else 4096
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.ones((n, n), dtype=dtype, device=device)
    best = math.inf
    for _ in range(16):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # reading a number waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def free_memory() -> int | None:
    """Bytes of memory that could be used now, or None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def check_cost(plan: Plan, costs: list[Cost]) -> None:
    """Raise NeedsError when the guess exceeds the memory or the disk that is free."""
    memory = max((cost.memory_bytes or 0 for cost in costs), default=0)
    free = free_memory()
    if plan.options.device == "cpu" and free is not None and memory > free:
        raise NeedsError(
            f"The run needs about {memory / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free",
            cure="Use a smaller system, or a method that trains an adapter.",
        )
    out = Path(plan.request.out).absolute()
    while not out.exists():
        out = out.parent
    disk, free_disk = sum(cost.disk_bytes for cost in costs), shutil.disk_usage(out).free
    if disk > free_disk:
        raise NeedsError(
            f"The run needs about {disk / 1e6:.0f} MB of disk and {free_disk / 1e6:.0f} MB are free",
            where=str(out),
            cure="Free some space or choose another folder with --out.",
        )
