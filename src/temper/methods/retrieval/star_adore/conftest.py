"""What the tests begin with: a tiny encoder, six pairs, quick settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from temper.core.types import Run
from temper.data.retrieval import corpus_of, questions_of
from temper.data.schemas import Data, Ranking
from temper.methods.retrieval.star_adore.card import Config
from temper.methods.retrieval.star_adore.method import prepare
from temper.methods.retrieval.star_adore.training import star_items
from temper.systems.loading import load_base

PAIRS = [
    ("the fox", "a fox went to read in the valley"),
    ("the old mill", "the mill stood beside the stream"),
    ("one and one", "two"),
    ("a story", "please write a short story about a lighthouse"),
    ("the weather", "tell me about the weather in the valley"),
    ("the letter", "who wrote the letter ?"),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMPER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def system() -> Any:
    return load_base("tiny:bert")


def pairs(part: str = "train", num: int = 6) -> Data:
    rows = [Ranking(query, text, id=f"q{n}") for n, (query, text) in enumerate(PAIRS[:num])]
    return Data({part: rows})


def quick(**changes: Any) -> Config:
    settings = {
        "batch_rows": 4, "max_steps": 3, "warmup_steps": 0, "lr": 1e-2, "num_hard": 3, "top_k": 4,
        "query_tokens": 12, "document_tokens": 24,
    }  # fmt: skip
    return Config(**{**settings, **changes})


def items_of(system: Any, config: Config, *, epoch: int = 0) -> list[Any]:
    corpus = corpus_of(pairs())
    questions = questions_of(pairs().records("train", Ranking), corpus)
    return star_items(prepare(system, questions, corpus, config, Run()), config, 0, epoch)
