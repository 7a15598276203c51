"""Arrays kept between runs, by a key that holds everything that changes them.

Files are npz without pickle, written atomically, each with its whole key inside, so a hash that fits by chance or
a damaged file is a miss. TEMPER_NO_CACHE=1 turns every cache off.
"""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from temper.core.types import Json
from temper.store.atomic import canonical, write_with

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Cache", "cache_root", "hits", "is_off"]

log = logging.getLogger(__name__)
KEY = "__key__"
_hits: dict[str, int] = {}


def cache_root() -> Path:
    """TEMPER_CACHE, by default ~/.cache/temper."""
    named = os.environ.get("TEMPER_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "temper"


def is_off() -> bool:
    """Whether TEMPER_NO_CACHE turns caches off."""
    return os.environ.get("TEMPER_NO_CACHE", "") not in ("", "0")


def hits() -> int:
    """How many answers of this process came out of a cache; rows carry the difference over their step."""
    return sum(_hits.values())


class Cache:
    """One named cache: `get` gives the arrays put under an equal key, or None."""

    def __init__(self, name: str, root: Path | None = None) -> None:
        self.name = name
        self.folder = (root or cache_root()) / "arrays" / name

    def path(self, key: Mapping[str, Json]) -> Path:
        """Where the arrays of a key live."""
        digest = hashlib.sha256(canonical(dict(key)).encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest}.npz"

    def get(self, key: Mapping[str, Json]) -> dict[str, np.ndarray] | None:
        """The arrays of a key, or None; a damaged file is dropped and counts as a miss."""
        if is_off():
            return None
        import numpy as np

        path = self.path(key)
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, KeyError) as error:
            log.warning("dropping a damaged cache file %s: %s", path, error)
            path.unlink(missing_ok=True)
            return None
        if bytes(arrays.pop(KEY, b"")) != canonical(dict(key)).encode():
            return None
        _hits[self.name] = _hits.get(self.name, 0) + 1
        return arrays

    def put(self, key: Mapping[str, Json], arrays: Mapping[str, np.ndarray]) -> None:
        """Keep arrays under a key; raises StoreError when the disk refuses."""
        if is_off():
            return
        import numpy as np

        stamp = np.frombuffer(canonical(dict(key)).encode(), dtype=np.uint8)

        def write(file: BinaryIO) -> None:
            np.savez(file, **{**arrays, KEY: stamp})  # type: ignore[arg-type]

        write_with(self.path(key), write)
