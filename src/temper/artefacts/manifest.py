"""The manifest of an artefact on disk, readable without torch: so a plan can refuse a damaged one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from temper.core.errors import StoreError

__all__ = ["FORMAT", "MANIFEST", "read_manifest"]

FORMAT = 1
"""Version of the layout on disk; raised when an older reader would misread it."""
MANIFEST = "artefact.json"


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `artefact.json` holds; raises StoreError where it is damaged or of another format."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, files = manifest["format"], manifest["files"]
        complete = isinstance(files, dict) and {"kind", "base", "method", "settings"} <= manifest.keys()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{MANIFEST} cannot be read: {error}", where=str(path), cure="Fit it again."
        ) from error
    if version != FORMAT:
        raise StoreError(
            f"Artefact format {version} is not {FORMAT}",
            where=str(path),
            cure="Use the version of temper that wrote it.",
        )
    if not complete:
        raise StoreError(f"{MANIFEST} is incomplete", where=str(path), cure="Fit it again.")
    return dict(manifest)
