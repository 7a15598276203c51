"""The rows of `noncompliance`, from the banks beside this file; deterministic by seed.

python -m temper.data.builtin.noncompliance.generate --check   (or --write)
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from pathlib import Path

from temper.data.builtin.emit import main
from temper.data.builtin.noncompliance.computed import computed_lists
from temper.data.builtin.templates import Bank, Filled, Template, expand, read_bank

__all__ = ["CATEGORIES", "KINDS", "PARTS", "SEED", "build", "read_banks"]

SEED = 20240
HERE = Path(__file__).parent
PARTS = ("train", "calibration", "test")
KINDS = ("refusal", "contrast", "ordinary")
CATEGORIES = (
    "Humanizing requests",
    "Incomplete requests",
    "Indeterminate requests",
    "Requests with safety concerns",
    "Unsupported requests",
)


Kinded = tuple[str, Filled]


def build(seed: int = SEED) -> dict[str, list[dict[str, object]]]:
    """All parts; the rows of a part are shuffled, so that a beginning of any length is a fair sample.

    The templates of the two held-out banks are dealt at random, so that thresholds are chosen on rows like those
    they are tried on.
    """
    filled = {part: _filled(part, seed) for part in PARTS}
    filled["calibration"], filled["test"] = _deal(filled["calibration"], filled["test"], seed)
    return {part: _shuffled(part, rows, seed) for part, rows in filled.items()}


def read_banks(part: str, seed: int = SEED) -> Mapping[str, Bank]:
    """The three banks of a part by kind; only the ordinary one may use computed lists."""
    computed = computed_lists(part, seed)
    return {
        kind: read_bank(HERE / "banks" / part / f"{kind}.yaml", computed if kind == "ordinary" else None)
        for kind in KINDS
    }


def _filled(part: str, seed: int) -> list[Kinded]:
    return [
        (kind, row)
        for kind, bank in read_banks(part, seed).items()
        for number, group in enumerate(bank.groups)
        for row in expand(group, bank, random.Random(f"{seed}:{part}:{kind}:{number}"))
    ]


def _deal(first: list[Kinded], second: list[Kinded], seed: int) -> tuple[list[Kinded], list[Kinded]]:
    """Both lists again, as long as they were in each subcategory, every template wholly in one of them."""
    dealt: tuple[list[Kinded], list[Kinded]] = ([], [])
    for kind, subcategory in dict.fromkeys((kind, row.labels["subcategory"]) for kind, row in first + second):
        of_template: dict[Template, list[Kinded]] = {}
        for row in first + second:
            if (row[0], row[1].labels["subcategory"]) == (kind, subcategory):
                of_template.setdefault(row[1].template, []).append(row)
        room = sum((k, row.labels["subcategory"]) == (kind, subcategory) for k, row in first)
        order = list(of_template)
        random.Random(f"{seed}:deal:{kind}:{subcategory}").shuffle(order)
        for template in order:
            fits = len(of_template[template]) <= room
            room -= len(of_template[template]) if fits else 0
            dealt[0 if fits else 1].extend(of_template[template])
    return dealt


def _shuffled(part: str, filled: list[Kinded], seed: int) -> list[dict[str, object]]:
    random.Random(f"{seed}:{part}:order").shuffle(filled)
    return [_row(f"nc-{part}-{number:04d}", kind, row) for number, (kind, row) in enumerate(filled, start=1)]


def _row(row_id: str, kind: str, filled: Filled) -> dict[str, object]:
    return {
        "id": row_id,
        "messages": [
            {"role": "user", "content": filled.request},
            {"role": "assistant", "content": filled.reply},
        ],
        "refusal_category": filled.labels.get("category"),
        "kind": kind,
        "subcategory": filled.labels["subcategory"],
    }


if __name__ == "__main__":
    sys.exit(main(HERE, build))
