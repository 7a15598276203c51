"""Artefacts on disk: safetensors, JSON and checksums; written whole, read with suspicion."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from temper.artefacts.base import Artefact, Parts
from temper.artefacts.manifest import FORMAT, MANIFEST, read_manifest
from temper.core.errors import ConfigError, StoreError, nearest
from temper.store.atomic import disk_errors

__all__ = ["FORMAT", "KINDS", "build_artefact", "load_artefact", "write_artefact"]

KINDS = {
    "adapter": "Adapter",
    "decoder": "Decoder",
    "prompt": "Prompt",
    "stack": "Stack",
    "steer": "Steer",
    "weights": "Weights",
}


def write_artefact(artefact: Artefact, folder: Path) -> Path:
    """Write beside the folder first, then move into place; an artefact already there is replaced."""
    with disk_errors("write the artefact", folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:12]}")
        draft.mkdir()
        try:
            _write_files(artefact, draft)
            _move(draft, folder)
        except SafetensorError as error:
            raise StoreError(
                f"Cannot write the artefact: {error}", where=str(folder), cure="Check free space."
            ) from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return folder


def _write_files(artefact: Artefact, draft: Path) -> None:
    parts = artefact.parts()
    for name, tensors in parts.tensors.items():
        plain = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        save_file(plain, draft / name, metadata={"format": "pt"})
    for name, text in parts.texts.items():
        (draft / name).write_text(text, encoding="utf-8")
    manifest = {
        "format": FORMAT,
        "kind": artefact.kind,
        "method": artefact.method,
        "base": artefact.base,
        "fingerprint": artefact.fingerprint,
        "settings": parts.settings,
        "files": {name: _sha256(draft / name) for name in sorted({*parts.tensors, *parts.texts})},
    }
    (draft / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    for path in draft.iterdir():
        with path.open("rb") as handle:
            os.fsync(handle.fileno())


def _move(draft: Path, folder: Path) -> None:
    if not folder.exists():
        draft.rename(folder)
        return
    if not (folder / MANIFEST).is_file() and any(folder.iterdir()):
        raise StoreError(
            "The folder holds something that is not an artefact",
            where=str(folder),
            cure="Choose another folder.",
        )
    aside = draft.with_name(draft.name + "-old")
    folder.rename(aside)
    try:
        draft.rename(folder)
    except OSError:
        aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def load_artefact(path: Path | str) -> Artefact:
    """The artefact in a folder: its own, a step's (`steps/<id>`) or a run's (`runs/<id>`).

    Raises ConfigError where there is none or several, StoreError for a damaged file.
    """
    folder = _find(Path(path))
    manifest = read_manifest(folder)
    tensors: dict[str, Any] = {}
    texts: dict[str, str] = {}
    for name, wanted in manifest["files"].items():
        file = _verified(folder, name, wanted)
        if file.suffix == ".safetensors":
            tensors[name] = load_file(file)
        else:
            texts[name] = file.read_text(encoding="utf-8")
    parts = Parts(manifest["settings"], tensors, texts)
    return build_artefact(manifest["kind"], manifest["base"], manifest["method"], parts)


def build_artefact(kind: str, base: str, method: str, parts: Parts) -> Artefact:
    """The artefact of a kind from its parts; raises StoreError for an unknown kind."""
    if kind not in KINDS:
        raise StoreError(
            f"There is no artefact kind {kind!r}", where=f"artefact of {method!r}", cure=nearest(kind, KINDS)
        )
    home = importlib.import_module(f"temper.artefacts.{kind}")
    built: Artefact = getattr(home, KINDS[kind]).from_parts(base, method, parts)
    return built


def _find(path: Path) -> Path:
    for folder in (path, path / "artefact"):
        if (folder / MANIFEST).is_file():
            return folder
    steps = sorted(manifest.parent for manifest in path.glob(f"steps/*/artefact/{MANIFEST}"))
    if len(steps) == 1:
        return steps[0]
    if steps:
        names = ", ".join(str(step.parent) for step in steps)
        raise ConfigError(
            f"Several steps left an artefact: {names}", where=str(path), cure="Name one of them."
        )
    raise ConfigError(
        f"There is no artefact at {str(path)!r}",
        cure="Give an artefact folder, runs/<id> or runs/<id>/steps/<step>.",
    )


def _verified(folder: Path, name: str, wanted: str) -> Path:
    if Path(name).name != name:
        raise StoreError(
            f"File name {name!r} leaves the folder", where=str(folder / MANIFEST), cure="Do not use it."
        )
    file = folder / name
    cure = "Copy the artefact again, or fit it again."
    if not file.is_file():
        raise StoreError(f"The artefact lacks {name}", where=str(folder), cure=cure)
    if _sha256(file) != wanted:
        raise StoreError(
            f"{name} is damaged: its checksum is not the one in {MANIFEST}", where=str(folder), cure=cure
        )
    return file


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
