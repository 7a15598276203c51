"""A retrieval set made from the running Python's own standard library: a docstring's first line finds the rest of it.

The query is the first paragraph of a function's or class's docstring with the object's own name masked, the document
is what follows the first blank line. Modules are split 70 / 10 / 20, none stands in two parts. The texts are under the
PSF licence of the Python that is running; they are read from its files, kept in the user's cache by version, and
nothing is downloaded.
"""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import re
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from temper.core.errors import NeedsError, StoreError
from temper.data.assets import cache_dir
from temper.data.schemas import Ranking

__all__ = ["LICENCE", "NAME", "SHARES", "Pair", "docstring_pairs", "ensure_docstrings", "split_modules"]

NAME = "stdlib-docstrings"
LICENCE = "Python Software Foundation License (docs.python.org/3/license.html)"
SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}
MIN_SUMMARY, MIN_BODY = 4, 10
"""Words that a summary and a body must have."""
MASK = "it"
"""What stands in the query where the object's own name stood."""
LEFT_OUT = frozenset(["test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__", "lib2to3"])
"""Folders of the library that are not read: its tests, an application, other people's packages."""
EDITION = 1
"""Raised when the rules above change."""
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Pair(NamedTuple):
    """An object's qualified name, the two halves of its docstring, and the module family it is split by."""

    name: str
    family: str
    summary: str
    body: str


def ensure_docstrings() -> Path:
    """A folder of `train.jsonl`, `validation.jsonl` and `test.jsonl`, made on first use for this version of Python."""
    folder = (
        cache_dir()
        / "made"
        / f"{NAME}-{platform.python_implementation()}-{platform.python_version()}-{EDITION}"
    )
    if folder.is_dir():
        return folder
    from temper.data.loading import write_jsonl

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            made = Path(temporary) / "made"
            for part, records in split_modules(list(docstring_pairs())).items():
                write_jsonl(made / f"{part}.jsonl", records)
            (made / "LICENCE").write_text(f"{LICENCE}\n", encoding="utf-8")
            try:
                os.rename(made, folder)
            except OSError:
                if not folder.is_dir():  # else another process was first, with the same content
                    raise
                shutil.rmtree(made)
    except OSError as error:
        raise StoreError(
            f"The docstrings cannot be kept: {error.strerror}",
            where=str(folder),
            cure="Free some space, or set TEMPER_CACHE.",
        ) from error
    return folder


def docstring_pairs(root: Path | None = None) -> Iterator[Pair]:
    """Every usable docstring under `root` (the standard library), in the order of file names; no text stands twice.

    Raises NeedsError for a Python without the library's source files.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if LEFT_OUT.isdisjoint(inside.parts):
            for pair in _module_pairs(path, inside):
                if seen.isdisjoint((pair.summary, pair.body)):
                    seen |= {pair.summary, pair.body}
                    yield pair
    if not seen:
        raise NeedsError(
            "This Python has no docstrings to read", where=str(root),
            cure=f"Use one whose standard library lies there as .py files, not {sys.executable}.",
        )  # fmt: skip


def _module_pairs(path: Path, inside: Path) -> Iterator[Pair]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return  # templates and files for other versions
    module = ".".join(inside.with_suffix("").parts).removesuffix(".__init__")
    # datetime and _pydatetime, or io and _pyio, are written from one another.
    family = re.sub(r"^_+(py)?(?=\w)", "", inside.parts[0].removesuffix(".py"))
    for name, node in _definitions(tree, module):
        halves = _halves(node)
        if halves is not None:
            yield Pair(name, family, *halves)


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, Definition]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            name = f"{prefix}.{child.name}"
            yield name, child
            yield from _definitions(child, name)
        elif isinstance(child, ast.If | ast.Try):
            yield from _definitions(child, prefix)


def _halves(node: Definition) -> tuple[str, str] | None:
    """Summary with the own name masked, and body; None where one of them is missing or short."""
    text = ast.get_docstring(node)
    summary, blank, body = (text or "").partition("\n\n")
    if not blank:
        return None
    summary, body = " ".join(summary.split()), body.strip()
    summary = re.sub(rf"(?<!\w){re.escape(node.name)}(?!\w)(\(\))?", MASK, summary)
    if len(summary.split()) < MIN_SUMMARY or len(body.split()) < MIN_BODY:
        return None
    return summary, body


def split_modules(pairs: list[Pair]) -> dict[str, list[Ranking]]:
    """Part -> its records; families of modules go, in a fixed order, to the part that lacks most of its share."""
    families: dict[str, list[Pair]] = {}
    for pair in pairs:
        families.setdefault(pair.family, []).append(pair)
    parts: dict[str, list[Ranking]] = {part: [] for part in SHARES}
    for family in sorted(families, key=lambda name: hashlib.sha256(name.encode()).digest()):
        done = sum(map(len, parts.values())) + len(families[family])
        part = max(SHARES, key=lambda name: SHARES[name] * done - len(parts[name]))
        parts[part] += [_record(pair) for pair in families[family]]
    return {part: _numbered(records) for part, records in parts.items()}


def _record(pair: Pair) -> Ranking:
    return Ranking(pair.summary, pair.body, id=pair.name, extra={"module": pair.family})


def _numbered(records: list[Ranking]) -> list[Ranking]:
    """A name that is defined twice (in an if, or a property and its setter) gets a number behind it."""
    seen: dict[str, int] = {}
    out = []
    for record in records:
        seen[record.id] = number = seen.get(record.id, 0) + 1
        name = record.id if number == 1 else f"{record.id}#{number}"
        out.append(Ranking(record.query, record.positive, id=name, extra=record.extra))
    return out
