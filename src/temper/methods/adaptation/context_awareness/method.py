"""Diagnose, steer, tag and train for context awareness; the maths is in `steering.py` and `shares.py`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from temper.artefacts import ANY_BASE, Artefact, Prompt, Steer, Tune, tuning
from temper.core.errors import DataError
from temper.core.types import Row, Run
from temper.data.schemas import Data, Dialogue
from temper.methods.adaptation.context_awareness.card import INDICATOR, Config
from temper.methods.adaptation.context_awareness.conversations import build_conversations
from temper.methods.adaptation.context_awareness.needles import measure_needles
from temper.methods.adaptation.context_awareness.shares import SKIPPED, dependency_scores, layer_number
from temper.methods.adaptation.context_awareness.steering import steered
from temper.methods.adaptation.context_awareness.tagging import as_control, tag, threshold, without_tags
from temper.ops.batching import encode
from temper.ops.generate import Reply, Sampling, generate
from temper.ops.stats import auroc, wilson
from temper.ops.text import contains
from temper.ops.train import SftObjective, TrainSettings, train
from temper.systems.causal_lm import CausalLM

__all__ = ["build_steer", "fit", "make", "measure"]

SLUG = "context-awareness"


def fit(system: CausalLM, data: Data, config: Config, run: Run) -> Artefact:
    """By `mode`: Steer, a tuned Adapter or Weights ("indicator", "vanilla"), or the Prompt that adds [IND]."""
    if config.mode == "switch":
        return Prompt(ANY_BASE, SLUG, control=(INDICATOR,))
    if config.mode == "steer":
        return _steer(system, config)
    return _tuned(system, _training_rows(system, data, config, run), config, run)


def _steer(system: CausalLM, config: Config) -> Steer:
    settings = {
        "alpha": config.alpha,
        "steer_generated": config.steer_generated,
        "layers": list(config.layers),
        "heads": list(config.heads),
    }
    artefact = Steer(system.fingerprint, SLUG, settings)
    # Wrong layers, heads or attention kinds stop here and not when it is applied.
    with build_steer(system, artefact, 1.0):
        return artefact


@contextmanager
def build_steer(system: CausalLM, artefact: Steer, strength: float) -> Iterator[None]:
    """Steering with alpha ** strength; raises ConfigError where that leaves (0, 1]."""
    settings = artefact.settings
    with steered(
        system,
        float(settings["alpha"]) ** strength,
        steer_generated=settings["steer_generated"],
        layers=settings["layers"] or None,
        heads=settings["heads"] or None,
    ):
        yield


def _training_rows(system: CausalLM, data: Data, config: Config, run: Run) -> list[Dialogue]:
    """Conversations ready for SFT: tags as control tokens, or taken out for mode=vanilla."""
    given = data if "train" in data else make(system, data, config, run)
    records = _dialogues(given, "train")
    if config.mode == "vanilla":
        return [without_tags(record) for record in records]
    ready = [as_control(record) for record in records]
    if not any(message.control for record in ready for message in record.messages):
        raise DataError(
            f"No user message ends in {INDICATOR}, so there is nothing to learn it from",
            where=f"part train, {len(records)} rows",
            cure="Tag the conversations first: make context-awareness, with a lower beta or beta=median.",
        )
    return ready


def _dialogues(data: Data, part: str) -> list[Dialogue]:
    return list(cast("tuple[Dialogue, ...]", data[part]))


def _tuned(system: CausalLM, records: Sequence[Dialogue], config: Config, run: Run) -> Artefact:
    """Plain SFT on assistant turns; mode=indicator adds the row of [IND]."""
    tune = Tune(
        mode=config.tuning,
        r=config.rank,
        alpha=config.lora_alpha,
        dropout=config.dropout,
        new_tokens=(INDICATOR,) if config.mode == "indicator" else (),
        frozen_dtype="bf16" if run.precision == "bf16" and config.tuning == "lora" else "same",
    )
    settings = TrainSettings(
        lr=config.lr,
        num_epochs=config.num_epochs,
        batch_rows=config.batch_rows,
        schedule=config.schedule,
        warmup_ratio=config.warmup_ratio,
    )
    with tuning(system, tune, run) as tuned:
        examples = [encode(tuned.system, record, max_tokens=config.max_tokens) for record in records]
        train(
            tuned.system.model,
            tuned.named_parameters(),
            lambda epoch: examples,
            SftObjective(tuned.system.pad_id, tuned.system.device),
            settings,
            run,
            length=lambda example: len(example.ids),
        )
        return tuned.finish(SLUG)


def make(system: CausalLM, data: Data, config: Config, run: Run) -> Data:
    """The data with context-dependent user turns of part train tagged; our own conversations where none are given."""
    given = data if "train" in data else build_conversations(config.num_conversations, run.seed)
    records = [without_tags(record) for record in _dialogues(given, "train")]
    layer = layer_number(system, config.layer)
    scores_N = dependency_scores(system, records, layer, config.score_max_tokens, run)
    beta = threshold(scores_N, config.beta)
    return given.with_part(
        "train", [tag(r, scores, beta) for r, scores in zip(records, scores_N, strict=True)]
    )


def measure(system: CausalLM, data: Data, config: Config, run: Run) -> Iterator[Row]:
    """Rows of the probe that is set: needle tests, answers on part test, or the dependency score on it."""
    return {"needles": _needles, "answers": _answers, "dependency": _dependency}[config.probe](
        system, data, config, run
    )


def _needles(system: CausalLM, data: Data, config: Config, run: Run) -> Iterator[Row]:
    return measure_needles(system, config, run)


def _test_rows(data: Data, config: Config, run: Run, column: str) -> list[Dialogue]:
    """Part test, or that of our own conversations; every row needs the column."""
    given = data if "test" in data else build_conversations(config.num_conversations, run.seed)
    records = _dialogues(given, "test")
    for number, record in enumerate(records, 1):
        if not record.extra.get(column):
            raise DataError(
                f"The row has no {column!r}",
                where=f"part test, row {number}, column {column}",
                cure=f"probe={config.probe} needs it: {_COLUMNS[column]}.",
            )
    return records


_COLUMNS = {
    "answer": "the words that a right reply holds",
    "kind": '"context" for a turn answered from its context, "aside" for one that passes over it, "chat" without one',
}


def _answers(system: CausalLM, data: Data, config: Config, run: Run) -> Iterator[Row]:
    """`contained`: the answer stands in the reply to a context turn; `prior`: common knowledge does; `knowledge`: chat."""
    records = [r for r in _test_rows(data, config, run, "answer") if r.extra.get("kind") != "aside"]
    sampling = Sampling(max_new_tokens=config.reply_tokens, seed=run.seed)
    replies = generate(system, [record.prompt for record in records], sampling, run)
    _write_examples(run.folder, records, replies)
    pairs = list(zip(records, replies, strict=True))
    chat = [pair for pair in pairs if pair[0].extra.get("kind") == "chat"]
    context = [pair for pair in pairs if pair[0].extra.get("kind") != "chat"]
    yield from _containment("contained", context, "answer", True)
    yield from _containment("prior", [pair for pair in context if pair[0].extra.get("prior")], "prior", False)
    yield from _containment("knowledge", chat, "answer", True)


def _containment(
    metric: str, pairs: Sequence[tuple[Dialogue, Reply]], column: str, better: bool
) -> Iterator[Row]:
    hits = [contains(reply.text, str(record.extra[column])) for record, reply in pairs]
    for number, ((record, _), hit) in enumerate(zip(pairs, hits, strict=True)):
        item = record.id or str(number)
        yield Row(metric=metric, value=float(hit), item=item, split="test", higher_is_better=better)
    if hits:
        found = wilson(sum(hits), len(hits))
        yield Row(
            metric=metric, value=found.value, n=found.n, low=found.low, high=found.high, split="test",
            higher_is_better=better,
        )  # fmt: skip


def _dependency(system: CausalLM, data: Data, config: Config, run: Run) -> Iterator[Row]:
    """AUC of s for context turns against the others, by the last turn of each conversation, and mean s of each kind.

    `dependency_auc_aside` compares with turns that hold a passage too: there length tells nothing.
    """
    records = [without_tags(record) for record in _test_rows(data, config, run, "kind")]
    layer = layer_number(system, config.layer)
    scores_N = dependency_scores(system, records, layer, config.score_max_tokens, run)
    by_kind: dict[str, list[float]] = {"context": [], "chat": [], "aside": []}
    for record, scores in zip(records, scores_N, strict=True):
        if scores and scores[-1] != SKIPPED:
            by_kind.setdefault(str(record.extra["kind"]), []).append(scores[-1])
    note = f"layer {layer}"
    pairs = (
        ("dependency_auc", by_kind["chat"] + by_kind["aside"]),
        ("dependency_auc_aside", by_kind["aside"]),
    )
    for metric, others in pairs:
        yield _auc_row(metric, by_kind["context"], others, note)
    for kind, values in by_kind.items():
        if values:
            mean = sum(values) / len(values)
            yield Row(metric="dependency", value=mean, n=len(values), split="test", group=kind, note=note)


def _auc_row(metric: str, context: Sequence[float], others: Sequence[float], note: str) -> Row:
    if not context or not others:
        missing = f"{len(context)} scored context turns, {len(others)} others"
        return Row(metric=metric, value=None, n=0, split="test", higher_is_better=True, note=missing)
    auc = auroc([*context, *others], [True] * len(context) + [False] * len(others))
    return Row(
        metric=metric, value=auc, n=len(context) + len(others), split="test", higher_is_better=True, note=note
    )


def _write_examples(
    folder: Path | None, records: Sequence[Dialogue], replies: Sequence[Reply], most: int = 24
) -> None:
    if folder is None:
        return
    with (folder / "examples.jsonl").open("w", encoding="utf-8") as file:
        for record, reply in list(zip(records, replies, strict=True))[:most]:
            example: dict[str, Any] = {
                "id": record.id,
                "prompt": record.prompt[-1].content,
                "before": "",
                "after": reply.text,
                "gold": record.extra["answer"],
            }
            file.write(json.dumps(example, ensure_ascii=False) + "\n")
