"""Imports go one way, and the cheap layers stay cheap."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "src" / "temper"

MAY_IMPORT: dict[str, set[str]] = {
    "core": set(),
    "data": {"core"},
    "systems": {"core", "data"},
    "store": {"core"},
}
MAY_IMPORT["ops"] = {"core", "data", "systems", "store"}
MAY_IMPORT["artefacts"] = MAY_IMPORT["ops"] | {"ops"}
MAY_IMPORT["judges"] = MAY_IMPORT["ops"] | {"ops"}
MAY_IMPORT["methods"] = MAY_IMPORT["ops"] | {"ops", "artefacts", "judges"}
MAY_IMPORT["run"] = MAY_IMPORT["methods"] | {"methods"}
MAY_IMPORT["report"] = MAY_IMPORT["run"] | {"run"}
MAY_IMPORT["cli"] = MAY_IMPORT["report"] | {"report"}
MAY_IMPORT["server"] = MAY_IMPORT["report"] | {"report"}

CARD_MAY_IMPORT = {"core"}
EAGER_IN_CORE = sys.stdlib_module_names | {"temper", "__future__"}


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if not path.name.startswith(("test_", "conftest.")))


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every imported module name with its line, wherever in the file it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield "." * node.level, node.lineno


def layer(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "temper" and len(parts) > 1 else None


def test_no_arrow_points_back() -> None:
    wrong = []
    for path in modules():
        here = path.relative_to(ROOT).parts[0]
        if here not in MAY_IMPORT:
            continue
        for name, line in imports(ast.parse(path.read_text())):
            there = layer(name)
            if there and there != here and there not in MAY_IMPORT[here]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_every_layer_is_known() -> None:
    folders = {path.parent.relative_to(ROOT).parts[0] for path in modules() if path.parent != ROOT}
    assert folders <= set(MAY_IMPORT)
    assert len(modules()) > 50


def test_methods_never_import_one_another() -> None:
    wrong = []
    for path in (ROOT / "methods").glob("*/*/*.py"):
        home = ("temper", "methods", *path.relative_to(ROOT / "methods").parts[:2])
        for name, line in imports(ast.parse(path.read_text())):
            if name.startswith("temper.methods") and tuple(name.split(".")[:4]) != home:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_nothing_but_the_registry_names_a_method() -> None:
    names = {path.parent.name for path in (ROOT / "methods").glob("*/*/card.py")}
    wrong = []
    for path in modules():
        if path.relative_to(ROOT).parts[0] == "methods":
            continue
        for name, line in imports(ast.parse(path.read_text())):
            if name.startswith("temper.methods.") and name.split(".")[-1] in names:
                wrong.append(f"{path.relative_to(ROOT)}:{line}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "path", [*(ROOT / "core").glob("*.py"), *(ROOT / "methods").glob("*/*/card.py")], ids=str
)
def test_core_and_cards_import_the_standard_library_only(path: Path) -> None:
    """At module level; `core/config.py` and `--set` may reach pydantic and yaml inside a function."""
    tree = ast.parse(path.read_text())
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    found = {name.split(".")[0] for node in top for name, _ in imports(node)}
    assert found <= EAGER_IN_CORE
    if path.name == "card.py" and "methods" in path.parts:
        layers = {layer(name) for name, _ in imports(tree) if layer(name)}
        assert layers <= CARD_MAY_IMPORT


def test_no_relative_imports() -> None:
    wrong = [
        str(path) for path in modules() for name, _ in imports(ast.parse(path.read_text())) if name[0] == "."
    ]
    assert not wrong
