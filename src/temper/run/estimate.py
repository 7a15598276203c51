"""What a plan will cost: memory, time and disk, guessed from sizes before anything is loaded."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from temper.core.errors import NeedsError
from temper.core.registry import load_card, load_method
from temper.core.types import Json
from temper.run.options import Options
from temper.run.plan import Plan, PlannedStep
from temper.run.speed import DECODING, READING, STEPS_PER_S, TRAINING, flops_per_s
from temper.run.workload import Work, work_of

__all__ = ["Cost", "check_cost", "count_parameters", "estimate", "free_memory"]

KNOWN_PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "minilm": 22_713_216,
    "efficientnet-lite0": 4_652_008,
    "world:clip": 1_100_000,
    "world:attributes": 80_000,
    "world:classes": 620_979,
    "world:diffusion": 1_106_899,
}
ADAPTER_SHARE = 0.04
FLOAT_BYTES = 4
LIBRARY_BYTES = 0.6e9
"""A process that has torch and transformers loaded."""
ACTIVATION_BYTES = 50
"""Bytes a token in training, times the root of the number of weights (width times layers grows about so)."""
LOAD_S = 2.0
"""Seconds guessed to load a model."""


class Cost(NamedTuple):
    """A guess; `parameters` is None where the base's size is not known, and then so are time and memory.

    Time is not known either for a step whose data an earlier step has yet to make.
    """

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
    work = work_of(step)
    peak = flops_per_s(options.device, options.precision) if parameters else math.inf
    said = _own_estimate(step, parameters, peak * READING, options.device)
    if "tokens" in said:
        said_tokens = int(said["tokens"])
        work = Work(said_tokens, 0, 0, 0) if step.verb == "fit" else Work(0, said_tokens, 0, 0)
    seconds, memory = said.get("seconds"), said.get("memory_bytes")
    if parameters is not None:
        if seconds is None and not (parameters and step.loaded is None and "tokens" not in said):
            seconds = _seconds(step, work, parameters, peak, options)
        memory = memory if memory is not None else _memory(step, parameters, options)
    disk = int(said.get("disk_bytes", _disk(step, parameters or 0)))
    label = f"{step.id}: {step.verb} {step.method}"
    return Cost(step.name, label, parameters, work.total, seconds, memory, disk)


def _seconds(step: PlannedStep, work: Work, parameters: int, peak: float, options: Options) -> float:
    """Training by 4 or 6 operations a weight and token, reading by 2, writing by the slower rate of decoding."""
    if not parameters:
        return 0.0
    # With an adapter the frozen weights need no gradients of their own.
    a_trained = 6 if _is_full(step) else 4
    seconds = LOAD_S + parameters * (a_trained * work.trained / TRAINING + 2 * work.read / READING) / peak
    if work.written:
        at_once = min(work.num_replies, max(1, options.batch_tokens // (work.total // work.num_replies + 1)))
        seconds += work.written * max(2 * parameters / (DECODING * peak), 1 / (STEPS_PER_S * at_once))
    return seconds


def _is_full(step: PlannedStep) -> bool:
    """Whether a fit trains every weight: its `mode` says so, or it leaves weights and no adapter."""
    produces = load_card(step.method).produces
    mode = vars(step.config).get("mode")
    return step.verb == "fit" and (mode == "full" or ("weights" in produces and "adapter" not in produces))


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


def _memory(step: PlannedStep, parameters: int, options: Options) -> int:
    """The libraries, the weights with what is kept beside them, and the activations of the largest batch."""
    if not parameters:
        return 0
    if _is_full(step):
        copies = 5.0  # as they were, as they become, gradients, two moments
    else:
        copies = 1.6 if step.verb == "fit" else 1.0 + bool(step.system and step.system.artefacts)
    settings = vars(step.config)
    largest = int(settings.get("batch_rows") or 0) * int(settings.get("max_tokens") or 0)
    at_once = min(options.batch_tokens, largest or options.batch_tokens)
    kept = 1.0 if step.verb == "fit" else 0.5  # without a backward pass less stays
    activations = kept * ACTIVATION_BYTES * math.sqrt(parameters) * at_once
    return int(LIBRARY_BYTES + parameters * FLOAT_BYTES * copies + activations)


def _disk(step: PlannedStep, parameters: int) -> int:
    base = 1_000_000
    if step.verb != "fit":
        return base
    if _is_full(step):
        return base + parameters * FLOAT_BYTES * 4  # the weights, and a checkpoint with two moments
    return base + int(parameters * FLOAT_BYTES * ADAPTER_SHARE * 4)


def count_parameters(base: str) -> int | None:
    """How many weights a base has: from its files, a table, or its name; None when none of them says."""
    folder = Path(base)
    if folder.is_dir():
        return sum(_header_count(path) for path in folder.rglob("*.safetensors")) or None
    if base.startswith("tiny:"):
        return 200_000
    if base.startswith("new:"):
        return 1_000_000
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
