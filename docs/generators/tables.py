"""Tables of families, methods, data sets and judges."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

from generators.markdown import NOTE, cell, number, table
from temper.core import registry
from temper.judges.loading import measured
from temper.run.evidence import findings

__all__ = [
    "asset_table",
    "builtin_table",
    "families",
    "family_table",
    "file_map",
    "judge_table",
    "methods_page",
]

LAYERS = ("core", "data", "systems", "store", "ops", "artefacts", "judges", "run", "report", "cli", "server")
"""In the order of imports; methods are listed by family instead."""


def families(root: Path) -> dict[str, str]:
    """Family -> the docstring of its `__init__.py`, for every folder that holds a method; read, not imported."""
    found: dict[str, str] = {}
    for folder in sorted({card.parent.parent for card in root.glob("*/*/card.py")}):
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
        if not text:
            raise SystemExit(
                f"docs/generate.py: {folder / '__init__.py'} has no docstring; say what the family is in one line"
            )
        found[folder.name] = " ".join(text.split())
    return found


def _members(family: str) -> list[str]:
    return [slug for slug, entry in registry.entries().items() if entry.family == family]


def family_table(root: Path, to_pages: str) -> str:
    """Family, what it is about, and its methods with links."""
    rows = [
        (
            f"**{name.replace('_', ' ')}**",
            cell(about),
            ", ".join(f"[`{s}`]({to_pages}{s}.md)" for s in _members(name)),
        )
        for name, about in families(root).items()
    ]
    return table(("family", "about", "methods"), rows)


def methods_page(root: Path) -> str:
    """The index of methods: a section a family, with verbs and verdicts counted."""
    blocks = [NOTE, "# Methods", "Everything is found by its folder; `temper list` prints the same."]
    for name, about in families(root).items():
        blocks += [
            f"## {name.replace('_', ' ').capitalize()}",
            cell(about),
            table(_COLUMNS, _method_rows(name)),
        ]
    return "\n\n".join(blocks) + "\n"


_COLUMNS = ("method", "verbs", "title", "claims: shown / contradicted / not shown")


def _method_rows(family: str) -> Iterator[tuple[str, str, str, str]]:
    for slug in _members(family):
        card = registry.load_card(slug)
        verdicts = [finding.verdict for finding in findings(slug)]
        counts = " / ".join(str(verdicts.count(v)) for v in ("shown", "contradicted", "not shown"))
        yield f"[`{slug}`]({slug}.md)", ", ".join(card.verbs), cell(card.title), counts


def builtin_table(folder: Path) -> str:
    """The built-in sets with the size of each part."""
    rows = []
    for path in sorted(folder.iterdir()):
        parts = {
            p.stem: sum(1 for line in p.open(encoding="utf-8") if line.strip()) for p in path.glob("*.jsonl")
        }
        if parts:
            sizes = ", ".join(f"`{name}` {count}" for name, count in sorted(parts.items()))
            rows.append((f"`builtin:{path.name.replace('_', '-')}`", sizes))
    return table(("set", "parts and rows"), rows)


def asset_table(file: Path) -> str:
    """What `temper fetch` brings, with size and licence."""
    listed = json.loads(file.read_text(encoding="utf-8"))["assets"]
    rows = [
        (f"`{name}`", cell(about["title"]), cell(about["licence"]), "`--accept`" if about["opt_in"] else "")
        for name, about in listed.items()
    ]
    return table(("asset", "what it is", "licence", "opt-in"), rows)


def judge_table() -> str:
    """Every judge's checked-in accuracy."""
    rows = [
        (f"`{m.judge}`", cell(m.data), m.n, _rate(m.precision, m.precision_low, m.precision_high),
         _rate(m.recall, m.recall_low, m.recall_high), f"{m.unscored_share:.1%}")
        for m in measured()
    ]  # fmt: skip
    return table(("judge", "measured on", "n", "precision", "recall", "unscored"), rows)


def _rate(value: float | None, low: float | None, high: float | None) -> str:
    return "-" if value is None else f"{number(value)} [{number(low)}, {number(high)}]"


def file_map(source: Path) -> str:
    """Layer by layer, each module with the first sentence of its docstring."""
    blocks = []
    for layer in LAYERS:
        paths = [p for p in sorted((source / layer).glob("*.py")) if p.name != "__init__.py"]
        rows = [(f"`{layer}/{path.name}`", cell(_first_paragraph(path))) for path in paths]
        blocks += [table(("file", "what lives there"), rows)] if rows else []
    return "\n\n".join(blocks)


def _first_paragraph(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not text:
        raise SystemExit(f"docs/generate.py: {path} has no docstring; say in one line what lives there")
    return text.split("\n\n")[0]
