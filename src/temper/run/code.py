"""Which code made a number: hashes of the sources, the version and the commit, read without running git."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import temper
from temper.core.registry import find

__all__ = ["code_hash", "commit", "version"]

PACKAGE = Path(temper.__file__).parent
TESTS = ("test_", "conftest.")
"""How the names of files begin that make no number."""
SHARED = ("core", "data", "systems", "ops", "artefacts", "judges")
"""What can change a method's numbers; the store, the command line and the report cannot."""


def version() -> str:
    """The package's version."""
    return str(getattr(temper, "__version__", "0"))


def code_hash(slug: str) -> str:
    """Hash of the method's modules and of the shared machinery under it."""
    digest = hashlib.sha256(_shared().encode())
    folder = find(slug).folder
    for path in sorted(folder.glob("*.py")):
        if not path.name.startswith(TESTS):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@cache
def _shared() -> str:
    digest = hashlib.sha256()
    for name in SHARED:
        for path in sorted((PACKAGE / name).rglob("*.py")):
            digest.update(str(path.relative_to(PACKAGE)).encode() + path.read_bytes())
    return digest.hexdigest()


@cache
def commit() -> str:
    """The commit of the checkout the package lies in, or ""."""
    for folder in PACKAGE.parents:
        head = folder / ".git" / "HEAD"
        if head.is_file():
            return _resolve(folder / ".git", head.read_text().strip())
    return ""


def _resolve(git: Path, head: str) -> str:
    if not head.startswith("ref: "):
        return head
    name = head.removeprefix("ref: ")
    if (git / name).is_file():
        return (git / name).read_text().strip()
    packed = git / "packed-refs"
    lines = packed.read_text().splitlines() if packed.is_file() else []
    return next((line.split()[0] for line in lines if line.endswith(" " + name)), "")
