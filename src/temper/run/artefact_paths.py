"""Where an artefact of a system spec lives, and what identifies it and a base before either is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from temper.artefacts.manifest import MANIFEST, read_manifest
from temper.core.errors import ConfigError, nearest
from temper.core.types import Json
from temper.store.folders import file_sha256

__all__ = ["artefact_digest", "base_identity", "locate"]


def locate(name: str, out: Path = Path("runs")) -> Path:
    """The artefact folder that a name means: a folder, a run's id or path, or `RUN/STEP`; raises ConfigError."""
    for root in (Path(name), out / name):
        if found := _inside(root):
            return found
        if (root.parent / "run.json").is_file() and (found := _step(root.parent, root.name)):
            return found
    if Path(name).exists() or (out / name).exists():
        raise ConfigError(f"There is no artefact in {name!r}", cure="A finished fit step leaves one.")
    runs = [path.parent.name for path in out.glob("*/run.json")]
    raise ConfigError(
        f"There is no artefact {name!r}",
        cure=nearest(name, runs) or "Give an earlier step's id, an artefact folder or a run's folder.",
    )


def _inside(root: Path) -> Path | None:
    for folder in (root, root / "artefact"):
        if (folder / MANIFEST).is_file():
            return folder
    if (root / "run.json").is_file():
        return _only([path.parent for path in sorted(root.glob(f"steps/*/artefact/{MANIFEST}"))], root)
    return None


def _step(run: Path, step: str) -> Path | None:
    found = [path.parent for path in sorted(run.glob(f"steps/{step}*/artefact/{MANIFEST}"))]
    exact = [
        path for path in found if path.parent.name == step or path.parent.name.rpartition("-")[0] == step
    ]
    return _only(exact, run / step)


def _only(found: Sequence[Path], root: Path) -> Path | None:
    if len(found) > 1:
        names = ", ".join(str(path.parent) for path in found[:6])
        raise ConfigError(f"{str(root)!r} holds several artefacts", cure=f"Name one: {names}.")
    return found[0] if found else None


def artefact_digest(folder: Path) -> str:
    """Hash of an artefact's manifest, which holds the hash of each of its files; StoreError if it is damaged."""
    read_manifest(folder)
    return file_sha256(folder / MANIFEST)


def base_identity(name: str) -> Json:
    """What identifies a base before it is loaded: its name, and a local folder's files by size and time."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        stat = path.stat()
        digest.update(f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return [str(folder.resolve()), digest.hexdigest()]
