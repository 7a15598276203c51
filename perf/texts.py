"""Texts that every machine with this Python has: paragraphs of the standard library's docstrings."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

__all__ = ["FLOPS_PER_TOKEN", "minilm_folder", "paragraphs", "summaries"]

FLOPS_PER_TOKEN = 2 * 6 * (4 * 384**2 + 2 * 384 * 1536)
"""Products of all-MiniLM-L6-v2's layers."""


def _docstrings() -> Iterator[list[str]]:
    """The paragraphs of each docstring, in the order of the files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.glob("*.py")) + sorted(root.glob("[a-z]*/*.py")):
        if "test" in path.as_posix() or "site-packages" in path.as_posix():
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                yield [" ".join(block.split()) for block in (ast.get_docstring(node) or "").split("\n\n")]


def paragraphs() -> list[str]:
    """Distinct paragraphs of four words and more."""
    return list(dict.fromkeys(text for texts in _docstrings() for text in texts if len(text.split()) >= 4))


def summaries() -> list[tuple[str, str]]:
    """Distinct first paragraphs of four words and more, each with the rest of its docstring, of ten and more."""
    pairs = {texts[0]: " ".join(texts[1:]) for texts in _docstrings()}
    return [
        (short, rest) for short, rest in pairs.items() if len(short.split()) >= 4 and len(rest.split()) >= 10
    ]


def minilm_folder() -> str:
    """all-MiniLM-L6-v2 in sentence-transformers' layout, fetched if need be; for `inputs`, which run beside temper."""
    from temper.data.assets import fetch

    return str(fetch("minilm"))
