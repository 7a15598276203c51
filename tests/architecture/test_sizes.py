"""Small functions, small files, no drawer modules, every public name exported."""

from __future__ import annotations

import ast
import statistics
from pathlib import Path

ROOT = Path(__file__).parents[2] / "src" / "temper"
TESTS = ("test_", "conftest.")
DRAWERS = {"utils", "util", "helpers", "misc", "common", "base_utils"}
MAX_FILE, MAX_METHOD, MAX_FUNCTION, MAX_MEDIAN = 400, 300, 60, 12


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if not path.name.startswith(TESTS))


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text())
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def test_files_hold_one_idea() -> None:
    # Built-in generators are fact tables in code; their size is the data's.
    folders = (ROOT, Path(__file__).parents[1])
    code = [path for folder in folders for path in folder.rglob("*.py") if "builtin" not in path.parts]
    sizes = {path: len(path.read_text().splitlines()) for path in code}
    assert {str(p): n for p, n in sizes.items() if n > MAX_FILE} == {}
    assert {str(p): n for p, n in sizes.items() if p.name == "method.py" and n > MAX_METHOD} == {}


def test_functions_are_short() -> None:
    lengths = {f"{path}:{node.name}": length(node) for path in modules() for node in functions(path)}
    assert {name: n for name, n in lengths.items() if n > MAX_FUNCTION} == {}
    assert statistics.median(lengths.values()) <= MAX_MEDIAN


def test_no_drawers() -> None:
    assert [str(path) for path in modules() if path.stem in DRAWERS] == []


def test_public_names_are_exported() -> None:
    wrong = []
    for path in modules():
        if path.name in ("__init__.py", "card.py") or "builtin" in path.parts:
            continue
        tree = ast.parse(path.read_text())
        public = {
            node.name
            for node in tree.body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
        }
        exported = next((ast.literal_eval(n.value) for n in tree.body if _is_all(n)), None)
        if public and exported is None:
            wrong.append(f"{path}: no __all__")
        elif exported is not None and not set(exported) >= public:
            wrong.append(f"{path}: {sorted(public - set(exported))}")
    assert not wrong, "\n".join(wrong)


def _is_all(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and any(
        isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets
    )


def test_nothing_is_left_unfinished() -> None:
    marks = (
        "TO" + "DO",
        "FIX" + "ME",
        "raise NotImplemented" + "Error",
        "import " + "pickle",
        "pickle" + ".load",
    )
    found = [
        f"{path}:{number}"
        for path in modules()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if any(mark in line for mark in marks)
    ]
    assert not found
