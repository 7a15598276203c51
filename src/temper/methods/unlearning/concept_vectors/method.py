"""Find the vectors that hold a concept, ablate them, and measure whether unlearning touched them."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from temper.artefacts import Artefact, Weights
from temper.core.errors import ConfigError, DataError
from temper.core.types import Row, Run
from temper.data.schemas import Data, Dialogue, Text
from temper.methods.unlearning.concept_vectors.behaviour import asks_of, behaviour_rows, write_examples
from temper.methods.unlearning.concept_vectors.card import Config
from temper.methods.unlearning.concept_vectors.intrinsic import SPLIT, intrinsic_rows
from temper.methods.unlearning.concept_vectors.items import (
    Item,
    concept_of,
    paragraphs,
    people_items,
    place_columns,
    read_items,
)
from temper.methods.unlearning.concept_vectors.mining import control_for, mine
from temper.methods.unlearning.concept_vectors.needle import noised, optimised
from temper.methods.unlearning.concept_vectors.original import (
    State,
    load_original,
    places_of,
    take_state,
    unlike_mined,
    write_state,
)
from temper.ops.batching import encode
from temper.ops.value_vectors import Place, down_projection, replaced, vectors_at
from temper.systems.causal_lm import CausalLM

__all__ = ["fit", "make", "measure"]

logger = logging.getLogger(__name__)

SLUG = "concept-vectors"


def make(system: CausalLM, data: Data, config: Config, run: Run) -> Data:
    """The items with a vector each: the one a row names, else the most selective candidate found in this model.

    Beside them as parts `forget` and `retain` what unlearning trains on: the concepts' pages, and another concept's.
    """
    rows = data.records("items", Text) or people_items(
        data.records("forget", Dialogue), data.records("world_facts", Dialogue)
    )
    items = read_items(rows, config.concepts, run.seed)
    lacking = [item for item in items if item.place is None]
    mined = dict(
        zip((i.concept for i in lacking), mine(system, lacking, config, run) if lacking else [], strict=True)
    )
    places = [item.place or mined[item.concept][0].place for item in items]
    used = {*places, *(item.control for item in items if item.control)}
    made = []
    for item, place in zip(items, places, strict=True):
        candidates = mined.get(item.concept, [])
        taken = [*used, *(candidate.place for candidate in candidates)]
        control = item.control or control_for(system.model, place, taken, run.seed)
        used.add(control)
        found_in = item.mined_on if item.place else system.fingerprint
        extra = {**item.record.extra, **place_columns(place), "Control": place_columns(control)}
        # Drawn of rows that are left out here.
        extra["unrelated_QA"] = list(item.asked.unrelated)
        extra |= {"Mined_on": found_in} if found_in else {}
        if candidates:
            extra["Candidates"] = [candidate.columns() for candidate in candidates]
        made.append(replace(item.record, extra=extra))
    parts: dict[str, Sequence[Any]] = {"items": made, "forget": [row for i in items for row in paragraphs(i)]}
    kept = _retained(rows, items, data, run.seed)
    return Data({**parts, **({"retain": kept} if kept else {})}, SLUG)


def _retained(rows: Sequence[Text], items: Sequence[Item], data: Data, seed: int) -> Sequence[Any]:
    """The retain rows given, else the page of one other concept, drawn by the seed."""
    chosen = {item.concept for item in items}
    others = [name for name in map(concept_of, rows) if name not in chosen]
    if data.get("retain") or not others:
        return data.get("retain")
    (other,) = read_items(rows, [random.Random(f"{seed}/retain").choice(others)], seed)
    return paragraphs(other)


def fit(system: CausalLM, data: Data, config: Config, run: Run) -> Artefact:
    """Needle: the items' vectors with noise, then (num_epochs > 0) optimised alone on the part forget.

    With `control` the random columns instead. The system stays as it was.
    """
    items = read_items(data.records("items", Text), config.concepts, run.seed)
    places = list(dict.fromkeys(places_of(items, control=config.control)))
    start_PD = vectors_at(system.model, places)
    new_PD = noised(start_PD, config.noise, config.noise_unit, run.seed)
    for place, old_D, new_D in zip(places, start_PD, new_PD, strict=True):
        share = float((new_D - old_D).norm() / old_D.norm())
        logger.info("layer %d, column %d: noise of %.2f vector norms", place.layer, place.dim, share)
    if config.num_epochs:
        told = _forget(data, config.concepts)
        rows = [encode(system, row, train_on="last", max_tokens=config.max_tokens) for row in told]
        new_PD = optimised(system, places, new_PD, rows, config, run)
    if bool((new_PD == start_PD).all()):
        raise ConfigError("Needle changes nothing: noise and num_epochs are 0", cure="Raise one of them.")
    return Weights(system.fingerprint, SLUG, _changed(system, places, new_PD))


def _forget(data: Data, concepts: Sequence[str]) -> list[Dialogue]:
    """The rows of the part forget that are about these concepts, or say nothing of their subject; all for no concepts."""
    rows = [
        row
        for row in data.records("forget", Dialogue)
        if not concepts or row.extra.get("subject") in (None, *concepts)
    ]
    if not rows:
        raise DataError(
            "There is no text to forget",
            where=data.source,
            cure="Give the part forget (make concept-vectors makes it) with rows about the concepts, or set num_epochs=0.",
        )
    return rows


def _changed(system: CausalLM, places: Sequence[Place], new_PD: Any) -> dict[str, Any]:
    """The matrices that hold the places, with the new vectors in them."""
    with replaced(system.model, places, new_PD):
        spots = [down_projection(system.model, layer) for layer in dict.fromkeys(p.layer for p in places)]
        return {spot.name: spot.weight.data.cpu().clone() for spot in spots}


def measure(system: CausalLM, data: Data, config: Config, run: Run) -> Iterator[Row]:
    """How far vectors, answers and jailbroken answers are from the original's; without `reference` this is the original,
    and its vectors and answers are recorded.
    """
    items = read_items(data.records("items", Text), config.concepts, run.seed)
    if not config.reference:
        state = take_state(system, items, config, run)
        if run.folder is not None:
            write_state(state, run.folder)
        note = unlike_mined(state, items)
        yield from (row.noted(note) for row in _original_rows(state, items))
        return
    original = load_original(system, items, config, run)
    now = take_state(system, items, config, run, original.answers)
    asks = [ask for item in items for ask in asks_of(item, config)]
    write_examples(run, asks, original.answers, now.answers)
    note = unlike_mined(original, items)
    found = (
        intrinsic_rows(original, now, [item.concept for item in items]),
        behaviour_rows(asks, original.answers, now.answers),
    )
    yield from (row.noted(note) for rows in found for row in rows)


def _original_rows(state: State, items: Sequence[Item]) -> Iterator[Row]:
    """What there is to erase: each vector's norm, and how many of its top tokens are the concept's."""
    for number, item in enumerate(items):
        top, lexicon = set(state.top_ids_PK[number].tolist()), set(state.lexicons[number])
        norm = float(state.vectors_PD[number].norm())
        yield Row(metric="vector_norm", value=norm, item=item.concept, split=SPLIT)
        yield Row(metric="lexicon_tokens", value=float(len(top & lexicon)), item=item.concept, split=SPLIT)
    words = [len(answer.text.split()) for answer in state.answers.values()]
    yield Row(metric="answer_words", value=sum(words) / len(words), n=len(words))
