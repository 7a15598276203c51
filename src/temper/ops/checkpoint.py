"""Training state on disk: safetensors and JSON in a folder a step, written whole or not at all, verified when read."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from temper.core.errors import StoreError
from temper.core.types import Json
from temper.store.atomic import canonical, disk_errors

__all__ = ["State", "clear", "kept_buffers", "load", "pack_optimizer", "save", "unpack_optimizer"]

log = logging.getLogger(__name__)
TENSORS, FACTS = "state.safetensors", "state.json"


class State(NamedTuple):
    """What a checkpoint holds: named tensors and plain facts."""

    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Json]


def save(folder: Path, state: State, *, keep: int = 2) -> None:
    """Write `folder/step-N` beside the older ones and drop all but the last `keep`; raises StoreError."""
    target = folder / f"step-{state.step:08d}"
    temporary = folder / f".{target.name}.tmp"
    with disk_errors("write a checkpoint", target):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            _write(temporary, state)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        for old in _steps(folder)[keep:]:
            shutil.rmtree(old, ignore_errors=True)


def _write(folder: Path, state: State) -> None:
    try:
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in state.tensors.items()}, folder / TENSORS
        )
    except SafetensorError as error:
        raise StoreError(
            f"Cannot write a checkpoint: {error}",
            where=str(folder),
            cure="Free some space, then run the same command again; it resumes.",
        ) from error
    body = {"step": state.step, "tensors_sha256": _sha256(folder / TENSORS), "facts": state.facts}
    text = json.dumps({"sha256": hashlib.sha256(canonical(body).encode()).hexdigest(), "body": body})
    (folder / FACTS).write_text(text, encoding="utf-8")
    for name in (TENSORS, FACTS):
        descriptor = os.open(folder / name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _steps(folder: Path) -> list[Path]:
    """Finished checkpoints, newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


def load(folder: Path, device: str | torch.device = "cpu") -> State | None:
    """The newest checkpoint that is whole, or None where there is none.

    A damaged one is passed over with a warning; raises StoreError when all are damaged.
    """
    found = _steps(folder)
    for path in found:
        try:
            return _read(path, device)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            log.warning("passing over a damaged checkpoint %s: %s", path, error)
    if found:
        raise StoreError(
            f"None of the {len(found)} checkpoints can be read",
            where=str(folder),
            cure="Delete this folder to start anew, or restore it from a copy.",
        )
    return None


def _read(path: Path, device: str | torch.device) -> State:
    stored = json.loads((path / FACTS).read_text(encoding="utf-8"))
    body = stored["body"]
    if hashlib.sha256(canonical(body).encode()).hexdigest() != stored["sha256"]:
        raise ValueError(f"{FACTS} is not what was written")
    if _sha256(path / TENSORS) != body["tensors_sha256"]:
        raise ValueError(f"{TENSORS} is not what was written")
    return State(body["step"], load_file(path / TENSORS, device=str(device)), body["facts"])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def clear(folder: Path) -> None:
    """Remove all checkpoints in `folder`."""
    with disk_errors("remove old checkpoints", folder):
        for path in [*_steps(folder), *folder.glob(".step-*")]:
            shutil.rmtree(path)


def kept_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to a saved model, e.g. batch norm's running statistics, which move in training."""
    saved = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], Json]:
    """An optimiser's state as named tensors and JSON values."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Json]] = {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{name}"] = value
            else:
                numbers.setdefault(str(index), {})[name] = value
    return tensors, {"numbers": numbers, "groups": state["param_groups"]}


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], facts: Json) -> None:
    """Give an optimiser the state that `pack_optimizer` took."""
    state: dict[int, dict[str, Any]] = {
        int(index): dict(values) for index, values in facts["numbers"].items()
    }
    for key, tensor in tensors.items():
        kind, _, rest = key.partition("/")
        if kind == "optimizer":
            index, _, name = rest.partition("/")
            state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": facts["groups"]})
