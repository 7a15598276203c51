"""Reference models of the synthetic worlds: trained once on this machine from a fixed seed, then kept.

A module here holds `MODELS`, name -> WorldModel. A model's folder is named by a hash of its parameters and of the models it
needs, so a change of either trains it anew; a comment does not.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
import tempfile
import time
from pathlib import Path

from temper.core.errors import ConfigError, nearest
from temper.data.worlds.folders import CURRENT, models_home
from temper.ops.world_models.base import WorldModel
from temper.store.atomic import canonical, disk_errors, write_bytes, write_json
from temper.store.locks import locked

__all__ = ["RECORD", "ensure", "is_ready", "names", "world_model"]

HOMES = {"attributes": "attributes", "clip": "clip", "classes": "diffusion", "diffusion": "diffusion"}
"""Name -> the module here that trains it."""
RECORD = "world.json"
"""What a folder says of its training."""


def names() -> list[str]:
    """Every model, without the `world:` of its system spec."""
    return sorted(HOMES)


def world_model(name: str) -> WorldModel:
    """How a model is trained; raises ConfigError for an unknown name."""
    if name not in HOMES:
        raise ConfigError(f"There is no world model {name!r}", cure=nearest(name, HOMES))
    found: WorldModel = importlib.import_module(f"{__name__}.{HOMES[name]}").MODELS[name]
    return found


def is_ready(name: str) -> bool:
    """Whether `ensure` would return at once."""
    return (_folder(name) / RECORD).is_file()


def ensure(name: str) -> Path:
    """The folder of a trained model; trains it first if it is not there, which takes minutes.

    Safe to call from several processes and after a kill: a folder appears whole or not at all.
    Raises ConfigError for an unknown name, StoreError when the disk refuses.
    """
    folder = _folder(name)
    if not is_ready(name):
        with locked(models_home(name) / ".lock", wait=True):
            if not is_ready(name):
                for other in world_model(name).needs:
                    ensure(other)
                _train(name, folder)
    pointer = models_home(name) / CURRENT
    if not pointer.is_file() or pointer.read_text("utf-8").strip() != folder.name:
        write_bytes(pointer, folder.name.encode())
    return folder


def _folder(name: str) -> Path:
    return models_home(name) / _digest(name)


def _digest(name: str) -> str:
    model = world_model(name)
    content = [name, dict(model.parameters), *(_digest(other) for other in model.needs)]
    return hashlib.sha256(canonical(content).encode()).hexdigest()[:12]


def _train(name: str, folder: Path) -> None:
    home = models_home(name)
    with disk_errors("train into", home):
        for left in home.glob(".draft-*"):
            shutil.rmtree(left, ignore_errors=True)
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=home))
        try:
            start = time.perf_counter()
            world_model(name).train(draft)
            record = {
                "name": f"world:{name}",
                "parameters": dict(world_model(name).parameters),
                "wall_s": round(time.perf_counter() - start, 1),
            }
            write_json(draft / RECORD, record)
            draft.chmod(0o755)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(draft, folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
