"""Which rows something was trained on, kept beside it: what is measured on them says little of what else it learnt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from temper.data.schemas import Data, Dialogue

__all__ = ["keep_trained", "seen_items"]

FILE = "trained_rows.json"


def keep_trained(folder: Path | None, records: Iterable[Dialogue]) -> None:
    """Write the rows' keys into a step's folder; nothing without one."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(json.dumps(sorted(map(_key, records))))


def seen_items(data: Data, folders: Iterable[Path]) -> dict[str, frozenset[str]]:
    """Part of `data` -> the ids of its rows that stand in the keys of these steps' folders; nothing where none do."""
    files = [folder / FILE for folder in folders]
    keys = {key for file in files if file.is_file() for key in json.loads(file.read_text())}
    if not keys:
        return {}
    from temper.data.schemas import Dialogue  # loads numpy, which help texts need not

    return {
        part: frozenset(r.id for r in data[part] if isinstance(r, Dialogue) and _key(r) in keys)
        for part in data
    }


def _key(record: Dialogue) -> str:
    """Of what is said, whatever the row's id: the same row may come from another file or part."""
    said = [[message.role, message.content] for message in record.messages]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()
