"""The page of errors: every TemperError that the source can raise, read from the syntax tree."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import NamedTuple

from generators.markdown import NOTE, escape, table
from temper.core import errors as tree

__all__ = ["ErrorLine", "collect", "error_page", "literal"]

CLASSES = ("ConfigError", "NeedsError", "DataError", "ModelError", "NumericsError", "StoreError")


class ErrorLine(NamedTuple):
    """One way to raise an error: its class, the three texts with <placeholders>, and the module."""

    kind: str
    what: str
    where: str
    cure: str
    module: str


def collect(root: Path) -> list[ErrorLine]:
    """Every construction of an error under `root`, tests left out, in order of class and module."""
    found: set[ErrorLine] = set()
    for path in sorted(root.rglob("*.py")):
        if not path.name.startswith("test_"):
            module = str(path.relative_to(root))
            calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            found |= {line for call in calls if (line := _line(call, module)) is not None}
    return sorted(found, key=lambda line: (CLASSES.index(line.kind), line.module, line))


def _line(call: ast.Call, module: str) -> ErrorLine | None:
    kind = _kind(call)
    if kind is None or not call.args:
        return None
    texts = {keyword.arg: literal(keyword.value) for keyword in call.keywords if keyword.arg}
    what = literal(call.args[0])
    if not re.search(r"[a-z]{2}", re.sub(r"<[^>]*>", "", what)):
        return None  # a message passed through as a whole; it is listed where it is written
    where = texts.get("where", "") or ("source, row, column" if kind == "row" else "")
    return ErrorLine("DataError" if kind == "row" else kind, what, where, texts.get("cure", ""), module)


def _kind(call: ast.Call) -> str | None:
    """The class that a call builds; `place.error(...)` builds a DataError about a row."""
    if isinstance(call.func, ast.Name) and call.func.id in CLASSES:
        return call.func.id
    if isinstance(call.func, ast.Attribute) and call.func.attr == "error":
        owner = ast.unparse(call.func.value)
        return "row" if owner == "place" or owner.endswith(".place") else None
    return None


def literal(node: ast.expr) -> str:
    """The text of a string expression; what is filled in stands as <name>."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(part) for part in node.values)
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.IfExp):
        return f"<{literal(node.value)}>"
    if isinstance(node, ast.FormattedValue):
        return f"<{_name(node.value)}>"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return literal(node.left) + literal(node.right)
    if isinstance(node, ast.BoolOp):
        return " ".join(literal(value) for value in node.values)
    if isinstance(node, ast.IfExp):
        return " or ".join(filter(None, (literal(node.body), literal(node.orelse))))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "nearest":
        return "Did you mean <the nearest known names>?"
    return f"<{_name(node)}>"


def _name(node: ast.expr) -> str:
    """A short word for a filled-in expression."""
    if isinstance(node, ast.Name):
        return node.id.strip("_").replace("_", " ")
    if isinstance(node, ast.Attribute):
        return node.attr.strip("_").replace("_", " ")
    if isinstance(node, ast.Subscript):
        return _name(node.value)
    if isinstance(node, ast.Call) and node.args and ast.unparse(node.func) in ("str", "len", "type", "repr"):
        return ("number of " if ast.unparse(node.func) == "len" else "") + _name(node.args[0])
    if isinstance(node, ast.Call):
        return "names" if ast.unparse(node.func).endswith(".join") else _name(node.func)
    return "value"


def error_page(root: Path) -> str:
    """The generated half of `docs/errors.md`: a table a class."""
    lines = collect(root)
    blocks = [NOTE]
    for kind in CLASSES:
        cls = getattr(tree, kind)
        blocks.append(f"## {kind}")
        blocks.append(f"{escape(inspect.getdoc(cls) or '')} Exit code {cls.exit_code}.")
        rows = [(_text(line.what), _text(line.where), _text(line.cure), f"`{line.module}`")
                for line in lines if line.kind == kind]  # fmt: skip
        blocks.append(table(("message", "where it points", "cure", "raised in"), rows))
    return "\n\n".join(blocks) + "\n"


def _text(text: str) -> str:
    line = " ".join(text.split())
    return re.sub(r"(?<!\\)\|", r"\\|", escape(line)) or "-"
