"""Every message that the source can raise stands in docs/errors.md; found here without the generator."""

from __future__ import annotations

import ast
import html
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
CLASSES = {"ConfigError", "NeedsError", "DataError", "ModelError", "NumericsError", "StoreError"}


def raised(path: Path) -> list[tuple[int, str]]:
    """Line and longest literal piece of the message of every `raise XError(...)`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        call = node.exc if isinstance(node, ast.Raise) else None
        if (
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Name)
            and call.func.id in CLASSES
            and call.args
        ):
            pieces = [
                n.value
                for n in ast.walk(call.args[0])
                if isinstance(n, ast.Constant) and isinstance(n.value, str)
            ]
            longest = max(pieces, key=len, default="")
            if len(longest.split()) >= 2:
                found.append((node.lineno, " ".join(longest.split())))
    return found


def documented() -> str:
    """The page as a reader sees it."""
    text = html.unescape((ROOT / "docs" / "errors.md").read_text())
    return " ".join(re.sub(r"\\([\\*_\[\]|~#])", r"\1", text).split())


def test_every_raised_message_is_documented() -> None:
    page = documented()
    files = [p for p in sorted((ROOT / "src" / "temper").rglob("*.py")) if not p.name.startswith("test_")]
    messages = {f"{p.relative_to(ROOT)}:{line}": text for p in files for line, text in raised(p)}
    assert len(messages) > 200
    missing = {place: text for place, text in messages.items() if text not in page}
    assert not missing, "run: make generated"


def test_every_class_has_its_section() -> None:
    page = (ROOT / "docs" / "errors.md").read_text()
    assert set(re.findall(r"^## (\w+Error)$", page, re.MULTILINE)) == CLASSES
