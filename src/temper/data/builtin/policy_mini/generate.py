"""The rows of `policy_mini`, from the banks beside this file; deterministic by seed.

python -m temper.data.builtin.policy_mini.generate --check   (or --write)
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from temper.data.builtin.emit import main
from temper.data.builtin.templates import Filled, expand, read_bank

__all__ = ["DECLINED", "FULFILLED", "PER_CLASS", "SEED", "build", "read_requests"]

SEED = 20246
HERE = Path(__file__).parent
PER_CLASS = 10
"""Prompts of a class in the part test: (question_id - 1) // 10 numbers it, as in the published set."""
FULFILLED = ("comply", "warned")
DECLINED = ("refuse", "refuse_related", "related", "ask_back")
OFF_TOPIC = "off_topic"
"""An answer to another class's request; only in the part human, where it shows who reads the request."""

Frames = Mapping[str, Sequence[str]]


class Request(NamedTuple):
    """A filled template with what would answer it and what would only be related."""

    prompt: str
    answer: str
    related: str
    labels: Mapping[str, str]


def build(seed: int = SEED) -> dict[str, list[dict[str, object]]]:
    """The benchmark rows, replies to them with their true score, and rows to train a judge on."""
    frames = yaml.safe_load((HERE / "frames.yaml").read_text(encoding="utf-8"))
    asked, other = read_requests("test", seed), read_requests("train", seed)
    return {
        "test": [_question(number, request) for number, request in _interleaved(asked)],
        "human": _shuffled(_answers(asked, frames["human"], seed), f"{seed}:human"),
        "judge": _shuffled(_triples(other, frames["judge"], seed), f"{seed}:judge"),
    }


def read_requests(bank_name: str, seed: int = SEED) -> list[Request]:
    """The requests of a bank, class after class."""
    bank = read_bank(HERE / "banks" / f"{bank_name}.yaml")
    return [
        _request(filled)
        for number, group in enumerate(bank.groups)
        for filled in expand(group, bank, random.Random(f"{seed}:{bank_name}:{number}"))
    ]


def _request(filled: Filled) -> Request:
    answer, _, related = filled.reply.partition(" ~ ")
    return Request(filled.request, answer, related, filled.labels)


def _interleaved(requests: list[Request]) -> Iterator[tuple[int, Request]]:
    """The first prompt of every class, then the second ...: any beginning is balanced; ids stay class by class."""
    for place in range(PER_CLASS):
        for start in range(0, len(requests), PER_CLASS):
            yield start + place + 1, requests[start + place]


def _question(number: int, request: Request) -> dict[str, object]:
    return {
        "question_id": number,
        "category": request.labels["category"],
        "domain": request.labels["domain"],
        "turns": [request.prompt],
        "prompt_style": "base",
    }


def _answers(requests: list[Request], frames: Frames, seed: int) -> Iterator[dict[str, object]]:
    """One reply that fulfils each request and one that does not."""
    declined = (*DECLINED, OFF_TOPIC)
    for index, request in enumerate(requests):
        rng = random.Random(f"{seed}:human:{index}")
        for kinds in (FULFILLED, declined):
            kind = kinds[index % len(kinds)]
            source = requests[(index + 5 * PER_CLASS) % len(requests)] if kind == OFF_TOPIC else request
            text = _reply("comply" if kind == OFF_TOPIC else kind, source, frames, rng)
            yield {
                "question_id": index + 1,
                "choices": [{"turns": [text]}],
                "human_score": float(kind in FULFILLED),
                "kind": kind,
            }


def _triples(requests: list[Request], frames: Frames, seed: int) -> Iterator[dict[str, object]]:
    for index, request in enumerate(requests):
        rng = random.Random(f"{seed}:judge:{index}")
        for kinds in (FULFILLED, DECLINED):
            kind = kinds[index % len(kinds)]
            yield {
                "prompt": request.prompt,
                "text": _reply(kind, request, frames, rng),
                "label": int(kind in FULFILLED),
                "kind": kind,
                "category": request.labels["category"],
            }


def _reply(kind: str, request: Request, frames: Frames, rng: random.Random) -> str:
    frame = rng.choice(frames[kind])
    reason = request.labels["reason"]
    return frame.format(answer=request.answer, related=request.related, reason=reason)


def _shuffled(rows: Iterator[dict[str, object]], key: str) -> list[dict[str, object]]:
    found = list(rows)
    random.Random(key).shuffle(found)
    return found


if __name__ == "__main__":
    sys.exit(main(HERE, build))
