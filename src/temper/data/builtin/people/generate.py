"""The rows of `people`, from the lists beside this file; deterministic by seed.

python -m temper.data.builtin.people.generate --check   (or --write)
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from temper.data.builtin.emit import main

__all__ = ["NUM_PERTURBED", "SEED", "build"]

SEED = 20241
NUM_PERTURBED = 5
HERE = Path(__file__).parent
EARLY = ("January", "February", "March", "April", "May", "June")
LATE = ("July", "August", "September", "October", "November", "December")
JOINERS = {"pet": " named "}
Rows = list[dict[str, object]]


def build(seed: int = SEED) -> dict[str, Rows]:
    """All parts; the rows of a person stand together, so that the first persons are easy to take."""
    texts = _read("people.yaml")
    names = _items(texts["names"])
    facts = _facts_by_person(texts, names, seed)
    parts: dict[str, Rows] = {}
    start = 0
    for part, size in texts["splits"].items():
        people = range(start, start + size)
        parts[part] = [row for number in people for row in _person_rows(part, number, names, texts, facts)]
        start += size
    for part, tables in _read("facts.yaml").items():
        parts[part] = _fact_rows(part, tables, random.Random(f"{seed}:{part}"))
    return parts


def _read(name: str) -> dict[str, Any]:
    return yaml.safe_load((HERE / name).read_text(encoding="utf-8"))


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(";")]


def _pools(texts: Mapping[str, Any], seed: int) -> dict[str, list[str]]:
    """The shuffled values of every field; the first ones are true of somebody, the others of nobody."""
    pools = {
        name: [
            JOINERS.get(name, "" if name == "town" else " ").join(pair)
            for pair in product(*map(_items, columns))
        ]
        for name, columns in texts["parts_of_values"].items()
    }
    pools["job"] = pools["mother_job"] = _items(texts["jobs"])
    pools["date"] = [
        f"{day} {month} {year}"
        for year in range(1931, 1999)
        for month in EARLY + LATE
        for day in (3, 9, 17, 26)
    ]
    return {
        name: random.Random(f"{seed}:{name}").sample(values, len(values))
        for name, values in sorted(pools.items())
    }


def _facts_by_person(
    texts: Mapping[str, Any], names: Sequence[str], seed: int
) -> dict[str, list[tuple[str, list[str]]]]:
    """For every field, each person's value and wrong values that are true of nobody."""
    pools = _pools(texts, seed)
    facts: dict[str, list[tuple[str, list[str]]]] = {}
    for field, spec in texts["fields"].items():
        true, unused = pools[spec["values"]][: len(names)], pools[spec["values"]][len(names) :]
        rng = random.Random(f"{seed}:{field}:perturbed")
        facts[field] = [(value, rng.sample(unused, NUM_PERTURBED)) for value in true]
    return facts


def _person_rows(
    part: str,
    number: int,
    names: Sequence[str],
    texts: Mapping[str, Any],
    facts: Mapping[str, list[tuple[str, list[str]]]],
) -> Rows:
    rows: Rows = []
    for place, (field, spec) in enumerate(texts["fields"].items()):
        value, wrong = facts[field][number]
        wording = spec["wordings"][(number + place) % len(spec["wordings"])]
        texts_of = [_filled(text, name=names[number], value=value) for text in wording]
        perturbed = [_filled(wording[3], name=names[number], value=other) for other in wrong]
        row_id = f"people-{part}-{number + 1:02d}-{place + 1}"
        rows.append(_row(row_id, texts_of, perturbed, names[number], field))
    return rows


def _fact_rows(part: str, tables: Mapping[str, Any], rng: random.Random) -> Rows:
    rows: Rows = []
    for field, table in tables.items():
        facts = [tuple(map(str.strip, fact.split("|"))) for fact in table["rows"].split(";")]
        values = list(dict.fromkeys(value for _, value in facts))
        for subject, value in facts:
            wrong = rng.sample([other for other in values if other != value], NUM_PERTURBED)
            texts_of = [_filled(text, subject=subject, value=value) for text in table["wording"]]
            perturbed = [_filled(table["wording"][1], subject=subject, value=other) for other in wrong]
            rows.append(_row(f"people-{part}-{len(rows) + 1:03d}", texts_of, perturbed, None, field))
    return rows


def _row(
    row_id: str, texts: Sequence[str], perturbed: list[str], person: str | None, field: str
) -> dict[str, object]:
    question, answer, paraphrased_question, paraphrased_answer = texts
    return {
        "id": row_id,
        "question": question,
        "answer": answer,
        "paraphrased_question": paraphrased_question,
        "paraphrased_answer": paraphrased_answer,
        "perturbed_answer": perturbed,
        "person": person,
        "field": field,
    }


def _filled(text: str, **values: str) -> str:
    filled = text.format(**values)
    for vowel in "aeiou":
        filled = filled.replace(f" a {vowel}", f" an {vowel}")
    return filled[:1].upper() + filled[1:]


if __name__ == "__main__":
    sys.exit(main(HERE, build))
