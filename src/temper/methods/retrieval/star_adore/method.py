"""STAR and ADORE as `fit`, ranking metrics as `measure`; the trainers are in `training.py`, ADORE's loss in `losses.py`."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from temper.artefacts import Adapter, Artefact, Tune, Weights, tuning
from temper.core.errors import ConfigError, DataError
from temper.core.types import Row, Run
from temper.data.retrieval import Corpus, Question, corpus_of, qrels_of, questions_of, write_run
from temper.data.schemas import Data, Ranking
from temper.methods.retrieval.star_adore.card import Config
from temper.methods.retrieval.star_adore.training import (
    Asked,
    hard_negatives,
    ranked,
    reset_last_layers,
    train_adore,
    train_star,
)
from temper.ops.corpus_index import CorpusIndex, index_corpus, load_index, save_index
from temper.ops.ir_metrics import ir_values
from temper.ops.retrieve import Found
from temper.ops.stats import mean_ci
from temper.systems.encoder import Encoder

__all__ = ["fit", "measure", "prepare"]

logger = logging.getLogger(__name__)

SLUG = "star-adore"
LEVELS = tuple(step / 10 for step in range(11))
"""Recall levels of the precision-recall picture."""


def fit(system: Encoder, data: Data, config: Config, run: Run) -> Artefact:
    """The encoder trained with STAR, or with ADORE a query model beside it; the system stays as it was."""
    if system.query_model is not None:
        raise ConfigError(
            "The system has a query model already", where=f"system {system.spec!r}",
            cure="Train on the system without it: nothing is trained on top of stage=adore.",
        )  # fmt: skip
    corpus = corpus_of(data)
    questions = questions_of(data.records("train", Ranking), corpus)
    asked = prepare(system, questions, corpus, config, run)
    index = _index(system, corpus, config, run) if config.stage == "adore" else None
    tune = Tune(mode=config.mode, r=config.rank, alpha=2.0 * config.rank)
    with tuning(system, tune, run) as tuned:
        if config.reset_layers:
            reset_last_layers(tuned.system.model, config.reset_layers, run.seed)
        log = (
            train_star(tuned, asked, config, run)
            if index is None
            else train_adore(tuned, asked, index, config, run)
        )
        logger.info("%d steps, loss %.4f to %.4f", log.num_steps, log.loss[0], log.loss[-1])
        artefact = tuned.finish(SLUG)
    return artefact if index is None else _query_side(artefact, system)


def _query_side(artefact: Weights | Adapter, system: Encoder) -> Weights:
    """The trained change as a second model for queries; the base's fingerprint ties it to the documents."""
    weights = artefact.merge(system) if isinstance(artefact, Adapter) else artefact
    return dataclasses.replace(weights, side="query")


def prepare(
    system: Encoder, questions: Sequence[Question], corpus: Corpus, config: Config, run: Run
) -> Asked:
    """Queries and documents as tokens, hard negatives mined where the stage wants them.

    Queries that can form no pair are left out, and their number is logged; raises DataError where none is left.
    """
    mines = config.stage == "star" and config.negatives in ("star", "hard")
    hard = hard_negatives(system, questions, corpus, config, run) if mines else [[] for _ in questions]
    lonely = config.negatives == "hard" and config.stage == "star"
    kept = [n for n, places in enumerate(hard) if places or not lonely]
    if len(kept) < len(questions):
        logger.warning(
            "%d of %d queries have no hard negative and are left out",
            len(questions) - len(kept),
            len(questions),
        )
    if not kept or (len(kept) == 1 and config.stage == "star" and config.negatives == "in-batch"):
        raise DataError(
            f"{len(kept)} queries are left to train on: no pair of a relevant document and another",
            cure="Give more queries and documents, or take negatives=random.",
        )
    # What is trained on top of an earlier fit meets the queries in another order.
    random.Random(f"{run.seed}/{system.fingerprint}").shuffle(kept)
    cut = system.cut(config.document_tokens)
    return Asked(
        system.cut(config.query_tokens).ids([questions[n].text for n in kept], config.query_prompt),
        [tuple(questions[n].relevant) for n in kept],
        [hard[n] for n in kept],
        len(corpus),
        lambda places: cut.ids([corpus.texts[place] for place in places], config.document_prompt),
    )


def _index(system: Encoder, corpus: Corpus, config: Config, run: Run) -> CorpusIndex:
    documents, folder = system.cut(config.document_tokens), Path(config.index)
    if config.index and folder.exists():
        return load_index(folder, documents, corpus.texts, run)
    index = index_corpus(documents, corpus.texts, run, prompt=config.document_prompt)
    if config.index:
        save_index(index, folder)
    return index


def measure(system: Encoder, data: Data, config: Config, run: Run) -> Iterator[Row]:
    """Ranking metrics of the system, or of BM25, on the part test: the mean of each and its value by query.

    Writes the ranking to `run.folder` in TREC's format, with a precision-recall curve.
    """
    corpus = corpus_of(data)
    questions = questions_of(data.records("test", Ranking), corpus)
    texts = [question.text for question in questions]
    found = ranked(system, config.engine, texts, corpus, config.depth, config, run)
    by_query = {
        question.id: [corpus.ids[place] for place in row]
        for question, row in zip(questions, found.indices_NK.tolist(), strict=True)
    }
    if len(by_query) < len(questions):
        raise DataError("Two queries of the part test have one id", cure="Give every query an id of its own.")
    curve = [f"IPrec@{level:.1f}" for level in LEVELS]
    values = ir_values(qrels_of(questions, corpus.ids), by_query, [*config.metrics, *curve])
    if run.folder is not None:
        _write(run.folder, by_query, found, [values[name] for name in curve], config)
        if config.export:
            system.save(run.folder / "encoder")
    for metric in config.metrics:
        yield from _rows(metric, values[metric])


def _rows(metric: str, by_query: Mapping[str, float]) -> Iterator[Row]:
    mean = mean_ci(list(by_query.values()))
    low, high = (mean.low, mean.high) if math.isfinite(mean.low) else (None, None)
    yield Row(
        metric=metric, value=mean.value, n=mean.n, stderr=mean.stderr, low=low, high=high, split="test",
        higher_is_better=True,
    )  # fmt: skip
    for query, value in by_query.items():
        yield Row(metric=metric, value=value, item=query, split="test", higher_is_better=True)


def _write(
    folder: Path,
    by_query: Mapping[str, Sequence[str]],
    found: Found,
    curve: Sequence[Mapping[str, float]],
    config: Config,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    scored = {
        query: dict(zip(names, scores, strict=True))
        for (query, names), scores in zip(by_query.items(), found.scores_NK.tolist(), strict=True)
    }
    write_run(folder / "ranking.trec", scored, f"{SLUG}-{config.engine}")
    precision = [sum(values.values()) / len(values) for values in curve]
    lines = {config.engine: {"x": list(LEVELS), "y": precision}}
    figure = {
        "shared": True,
        "caption": "Mean over test queries of the best precision at that recall or more.",
        "x": "recall",
        "y": "interpolated precision",
        "lines": lines,
    }
    (folder / "figures.json").write_text(json.dumps({"curves": {"Precision against recall": figure}}))
