"""The rows of `behaviours`, from the banks beside this file; deterministic by seed.

python -m temper.data.builtin.behaviours.generate --check   (or --write)
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from temper.data.builtin.emit import main
from temper.data.builtin.templates import Filled, expand, read_bank

__all__ = ["CATEGORIES", "PARTS", "SEED", "build"]

SEED = 20242
HERE = Path(__file__).parent
PARTS = ("train", "test", "neutral")
CATEGORIES = (
    "private data",
    "protected works",
    "binding legal advice",
    "medical dosing",
    "investment tips",
    "voting advice",
    "fictional weapons",
    "fictional poisons",
    "guarded secrets",
    "break-ins",
    "impersonation",
    "false reports",
)


def build(seed: int = SEED) -> dict[str, list[dict[str, object]]]:
    """All parts, shuffled, so that a beginning of any length is a fair sample."""
    return {part: _part(part, seed) for part in PARTS}


def _part(part: str, seed: int) -> list[dict[str, object]]:
    bank = read_bank(HERE / "banks" / f"{part}.yaml")
    filled = [
        row
        for number, group in enumerate(bank.groups)
        for row in expand(group, bank, random.Random(f"{seed}:{part}:{number}"))
    ]
    random.Random(f"{seed}:{part}:order").shuffle(filled)
    return [_row(f"behaviour-{part}-{number:03d}", row) for number, row in enumerate(filled, start=1)]


def _row(row_id: str, filled: Filled) -> dict[str, object]:
    target, _, refusal = filled.reply.partition(" ~ ")
    return {
        "id": row_id,
        "prompt": filled.request,
        "target": target,
        "refusal": refusal or None,
        "category": filled.labels["category"],
        "benign": not refusal,
    }


if __name__ == "__main__":
    sys.exit(main(HERE, build))
