"""Blocks of the documentation: those that a reader can run as they stand are marked `<!-- runs -->`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FENCE = re.compile(
    r"(?P<mark><!-- runs -->\n)?^```(?P<language>\w+)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)


class Block(NamedTuple):
    """One fenced block."""

    language: str
    body: str
    runs: bool


def pages() -> list[Path]:
    """Every page written by hand, the README first."""
    written = [p for p in sorted((ROOT / "docs").rglob("*.md")) if p.parent.name not in ("methods", "adr")]
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *written]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [Block(m["language"], m["body"], m["mark"] is not None) for m in found]


def commands(block: Block) -> list[str]:
    """The shell commands of a block, continuation lines joined, comments cut off."""
    lines = block.body.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    return [re.sub(r"\s+# .*", "", line).strip() for line in lines if line.strip()]


def script(page: Path) -> str:
    """What a reader of the page would type, as one shell script: on a random model, with real run folders."""
    parts = ["set -euo pipefail"]
    for block in blocks(page):
        if block.runs and block.language == "python":
            parts.append(f"python - <<'PYTHON'\n{block.body}PYTHON")
        elif block.runs:
            parts.append("\n".join(commands(block)) if block.language == "console" else block.body)
    text = "\n".join(parts).replace("smollm2-135m", "tiny:llama")
    # A page shows a run's folder by an example; here it is the newest one.
    return re.sub(r"^([A-Z]+)=runs/\S+.*$", r"\1=$(ls -td runs/*/ | head -1)", text, flags=re.MULTILINE)
